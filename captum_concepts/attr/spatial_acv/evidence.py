"""The margin an output loses without a concept, compared with other classes, other concepts and chance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_concepts._captum import check_target, select_output
from captum_concepts._checks import repeat_rows
from captum_concepts.activations import Inputs, Layers, full_precision, gradients_enabled
from captum_concepts.attr.batches import count
from captum_concepts.attr.spatial_acv.fit import FittedVectors
from captum_concepts.attr.spatial_acv.statistics import t_tail
from captum_concepts.explanation import short

#: Minimum fraction of the margin that a concept must carry to decide.
LEAST_SHARE = 0.05


@dataclass(frozen=True)
class ConceptEvidence:
    """Whether concepts decide an output, for N images and K concepts; see ``SpatialACV.evidence``.

    Args:
        concepts: K names.
        target: ``(N,)`` the output, or None if the model has only one.
        margins: ``(N,)`` the output minus the mean of the others.
        effects: ``(N, K)`` decrease of the margin without the concept.
        shares: ``(N, K)`` effect / |margin|.
        p_values: ``(N, K)`` of "another direction has the same effect there", or None without random sets.
        decides: ``(N, K)`` bool.
    """

    concepts: list[str]
    target: Tensor | None
    margins: Tensor
    effects: Tensor
    shares: Tensor
    p_values: Tensor | None
    decides: Tensor

    def first(self) -> list[str | None]:
        """For each image the deciding concept with the largest effect, or None if no concept decides."""
        best = self.effects.masked_fill(~self.decides, -torch.inf).argmax(1).tolist()
        return [self.concepts[k] if bool(row[k]) else None for k, row in zip(best, self.decides, strict=True)]

    def __repr__(self) -> str:
        n, k = len(self.effects), len(self.concepts)
        lines = [f"ConceptEvidence({n} image{'s' * (n != 1)}, {k} concept{'s' * (k != 1)})"]
        for i in range(min(n, 5)):
            about = "" if self.target is None else f" [target {int(self.target[i])}]"
            order = self.effects[i].argsort(descending=True).tolist()[:5]
            words = [
                f"{self.concepts[k]} {short(float(self.shares[i, k]), sign=True)}{'*' if self.decides[i, k] else ''}"
                for k in order
            ]
            lines.append(f"  {i}{about}: " + ", ".join(words))
        lines += [f"  ... {n - 5} more"] * (n > 5)
        return "\n".join([*lines, "  fraction of the margin due to the concept; *: the concept is decisive"])


def effects_of(
    layers: Layers, fitted: FittedVectors, inputs: Inputs, extra: Any, target: Any, steps: int
) -> tuple[Tensor, ...]:
    r"""Margins ``(N,)``, effects, p-values, the strongest other vectors' effects (``(N, K)`` each), outputs ``(N,)``.

    Where the layer encodes concept k at position (i, j), its projection is lowered to the threshold of the classifier,
    :math:`A'_{ij} = A_{ij} - \max(S_k(i, j) - \tau_k, 0) \, v_k`. The effect is the margin at A minus that at A',
    as an integral of gradients along the path, :math:`\sum_{ij} (A_{ij} - A'_{ij})^T \bar g_{ij}`. The same gradients
    yield the effect of any other unit vector u at these positions and amounts,
    :math:`\sum_{ij} |A_{ij} - A'_{ij}| \, u^T \bar g_{ij}`. The outputs are left out if they have no index.

    Args:
        layers: the layer.
        fitted: the vectors.
        inputs, extra, target: of N examples.
        steps: of the integral.
    """
    n, k = count(inputs), len(fitted.names)
    of_input = fitted.of_input
    plain = layers.run(inputs, additional_forward_args=extra, attribute_to_layer_input=of_input)
    layout, output = plain.layouts[0], plain.output
    check_target(output, target)
    index = explained_index(output, target)
    goal = target if index is None else index
    margins = full_precision(_margin(output, goal)).detach()
    vectors = fitted.vectors.to(full_precision(plain.maps[0]))
    thresholds = (-fitted.intercepts / fitted.slopes.clamp_min(1e-12)).to(vectors)
    copies = k * steps
    which = torch.arange(k, device=vectors.device).repeat_interleave(steps).repeat(n)
    along = ((torch.arange(steps, device=vectors.device) + 0.5) / steps).repeat(n * k)

    def excess(maps: Tensor) -> Tensor:
        projected = torch.einsum("nchw,nc->nhw", full_precision(maps), vectors[which])
        return (projected - thresholds[which, None, None]).relu()

    def without(raw: Tensor) -> Tensor:
        with torch.enable_grad():  # the adjoint of a rearrangement of entries is its inverse
            point = raw.detach().requires_grad_()
            maps = layout.maps(point)
            step = torch.einsum("n,nhw,nc->nchw", along, excess(maps.detach()), vectors[which]).to(maps)
            removed = torch.autograd.grad((maps * step).sum(), point)[0]
        return raw - removed

    repeated = repeat_rows(inputs, copies, n)
    with gradients_enabled():
        seen = layers.run(
            repeated,
            additional_forward_args=repeat_rows(extra, copies, n),
            gradient=True,
            attribute_to_layer_input=of_input,
            substitute={layers.modules[0]: without},
        )
        goals = repeat_rows(goal, copies, n) if isinstance(goal, Tensor) and goal.ndim else _repeated(goal, copies)
        gradient = full_precision(seen.gradients(_margin(seen.output, goals))[0]).detach()
    amount = excess(repeat_rows(plain.maps[0].detach(), copies, n))
    mean = torch.einsum("nhw,nchw->nc", amount, gradient).unflatten(0, (n, k, steps)).mean(2)  # (N, K, C)
    effects = torch.einsum("nkc,kc->nk", mean, vectors)
    others = torch.einsum("nkc,jc->nkj", mean, vectors).masked_fill(torch.eye(k, device=mean.device).bool(), -torch.inf)
    strongest = others.amax(2) if k > 1 else torch.full_like(effects, -torch.inf)
    p_values = torch.full_like(effects, torch.nan)
    if fitted.null_vectors is not None:
        null = torch.einsum("nkc,krc->nkr", mean, fitted.null_vectors.to(mean))
        r = null.shape[2]
        spread = null.square().mean(2).sqrt().clamp_min(1e-30)  # a direction is as good as its opposite
        ratio = (effects / spread / math.sqrt(1 + 1 / r)).tolist()
        p_values = effects.new_tensor([[t_tail(value, r) for value in row] for row in ratio])
    result = (margins, effects, p_values, strongest)
    return result if index is None else (*result, index)


def _margin(output: Tensor, target: Any) -> Tensor:
    """``(N,)`` target output minus the mean of the others."""
    chosen = select_output(output, target)
    if output.ndim != 2 or output.shape[1] < 2:
        return chosen
    return chosen - (output.sum(1) - chosen) / (output.shape[1] - 1)


def _repeated(target: Any, copies: int) -> Any:
    return [item for item in target for _ in range(copies)] if isinstance(target, list) else target


def explained_index(output: Any, target: Any) -> Tensor | None:
    """``(N,)`` index of the explained output, the highest if ``target`` is None; None for other shapes."""
    if not isinstance(output, Tensor) or output.ndim != 2:
        return None
    if target is None:
        return output.detach().argmax(1)
    if isinstance(target, list) and target and isinstance(target[0], tuple):
        target = [item[0] for item in target]
    try:
        index = torch.as_tensor(target, device=output.device).flatten()
    except (TypeError, ValueError, RuntimeError):
        return None  # select_output raises
    if index.is_floating_point() or index.dtype == torch.bool:
        return None
    index = index.long() % output.shape[1]
    return index.expand(output.shape[0]) if len(index) == 1 else index
