"""Cumulative channel ablation, in the translator (relevance) and in the classifier (contribution)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_concepts.activations import Inputs, Layers, Layout, full_precision, gradients_enabled
from captum_concepts.attr.concept_fusion.words import TextBank, log_softmax_at
from captum_concepts.errors import InputError, InputWarning, LayerError
from captum_concepts.models.concept_translator import ConceptTranslator

FILLS = ("layer_mean", "channel_mean", "zero")
CLASS_PROBABILITIES = ("auto", "softmax", "sigmoid")
PUBLISHED = 20  # K of the paper, for networks whose layers have hundreds of channels
SHARE = 0.25  # maximum fraction of a layer's channels
_LIKELY = 0.5  # outputs in [0, 1] below this may be logits of an untrained network


def rank_channels(beta: Tensor, pooled: Tensor, count: int, share: float = 1.0) -> Tensor:
    """``(N, J, K)`` channels of largest ``beta_k * z_k``, strongest first.

    K is ``count``, but at most the fraction ``share`` of the channels, and at least one.
    """
    order = (beta * pooled.unsqueeze(1)).argsort(dim=-1, descending=True, stable=True)
    return order[..., : min(count, max(1, int(share * beta.shape[-1])))]


def relative_drop(before: Tensor, after: Tensor) -> Tensor:
    """``(p_0 - p_i) / p_0`` from logarithms, valid also where p_0 underflows, and bounded below by -exp(80)."""
    return -torch.expm1((after - before).clamp(max=80.0))


@torch.no_grad()
def layer_relevance(
    translator: nn.Module, pooled: Sequence[Tensor], ranked: Sequence[Tensor], bank: TextBank, index: Tensor
) -> Tensor:
    """``(N, J, L)`` mean relative drop of the concept's probability over 1..K ablated channels of each layer.

    Args:
        pooled: ``(N, C_l)`` per layer.
        ranked: ``(N, J, K_l)`` channels to ablate per layer, see :func:`rank_channels`.
        index: ``(N, J)`` concepts.
    """
    columns = []
    start = 0
    whole = [z.unsqueeze(1) for z in pooled]
    for layer, (z, order) in enumerate(zip(pooled, ranked, strict=True)):
        _, j, k = order.shape
        mean = z.mean(1)
        if isinstance(translator, ConceptTranslator):
            linear = translator.first
            hidden = linear(translator.concatenate(list(pooled)))
            drop = z.unsqueeze(1).expand(-1, j, -1).gather(-1, order) - mean[:, None, None]
            # Masking k channels is a rank-k change of the first Linear's output, so a cumulative sum replaces k passes.
            change = linear.weight.T[start + order] * drop.unsqueeze(-1).to(linear.weight)
            masked = translator.after_first(hidden[:, None, None] - change.cumsum(2))
            base = translator.after_first(hidden)
        else:
            base = translator(list(pooled))
            masked = _masked_forward(translator, whole, layer, order, mean)
        start += z.shape[1]
        before = bank.log_probability(base.unsqueeze(1).expand(-1, j, -1), index)
        after = bank.log_probability(masked, index.unsqueeze(-1).expand(-1, -1, k))
        columns.append(relative_drop(before.unsqueeze(-1), after).mean(-1).to(z))
    return torch.stack(columns, -1)


def _masked_forward(translator: nn.Module, whole: Sequence[Tensor], layer: int, ranked: Tensor, mean: Tensor) -> Tensor:
    """``(N, J, K, D)`` outputs of any translator on the masked inputs."""
    n, j, k = ranked.shape
    gone = cumulative_masks(ranked, whole[layer].shape[-1])
    rows = []
    for number, z in enumerate(whole):
        z = z.unsqueeze(1).expand(n, j, k, -1)
        if number == layer:
            z = torch.where(gone, mean[:, None, None, None], z)
        rows.append(z.reshape(n * j * k, -1))
    return translator(rows).reshape(n, j, k, -1)


def cumulative_masks(ranked: Tensor, channels: int) -> Tensor:
    """``(..., K, C)`` booleans: row i masks the first i + 1 of the ranked channels."""
    single = torch.nn.functional.one_hot(ranked, channels)
    return single.cumsum(-2) > 0


def class_link(requested: str, output: Any, final: str | None) -> str:
    """The link from the classifier's output to probabilities: ``"softmax"``, ``"sigmoid"``, or ``"none"`` (identity).

    Args:
        requested: ``"softmax"`` or ``"sigmoid"`` of the logits. ``"auto"`` uses the one that the classifier ends in,
            otherwise the sigmoid of a single output and the softmax of several, unless they are probabilities already.
        output: of the classifier, before ``final``.
        final: the softmax or sigmoid that the classifier ends in, if any.

    Raises:
        InputError: the output is not ``(N, classes)``.

    Warns:
        InputWarning: several outputs look like probabilities of independent labels.
    """
    if not isinstance(output, Tensor) or output.ndim not in (1, 2):
        what = f"a tensor {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise InputError(f"contributions need logits (N, classes) from forward_func, got {what}")
    if requested != "auto":
        return requested
    if final is not None:
        return final
    if output.ndim == 1 or output.shape[1] == 1:
        return "sigmoid"
    values = full_precision(output.detach())
    values = values[values.isfinite().all(1)]  # the rest decides nothing about other images
    if bool(((values >= 0) & (values <= 1)).all()) and len(values):
        rounding = 4 * torch.finfo(output.dtype).eps if output.is_floating_point() else 0.0
        if bool(((values.sum(1) - 1).abs() < max(1e-3, rounding)).all()):
            return "none"
        if values.max() < _LIKELY:
            return "softmax"
        warnings.warn(
            "the classifier's outputs lie in [0, 1] but do not sum to 1, as probabilities of independent labels do, "
            "so contributions apply a softmax to them. Pass a forward_func that returns logits, and "
            "class_probability='softmax' or 'sigmoid'",
            InputWarning,
            stacklevel=2,
        )
    return "softmax"


def class_log_probability(output: Tensor, target: int, link: str) -> Tensor:
    """``(N,)`` log probability of class ``target``, accurate also for probabilities near 1."""
    output = full_precision(output.detach())
    output = output.unsqueeze(1) if output.ndim == 1 else output
    if link == "softmax":
        return log_softmax_at(output, torch.full((len(output),), target, device=output.device))
    value = output[:, target]
    return F.logsigmoid(value) if link == "sigmoid" else value.log()


@torch.no_grad()
def contribution_curves(
    layer: Layers,
    layout: Layout,
    inputs: Inputs,
    extra: Any,
    pooled: Tensor,
    ranked: Tensor,
    target: int,
    base: Tensor,
    *,
    link: str,
    fill: str,
    rows: int,
) -> Tensor:
    """``(J, K)`` relative drops of the target's probability for one example.

    The ablated copies enter at the layer, inside its hook, so the network upstream of it runs once. Layers on other
    paths (a skip connection) still have one row, which broadcasts; if the model does not support that, the input is
    repeated instead.

    Args:
        layer: the single layer.
        inputs, extra: of this example, batch size 1.
        pooled: ``(C,)``.
        ranked: ``(J, K)`` channels to ablate, strongest first.
        base: ``(1, classes)`` unchanged output.
        link: of :func:`class_link`.
        rows: copies per forward pass.

    Raises:
        LayerError: the output is not computed from the layer.

    Warns:
        InputWarning: the ablation does not change the output, or the class has probability 0 or NaN.
    """
    channels = pooled.shape[0]
    value = {"layer_mean": pooled.mean().expand(channels), "channel_mean": pooled, "zero": torch.zeros_like(pooled)}
    axes = {"NCHW": (-1, channels, 1, 1), "NHWC": (-1, 1, 1, channels), "NLC": (-1, 1, channels)}
    shape = axes.get(layout.kind, (1, -1, channels))
    filled = value[fill].reshape([1 if size == -1 else size for size in shape])
    masks = cumulative_masks(ranked, channels).flatten(0, 1)
    before = class_log_probability(base, target, link)
    if not before.isfinite().all():
        why = (
            f"the model's outputs for class {target} are NaN"
            if before.isnan().any()
            else f"the model's probability of class {target} is exactly 0, so a relative change of it is undefined "
            "(NaN); pass a forward_func that returns the logits before the final softmax or sigmoid"
        )
        warnings.warn(why, InputWarning, stacklevel=2)
        return torch.full(ranked.shape, torch.nan)
    curves = []
    moved = changed = False
    for part in masks.split(max(rows - 1, 1)):
        # The first copy stays unchanged, to verify the expansion.
        mask = torch.cat([torch.zeros_like(part[:1]), part]).reshape(shape)

        def ablate(raw: Tensor, mask: Tensor = mask) -> Tensor:
            nonlocal changed
            # Prefix tokens (CLS) contain the same channels, so they are ablated too.
            new = torch.where(mask, filled.to(raw), raw)
            changed = changed or not torch.equal(new, raw.expand_as(new))
            return new

        output = _expanded(layer, inputs, extra, ablate, base, len(part) + 1)
        # A channel's own mean keeps the pooled value up to rounding.
        least = 1e-5 * float(output.float().abs().max()) if fill == "channel_mean" else 0.0
        moved = moved or bool(((output[1:] - output[:1]).float().abs() > least).any())
        curves.append(class_log_probability(output[1:], target, link))
    if changed and not moved:
        name = layer.names[0]
        if fill == "channel_mean":
            why = (
                f"fill='channel_mean' keeps the pooled values of layer {name!r}, and the output depends on these "
                "alone, so contributions there are 0; use fill='layer_mean', or map_layer= an earlier layer"
            )
        elif _connected(layer, inputs, extra):
            why = (
                f"ablating channels of layer {name!r} does not change the model's output for an image (units after the "
                "layer are inactive or saturated), so its contributions are 0"
            )
        else:
            raise LayerError(
                f"ablating channels of layer {name!r} does not change the model's output, so contributions there would "
                "be meaningless zeros; choose a layer that the output depends on"
            )
        warnings.warn(why, InputWarning, stacklevel=2)
    return relative_drop(before, torch.cat(curves)).reshape(ranked.shape)


def _connected(layer: Layers, inputs: Inputs, extra: Any) -> bool:
    """Whether the output is computed from the layer, even if it does not change with it for this image."""
    try:
        with gradients_enabled():
            seen = layer.capture(inputs, additional_forward_args=extra, gradient=True, logits=True)
            output = seen.output.sum()
            return (
                output.requires_grad and torch.autograd.grad(output, seen.layers[0], allow_unused=True)[0] is not None
            )
    except (InputError, RuntimeError):
        return True  # unknown


def _expanded(
    layer: Layers, inputs: Inputs, extra: Any, ablate: Callable[[Tensor], Tensor], base: Tensor, count: int
) -> Tensor:
    try:
        output = _run(layer, inputs, extra, ablate)
        if len(output) == count and _same(output[:1], base):
            return output
    except (RuntimeError, ValueError, IndexError):
        pass
    return _run(layer, _repeat(inputs, count), _repeat(extra, count), ablate)


def _run(layer: Layers, inputs: Any, extra: Any, ablate: Any) -> Tensor:
    result = layer.capture(inputs, additional_forward_args=extra, substitute={layer.modules[0]: ablate}, logits=True)
    output: Tensor = result.output
    return output


def _same(row: Tensor, base: Tensor) -> bool:
    tolerance = 1e-3 if row.element_size() >= 4 else 3e-2
    scale = float(base.float().abs().max()) + 1e-6
    return row.shape == base.shape and bool(((row - base).float().abs().max() <= tolerance * scale).item())


def _repeat(value: Any, count: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_repeat(item, count) for item in value)
    if isinstance(value, Tensor) and value.ndim and value.shape[0] == 1:
        return value.expand(count, *value.shape[1:])
    return value
