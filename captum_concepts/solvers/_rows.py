"""Rows of a design matrix, read in chunks from a tensor, an array, a memory map, or any re-iterable of chunks.

The solver only sums over rows, so it never needs all of them at once. A row source yields chunks ``(x, y, weight)`` on
the compute device; only this module depends on how the rows are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from captum_concepts.errors import InputError, shortened

# Elements of one chunk of X, small enough for a CPU's caches (with the logits) or large enough to hide the launch
# overhead of an accelerator's kernels.
_CPU_CHUNK_ELEMENTS = 1 << 21
_ACCELERATOR_CHUNK_ELEMENTS = 1 << 26


class Chunk(NamedTuple):
    """Rows ``x`` (m, D), class indices ``y`` (m,), and ``weight`` (m,) or None for ones."""

    x: Tensor
    y: Tensor
    weight: Tensor | None


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """The widest float dtype of a device, float64, or float32 on MPS."""
    return torch.float32 if device.type == "mps" else torch.float64


class Rows:
    """Chunked, re-readable rows with their labels and weights.

    Attributes:
        n_features: number of columns D.
        device: of the chunks.
        dtype: of the chunks; may be changed to float64 at any time.
        result_dtype: dtype of results, initially that of the chunks.
    """

    def __init__(
        self,
        read: Callable[[], Iterator[tuple[Any, Any]]],
        labels: Tensor | None,
        weight: Tensor | None,
        n_features: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._read = read
        self._labels = labels
        self._weight = weight
        self._lookup: Tensor | None = None
        self._mean: Tensor | None = None
        self._std: Tensor | None = None
        self.n_features = n_features
        self.dtype = dtype
        self.result_dtype = dtype
        self.device = device

    def __iter__(self) -> Iterator[Chunk]:
        start = 0
        for x_raw, y_raw in self._read():
            x = _as_float(x_raw, self.device, self.dtype)
            if x.ndim != 2 or x.shape[1] != self.n_features:
                raise InputError(
                    f"every chunk of X must have shape (rows, {self.n_features}) as the first one had; "
                    f"got {tuple(x.shape)} after {start} rows"
                )
            stop = start + x.shape[0]
            if self._labels is None:
                y = _as_labels(y_raw).to(self.device)
                if y.shape[0] != x.shape[0]:
                    raise InputError(f"a chunk of X has {x.shape[0]} rows, but {y.shape[0]} labels")
            else:
                if stop > self._labels.shape[0]:
                    raise InputError(f"X has more rows than y, which has {self._labels.shape[0]}")
                y = self._labels[start:stop]
            weight = None
            if self._weight is not None:
                if stop > self._weight.shape[0]:
                    raise InputError(f"X has more rows than sample_weight, which has {self._weight.shape[0]}")
                weight = self._weight[start:stop].to(x.dtype)
            if self._lookup is not None:
                y = self._lookup[y]
            if self._mean is not None and self._std is not None:
                x = (x - self._mean.to(x.dtype)) / self._std.to(x.dtype)
            start = stop
            if x.shape[0]:
                yield Chunk(x, y, weight)
        for name, given in (("y", self._labels), ("sample_weight", self._weight)):
            if given is not None and start != given.shape[0]:
                raise InputError(f"X has {start} rows but {name} has {given.shape[0]}; they must agree")
        if start == 0:
            raise InputError("X has no rows; at least two rows of two classes are needed")

    def labels(self) -> Tensor:
        """All labels as one integer tensor (N,); reads the rows once if the chunks contain the labels."""
        if self._labels is not None:
            return self._labels
        parts = [_as_labels(y) for _, y in self._read()]
        if not parts:
            raise InputError("X has no rows; at least two rows of two classes are needed")
        return torch.cat(parts).to(self.device)

    def relabel(self, lookup: Tensor) -> None:
        """Yield ``lookup[y]`` instead of y from now on."""
        self._lookup = lookup

    def standardize(self, mean: Tensor, std: Tensor) -> None:
        """Yield ``(x - mean) / std`` from now on, computed per chunk without copying X."""
        self._mean, self._std = mean, std


def as_rows(
    X: Any,
    y: Any,
    *,
    sample_weight: Any = None,
    device: torch.device | str | None = None,
    chunk_size: int | None = None,
    num_outputs_hint: int = 1,
) -> Rows:
    """The caller's data as :class:`Rows`.

    Args:
        X: (N, D) tensor, numpy array or memory map; or a re-iterable of (m, D) chunks in the order of ``y`` (a list, a
            ``DataLoader`` that does not shuffle, any object whose ``__iter__`` restarts); or, with ``y=None``, a
            re-iterable of ``(x, y)`` pairs.
        y: (N,) integer class indices, or None if the chunks of X contain them.
        sample_weight: (N,) non-negative weights, or None.
        device: device of the computation; None takes that of X (CPU for arrays).
        chunk_size: rows per chunk of a tensor or array; None chooses.
        num_outputs_hint: number of classes, for the automatic chunk size.

    Raises:
        InputError: wrong shapes, sparse or one-shot inputs, or invalid labels or weights.
    """
    if chunk_size is not None and (
        isinstance(chunk_size, bool) or not isinstance(chunk_size, Integral) or int(chunk_size) < 1
    ):
        raise InputError(f"chunk_size must be a positive integer or None; got {chunk_size!r}")
    if isinstance(X, Tensor):
        if X.layout != torch.strided:
            raise InputError(f"sparse X ({X.layout}) is not supported; pass X.to_dense() or dense chunks of it")
        target = torch.device(device) if device is not None else X.device
        source: Tensor | np.ndarray | None = X.detach()
    elif isinstance(X, np.ndarray):
        target = torch.device(device) if device is not None else torch.device("cpu")
        source = X
    elif hasattr(X, "toarray"):
        raise InputError("sparse X is not supported; pass X.toarray() or a list of dense chunks of it")
    else:
        target = torch.device(device) if device is not None else torch.device("cpu")
        source = None

    read: Callable[[], Iterator[tuple[Any, Any]]]
    if source is not None:
        if source.ndim != 2 or source.shape[0] == 0 or source.shape[1] == 0:
            raise InputError(f"X must have shape (rows, features), both at least 1; got {tuple(source.shape)}")
        if y is None:
            raise InputError("y is None; pass labels, or pass X as an iterable of (x, y) pairs")
        n_features = int(source.shape[1])
        step = chunk_size or _auto_chunk(n_features, num_outputs_hint, target)
        read = _slices(source, step)
        first: Any = source[:1]
    else:
        if not isinstance(X, Iterable):
            raise InputError(
                f"X must be a tensor, a numpy array or memory map, or an iterable of chunks; got {type(X).__name__}"
            )
        if isinstance(X, Iterator):
            raise InputError(
                "X is a one-shot iterator, but the solver reads the rows many times; pass a list of chunks or an "
                "object whose __iter__ starts from the beginning"
            )
        read = _pairs(X, y is None)
        first = next((x for x, _ in read()), None)
        if first is None:
            raise InputError("X has no rows; at least two rows of two classes are needed")
        check_numbers("a chunk of X", first)
        first = torch.as_tensor(first)
        if first.ndim != 2 or first.shape[1] == 0:
            raise InputError(f"every chunk of X must have shape (rows, features); the first has {tuple(first.shape)}")
        n_features = int(first.shape[1])
    labels = None if y is None else _as_labels(y).to(target)
    if labels is not None and source is not None and labels.shape[0] != source.shape[0]:
        raise InputError(f"X has {source.shape[0]} rows but y has {labels.shape[0]}; they must agree")
    weight = None if sample_weight is None else _as_weight(sample_weight, target)
    if weight is not None and source is not None and weight.shape[0] != source.shape[0]:
        raise InputError(f"X has {source.shape[0]} rows but sample_weight has {weight.shape[0]}; they must agree")
    return Rows(read, labels, weight, n_features, _compute_dtype(first, target), target)


def _auto_chunk(n_features: int, n_outputs: int, device: torch.device) -> int:
    elements = _CPU_CHUNK_ELEMENTS if device.type == "cpu" else _ACCELERATOR_CHUNK_ELEMENTS
    return max(256, elements // max(n_features, 4 * n_outputs))


def _slices(source: Any, step: int) -> Callable[[], Iterator[tuple[Any, None]]]:
    def read() -> Iterator[tuple[Any, None]]:
        for start in range(0, source.shape[0], step):
            yield source[start : start + step], None

    return read


def _pairs(chunks: Iterable[Any], with_labels: bool) -> Callable[[], Iterator[tuple[Any, Any]]]:
    def read() -> Iterator[tuple[Any, Any]]:
        for chunk in chunks:
            if not with_labels:
                yield chunk, None
            elif isinstance(chunk, (tuple, list)) and len(chunk) == 2:
                yield chunk[0], chunk[1]
            else:
                raise InputError(f"y is None, so X must yield (x, y) pairs; it yielded {type(chunk).__name__}")

    return read


def _compute_dtype(first: Any, device: torch.device) -> torch.dtype:
    wide = first.dtype in (torch.float64, np.float64)
    return torch.float64 if wide and device.type != "mps" else torch.float32


def check_numbers(name: str, value: Any) -> None:
    """Raise for what torch cannot read as a tensor of numbers, and for masked entries, which it would read as numbers.

    Raises:
        InputError: text or objects, another byte order, negative strides, or masked entries.
    """
    if isinstance(value, np.ndarray):
        if np.ma.is_masked(value):
            raise InputError(f"{name} has {np.ma.count_masked(value)} masked entries; fill them in, or leave them out")
        if value.dtype.kind not in "biufc" or value.dtype.itemsize > (16 if value.dtype.kind == "c" else 8):
            raise InputError(
                f"{name} has dtype {value.dtype}, not numbers that torch reads; pass for example "
                "X.astype('float32'), and names of classes as np.unique(y, return_inverse=True)[1]"
            )
        if not value.dtype.isnative or any(stride < 0 for stride in value.strides):
            what = "negative strides" if value.dtype.isnative else "another byte order"
            raise InputError(
                f"{name} is an array with {what}, which torch does not read; pass a copy, as in "
                "array.astype(array.dtype.newbyteorder('='), order='C')"
            )
    elif not isinstance(value, Tensor):
        try:
            torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"{name} must be numbers in a tensor, array or list, got {shortened(value)}; names of classes become "
                "indices by np.unique(y, return_inverse=True)[1]"
            ) from error


def _as_float(x: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
    check_numbers("X", x)
    if isinstance(x, np.ndarray):
        # Memory-mapped and read-only slices (one chunk) are copied, because torch refuses read-only memory.
        x = torch.from_numpy(np.array(x) if isinstance(x, np.memmap) or not x.flags.writeable else x)
    else:
        x = torch.as_tensor(x).detach()
    if x.is_complex():
        raise InputError(f"X must be real; got {x.dtype}")
    return x.to(device=device, dtype=dtype)


def _as_labels(y: Any) -> Tensor:
    check_numbers("y", y)
    labels = torch.as_tensor(y)
    if labels.ndim != 1:
        raise InputError(f"y must be one class index per row, shape (rows,); got {tuple(labels.shape)}")
    if labels.is_complex():
        raise InputError(f"y must contain class indices; got {labels.dtype}")
    if labels.is_floating_point():
        if not bool(torch.isfinite(labels).all()):
            raise InputError("y contains NaN or infinite values; it must contain class indices 0, 1, ...")
        if bool((labels != labels.round()).any()):
            raise InputError("y contains fractions; it must contain class indices 0, 1, ...")
    return labels.detach().long()


def _as_weight(weight: Any, device: torch.device) -> Tensor:
    check_numbers("sample_weight", weight)
    values = torch.as_tensor(weight).detach()
    if values.ndim != 1:
        raise InputError(f"sample_weight must have shape (rows,); got {tuple(values.shape)}")
    if values.is_complex():
        raise InputError(f"sample_weight must be real; got {values.dtype}")
    values = values.to(device=device, dtype=accumulation_dtype(device))
    if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
        raise InputError("sample_weight must be finite and non-negative")
    if not bool((values > 0).any()):
        raise InputError("sample_weight is zero for every row; at least one row of each class needs a positive weight")
    return values
