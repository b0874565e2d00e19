"""Checks that tokens are in the assumed order, by a test of each layer for which this is not known."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from captum_concepts._checks import repeat_rows, take_rows
from captum_concepts._undo import warnings_filtered
from captum_concepts.activations.capture import Inputs, batch_size
from captum_concepts.activations.layout import Layout, pyramid
from captum_concepts.errors import InputError, InputWarning, LayoutError

if TYPE_CHECKING:
    from captum_concepts.activations.layers import Layers

#: Libraries whose tokens are in row-major order, after the prefix tokens that their parameters name.
_LIBRARIES = ("torchvision", "timm", "open_clip", "transformers", "captum_concepts")
# The layouts of each layer that passed the test, and whether they are of its input.
_ordered: weakref.WeakKeyDictionary[nn.Module, set[tuple[Layout, bool]]] = weakref.WeakKeyDictionary()


def check_order(
    layers: Layers,
    inputs: Inputs,
    layouts: Sequence[Layout],
    *,
    additional_forward_args: Any = None,
    attribute_to_layer_input: bool = False,
) -> None:
    """Raise if the tokens of a layer are not in the order of the image's rows; see :func:`misordered`.

    Raises:
        LayoutError: the tokens of a layer are in another order.
    """
    wrong = misordered(
        layers, inputs, layouts, additional_forward_args=additional_forward_args,
        attribute_to_layer_input=attribute_to_layer_input,
    )  # fmt: skip
    if wrong:
        raise LayoutError(next(iter(wrong.values())))


def misordered(
    layers: Layers,
    inputs: Inputs,
    layouts: Sequence[Layout],
    *,
    additional_forward_args: Any = None,
    attribute_to_layer_input: bool = False,
) -> dict[int, str]:
    """The layers whose tokens are not in the order of the image's rows, by index, each with its error message.

    Some models sort tokens into windows (Hiera's mask units, for example), by their scores, or at random. In others the
    class token is last, or columns come before rows. The test changes patches of the first image; the tokens that
    change most by far must be at or next to the same position. It costs one forward pass per grid, once, if the model's
    code names a reordering, if tokens are not the patches of the original images (the model resizes or crops them
    itself), or if the model is not from a known library.
    """
    images = [part for part in (inputs if isinstance(inputs, tuple) else (inputs,)) if part.ndim == 4]
    if len(images) != 1:
        return {}
    size = (images[0].shape[2], images[0].shape[3])
    batch = batch_size(inputs)
    grids: dict[tuple[int, int], list[int]] = {}
    for number, layout in enumerate(layouts):
        vouched = layout.kind in ("NCHW", "NHWC") or (
            _as_patches(layers, layout, size) and _by_a_library(layers, layers.names[number], size)
        )
        if vouched and not layers.traits.reorders:
            continue
        known = _ordered.setdefault(layers.modules[number], set())
        if layout.kind != "NCHW" and (layout, attribute_to_layer_input) not in known:
            grids.setdefault(layout.grid, []).append(number)
    wrong = {}
    for grid, numbers in grids.items():
        cells = _spread(grid)
        parts = repeat_rows(take_rows(inputs, slice(1), batch), len(cells) + 1, 1)
        parts = parts if isinstance(parts, tuple) else (parts,)
        parts = tuple(_changed(part, cells, grid) if part.ndim == 4 else part for part in parts)
        extra = repeat_rows(take_rows(additional_forward_args, slice(1), batch), len(cells) + 1, 1)
        try:
            with warnings_filtered("ignore", InputWarning):  # of the changed pixels' range
                seen = layers[numbers].capture(
                    parts, additional_forward_args=extra, attribute_to_layer_input=attribute_to_layer_input
                )
        except (InputError, RuntimeError):
            continue  # a model of one batch size
        for number, raw in zip(numbers, seen.layers, strict=True):
            try:
                maps = layouts[number].maps(raw).float()
            except RuntimeError:
                continue  # another number of tokens for another number of images: windows, not examples
            name, change = layers.names[number], (maps[1:] - maps[:1]).norm(dim=1)
            message = _disorder(name, change, cells, layers.traits.unrolls)
            if message is None and _as_patches(layers, layouts[number], size) and not _by_a_library(layers, name, size):
                message = _shift(name, change, cells)
            if message is None:
                _ordered[layers.modules[number]].add((layouts[number], attribute_to_layer_input))
            else:
                wrong[number] = message
    return wrong


def _as_patches(layers: Layers, layout: Layout, size: tuple[int, int]) -> bool:
    """Whether tokens look like the model's own prefix and the patches of images of ``size``, one token each."""
    if layout.kind in ("NCHW", "NHWC"):
        return False
    prefix = sum(layers.traits.prefix_parts) if layers.prefix_tokens is None else layers.prefix_tokens
    stride = layers.traits.patch_stride
    return stride is not None and layout.prefix_tokens == prefix and layout.grid in pyramid(size, stride)[0]


def _by_a_library(layers: Layers, name: str, size: tuple[int, int]) -> bool:
    """Whether a library's network computes the tokens of a layer.

    Code around it may resize images, which is only visible in the shape of images that are not square.
    """
    steps = name.split(".") if name else []
    for depth in range(len(steps) + 1):
        owner = (layers.named or {}).get(".".join(steps[:depth]))
        if owner is not None and type(owner).__module__.partition(".")[0] in _LIBRARIES:
            embeds = any(isinstance(m, nn.Conv2d) and m.in_channels in (1, 3, 4) for m in owner.modules())
            return embeds and (depth == 0 or size[0] == size[1])
    return False


def _disorder(name: str, change: Tensor, cells: Sequence[tuple[int, int]], unrolls: bool) -> str | None:
    """The error message for a layer whose maps change by ``change`` ``(K, h, w)`` for each of ``cells``, or None."""
    _, h, w = change.shape
    strays, hits = _strays(change, cells)
    if 2 * len(strays) > len(cells):
        return (
            f"the tokens of layer {name!r} are not in the order of the image's rows: a change of the image at "
            f"cell {strays[0][0]} of the {h} x {w} grid appears at {strays[0][1]}; choose a layer before they are "
            "reordered or after that is undone. A model that resizes or crops its images itself needs images of the "
            "size that it works on"
        )
    if unrolls and 2 * hits < len(cells):
        return (
            f"the tokens of layer {name!r} may not be in the order of the image's rows, in a model that "
            "unrolls them: no change of the image appears at one position; choose the block around it"
        )
    return None


def _shift(name: str, change: Tensor, cells: Sequence[tuple[int, int]]) -> str | None:
    """The error message for patches that are read some positions too early or too late, or None."""
    w = change.shape[2]
    places = [int(one.argmax()) - (i * w + j) for (i, j), one in zip(cells, change, strict=True)]
    shift, times = Counter(places).most_common(1)[0]
    if shift and times >= 3 and 2 * times >= len(cells):
        return (
            f"the tokens of layer {name!r} lie {abs(shift)} place{'s' * (abs(shift) > 1)} "
            f"{'before' if shift < 0 else 'after'} where they are read, in rows of {w}: its prefix tokens (class "
            "token, registers) do not stand before the patches, or are of another number. Pass prefix_tokens if only "
            "their number differs; tokens that stand after the patches or between them cannot be read, so choose a "
            "layer before they are joined"
        )
    return None


def _spread(grid: tuple[int, int]) -> list[tuple[int, int]]:
    """Up to six cells of a grid whose indices differ between row-major and other usual orders."""
    h, w = grid
    cells = [(0, w - 1), (h - 1, 0), (h // 2, w // 3), (h // 3, w // 2), (1 % h, w - 1), (h - 1, 1 % w)]
    return list(dict.fromkeys(cells))


def _changed(images: Tensor, cells: Sequence[tuple[int, int]], grid: tuple[int, int]) -> Tensor:
    """Copies of one image; in each but the first, the pixels of one cell are replaced by another pattern."""
    images = images.clone()
    scale = images[0].float().std().nan_to_num() + 0.1
    for copy, (i, j) in zip(images[1:], cells, strict=True):
        rows, columns = (
            slice(c * side // count, max((c + 1) * side // count, c * side // count + 1))
            for c, side, count in zip((i, j), copy.shape[1:], grid, strict=True)
        )
        copy[:, rows, columns] = copy[:, rows, columns].flip(1, 2) + 2 * scale.to(copy)
    return images


def _strays(
    change: Tensor, cells: Sequence[tuple[int, int]]
) -> tuple[list[tuple[tuple[int, int], tuple[int, int]]], int]:
    """The cells whose change ``(K, h, w)`` appears far from them, with its position, and the number of the others."""
    h, w = change.shape[1:]
    reach = 1 if min(h, w) > 3 else 0
    strays, hits = [], 0
    for (i, j), one in zip(cells, change, strict=True):
        near = torch.zeros(h, w, dtype=torch.bool, device=one.device)
        near[max(i - reach, 0) : i + reach + 1, max(j - reach, 0) : j + reach + 1] = True
        far = one.masked_fill(near, 0)
        if far.max() > 2 * one[near].max() and far.max() > 3 * one.median():
            strays.append(((i, j), divmod(int(far.argmax()), w)))
        hits += bool(one[near].max() > 1.2 * far.max())
    return strays, hits
