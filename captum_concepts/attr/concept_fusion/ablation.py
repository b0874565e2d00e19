"""Channels of a layer taken away one after another: in the translator (relevance), in the classifier (contribution)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from captum_concepts._captum import select_output
from captum_concepts.activations import Layout, capture
from captum_concepts.activations.capture import Inputs, Layer
from captum_concepts.activations.spatial import full_precision
from captum_concepts.attr.concept_fusion.gradients import TextSpace
from captum_concepts.errors import LayerError
from captum_concepts.models.concept_translator.network import ConceptTranslator

FILLS = ("layer_mean", "channel_mean", "zero")
PUBLISHED = 20  # K, in networks whose layers have hundreds of channels
SHARE = 0.25  # of a layer's channels, where that is fewer


def rank_channels(beta: Tensor, pooled: Tensor, count: int, share: float = 1.0) -> Tensor:
    """``(N, J, K)``: the channels of largest ``beta_k * z_k``, strongest first.

    K is ``count``, but at most ``share`` of the channels there are, and at least one.
    """
    order = (beta * pooled.unsqueeze(1)).argsort(dim=-1, descending=True, stable=True)
    return order[..., : min(count, max(1, int(share * beta.shape[-1])))]


def relative_drop(before: Tensor, after: Tensor) -> Tensor:
    """``(p_0 - p_i) / p_0`` from logarithms, which also holds where p_0 underflows; bounded below by -exp(80)."""
    return -torch.expm1((after - before).clamp(max=80.0))


@torch.no_grad()
def layer_relevance(
    translator: nn.Module,
    pooled: Sequence[Tensor],
    betas: Sequence[Tensor],
    space: TextSpace,
    index: Tensor,
    n_channels: int,
    share: float = 1.0,
) -> Tensor:
    """``(N, J, L)``: mean relative drop of the concept's probability over 1..K masked channels of each layer.

    Args:
        pooled: ``(N, C_l)`` each.
        betas: ``(N, J, C_l)`` each.
        index: ``(N, J)`` the concepts.
        n_channels, share: see :func:`rank_channels`.
    """
    columns = []
    start = 0
    whole = [z.unsqueeze(1) for z in pooled]
    for layer, (z, beta) in enumerate(zip(pooled, betas, strict=True)):
        ranked = rank_channels(beta, z, n_channels, share)
        mean = z.mean(1)
        if isinstance(translator, ConceptTranslator):
            linear = translator.first
            hidden = linear(translator.concatenate(list(pooled)))
            drop = z.unsqueeze(1).expand(-1, beta.shape[1], -1).gather(-1, ranked) - mean[:, None, None]
            # Masking k channels is a rank-k change of the first Linear's output: its cumulative sum, not k forwards.
            change = linear.weight.T[start + ranked] * drop.unsqueeze(-1).to(linear.weight)
            masked = translator.after_first(hidden[:, None, None] - change.cumsum(2))
            base = translator.after_first(hidden)
        else:
            base = translator(list(pooled))
            masked = _masked_forward(translator, whole, layer, ranked, mean)
        start += z.shape[1]
        _, j, k = ranked.shape
        before = space.log_probability(base.unsqueeze(1).expand(-1, j, -1), index)
        after = space.log_probability(masked, index.unsqueeze(-1).expand(-1, -1, k))
        columns.append(relative_drop(before.unsqueeze(-1), after).mean(-1))
    return torch.stack(columns, -1)


def _masked_forward(translator: nn.Module, whole: Sequence[Tensor], layer: int, ranked: Tensor, mean: Tensor) -> Tensor:
    """``(N, J, K, D)`` of any translator, by running it on the masked inputs themselves."""
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


@torch.no_grad()
def contribution_curves(
    forward_func: Callable[..., Any],
    inputs: Inputs,
    extra: Any,
    layer: Layer,
    layout: Layout,
    name: str,
    pooled: Tensor,
    ranked: Tensor,
    target: int,
    base: Tensor,
    *,
    fill: str,
    rows: int,
) -> Tensor:
    """``(J, K)`` relative drops of the target's probability for ONE example.

    The ablated copies enter at the layer, inside its hook, so that the network in front of it runs once.
    Layers on other paths (a skip connection) still hold one row, which broadcasts; where the model does not
    stand that, the input is repeated instead.

    Args:
        inputs, extra: of this example, batch size 1.
        pooled: ``(C,)``.
        ranked: ``(J, K)`` the channels to take away, strongest first.
        base: ``(1, classes)`` the unchanged output.
        rows: copies in one forward.

    Raises:
        LayerError: the output does not depend on the layer.
    """
    channels = pooled.shape[0]
    value = {"layer_mean": pooled.mean().expand(channels), "channel_mean": pooled, "zero": torch.zeros_like(pooled)}
    axes = {"NCHW": (-1, channels, 1, 1), "NHWC": (-1, 1, 1, channels), "NLC": (-1, 1, channels)}
    shape = axes.get(layout.kind, (1, -1, channels))
    filled = value[fill].reshape([1 if size == -1 else size for size in shape])
    masks = cumulative_masks(ranked, channels).flatten(0, 1)
    before = log_probability(base, target)
    curves = []
    moved = changed = False
    for part in masks.split(max(rows - 1, 1)):
        # The first copy stays unchanged: it tells whether the expansion is sound.
        mask = torch.cat([torch.zeros_like(part[:1]), part]).reshape(shape)

        def ablate(raw: Tensor, mask: Tensor = mask) -> Tensor:
            nonlocal changed
            # Prefix tokens (CLS) hold the same channels: without them a channel would not be gone.
            new = torch.where(mask, filled.to(raw), raw)
            changed = changed or not torch.equal(new, raw.expand_as(new))
            return new

        output = _expanded(forward_func, inputs, extra, layer, ablate, base, len(part) + 1)
        moved = moved or not torch.equal(output[1:], output[:1].expand_as(output[1:]))
        curves.append(log_probability(output[1:], target))
    if changed and not moved:
        raise LayerError(
            f"taking away channels of layer {name!r} does not change the model's output, so a contribution there would "
            "be zero without meaning; choose a layer on the way to the output"
        )
    return relative_drop(before, torch.cat(curves)).reshape(ranked.shape)


def log_probability(output: Tensor, target: int) -> Tensor:
    """``(N,)`` log of the softmax probability of class ``target``; of the sigmoid for a single output."""
    output = output.detach()
    output = full_precision(output)
    if output.ndim == 1 or output.shape[-1] == 1:
        return torch.nn.functional.logsigmoid(output.reshape(-1))
    return select_output(output.log_softmax(-1), target)


def _expanded(
    forward_func: Callable[..., Any],
    inputs: Inputs,
    extra: Any,
    layer: Layer,
    ablate: Callable[[Tensor], Tensor],
    base: Tensor,
    count: int,
) -> Tensor:
    try:
        output = _run(forward_func, inputs, extra, layer, ablate)
        if len(output) == count and _same(output[:1], base):
            return output
    except (RuntimeError, ValueError, IndexError):
        pass
    repeat = _repeat(inputs, count)
    return _run(forward_func, repeat, _repeat(extra, count), layer, ablate)


def _run(forward_func: Callable[..., Any], inputs: Any, extra: Any, layer: Layer, ablate: Any) -> Tensor:
    result = capture(forward_func, inputs, [], additional_forward_args=extra, substitute={layer: ablate})
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


def take_rows(value: Any, start: int, stop: int, batch: int) -> Any:
    """The rows ``start`` to ``stop`` of every tensor that has one row for each of ``batch`` examples."""
    if isinstance(value, tuple):
        return tuple(take_rows(item, start, stop, batch) for item in value)
    if isinstance(value, Tensor) and value.ndim and value.shape[0] == batch:
        return value[start:stop]
    return value
