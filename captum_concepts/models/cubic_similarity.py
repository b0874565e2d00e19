"""The cubic cosine similarity that trains a concept bottleneck, with its gradient and sums over parts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from captum_concepts.errors import InputError

#: Sums a tensor over all processes, in place or not, and returns the sum.
Reduce = Callable[[Tensor], Tensor]


def cubic_similarity(q: Tensor, p: Tensor) -> Tensor:
    r"""The cubic cosine similarity of q and p over the samples (LF-CBM; SALF-CBM, equation 1).

    .. math:: \operatorname{sim}(q, p) = \frac{\bar q^3 \cdot \bar p^3}{\|\bar q^3\| \, \|\bar p^3\|}, \qquad
        \bar q = q - \operatorname{mean}_n q

    with elementwise powers, so strong matches count most. SALF-CBM's loss is minus the sum over concepts and cells,
    where q are the concept maps and p the image-text similarities of a batch. The similarity is invariant to the scale
    and offset of q and p.

    Args:
        q: ``(N, ...)``, samples first.
        p: as ``q``.

    Returns:
        ``(...)`` in [-1, 1], at least float32; differentiable. Exactly 0, with gradient 0, where q or p is constant
        over the samples. For two samples it is always -1, 0 or 1.

    Raises:
        InputError: different shapes, or fewer than two samples.

    Example:
        >>> p = torch.tensor([[0.1, 0.3], [0.2, 0.3], [0.9, 0.3]])
        >>> cubic_similarity(-2 * p + 5, p)  # the second column is constant
        tensor([-1.,  0.])
    """
    if q.shape != p.shape or q.ndim < 1 or len(q) < 2:
        raise InputError(f"q and p must have one shape (N, ...) with N of at least 2, got {_shape(q)} and {_shape(p)}")
    a, b = (_cubed(_centred(values)) for values in (q, p))
    product = (a * b).sum(0)
    lengths = a.square().sum(0) * b.square().sum(0)
    zero = lengths == 0
    return product.masked_fill(zero, 0) / lengths.masked_fill(zero, 1).sqrt()


def similarity_and_gradient(q: Tensor, p: Tensor, reduce: Reduce | None = None) -> tuple[Tensor, Tensor]:
    """Cubic similarity over dimension 1 of values with mean zero along it, and its gradient by q.

    The explicit gradient keeps three tensors of this size in memory, autograd would keep five.

    Args:
        q: ``(k, n, M)``, mean zero over the samples n (of all processes). Overwritten.
        p: as ``q``. Overwritten.
        reduce: sums over the processes that have the other samples.

    Returns:
        The similarity ``(k, M)``, and the gradient ``(k, n, M)`` of its sum by the samples of this process.
    """
    p.mul_(p.square())
    squared = q.square()
    cubed = q.mul_(squared)
    sums = torch.stack([(cubed * p).sum(1), cubed.square().sum(1), p.square().sum(1)])
    if reduce is not None:
        sums = reduce(sums)
    product, q_length, p_length = sums
    flat = (q_length <= 0) | (p_length <= 0)
    # Two roots, because the product under a single root could underflow.
    scale = torch.where(flat, 0.0, q_length.clamp_min(_TINY).rsqrt() * p_length.clamp_min(_TINY).rsqrt())
    similarity = product * scale
    slope = similarity / q_length.clamp_min(_TINY)
    gradient = p.mul_(scale[:, None]).addcmul_(cubed, slope[:, None], value=-1).mul_(squared).mul_(3)
    return similarity, gradient


class CubicSums:
    """Cubic similarities over more samples than fit in memory, accumulated in parts.

    Args:
        shape: of the result, e.g. ``(h*w, M)``.
        device: of the sums.

    Example:
        >>> q, p = torch.randn(9, 2), torch.randn(9, 2)
        >>> sums = CubicSums((2,))
        >>> for part in torch.arange(9).split(4):
        ...     sums.add((q - q.mean(0))[part], (p - p.mean(0))[part], dim=0)
        >>> torch.allclose(sums.similarity(), cubic_similarity(q, p), atol=1e-6)
        True
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device | str | None = None) -> None:
        self._sums = torch.zeros(3, *shape, device=device, dtype=torch.float32)

    def add(self, q: Tensor, p: Tensor, *, dim: int, where: slice | None = None) -> None:
        """Add samples along ``dim`` of values with mean zero over *all* samples.

        Args:
            q, p: the samples.
            dim: their dimension.
            where: the slice of the result's first dimension that they belong to.
        """
        cubed, other = _cubed(q), _cubed(p)
        rows = self._sums if where is None else self._sums[:, where]
        rows[0] += (cubed * other).sum(dim)
        rows[1] += cubed.square().sum(dim)
        rows[2] += other.square().sum(dim)

    def add_resampled(self, q: Tensor, p: Tensor, counts: Tensor) -> None:
        """Add samples ``(n, M)``, weighted by ``counts`` ``(R, n)`` in R resamples; sums have the shape ``(R, M)``."""
        cubed, other = _cubed(q), _cubed(p)
        self._sums[0] += counts @ (cubed * other)
        self._sums[1] += counts @ cubed.square()
        self._sums[2] += counts @ other.square()

    def similarity(self, reduce: Reduce | None = None) -> Tensor:
        """The similarity of the samples added so far; see :func:`cubic_similarity`."""
        product, q_length, p_length = self._sums if reduce is None else reduce(self._sums.clone())
        flat = (q_length <= 0) | (p_length <= 0)
        scale = q_length.clamp_min(_TINY).rsqrt() * p_length.clamp_min(_TINY).rsqrt()
        return (product * scale).masked_fill(flat, 0)


_TINY = 1e-38


def _centred(values: Tensor) -> Tensor:
    """``values`` centered and scaled to at most 1, so that their sixth powers do not underflow in float32."""
    values = values if values.dtype == torch.float64 else values.float()
    mean = values.mean(0)
    centred = values - mean
    with torch.no_grad():
        size = centred.abs().amax(0)
        # Rounding errors of a constant are not a signal.
        noise = 4 * torch.finfo(values.dtype).eps * values.abs().amax(0)
        factor = torch.where(size > noise, size.clamp_min(_TINY).reciprocal(), 0.0)
    return centred * factor


def _cubed(values: Tensor) -> Tensor:
    return values * values * values


def _shape(values: Tensor) -> tuple[int, ...]:
    return tuple(values.shape)
