"""Layouts that read a layer's output as maps ``(N, C, h, w)``, for CNNs, ViTs, Swin, ConvNeXt and CLIP."""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from captum_concepts.errors import InputError, LayoutError

LAYOUTS = ("auto", "NCHW", "NHWC", "NLC", "LNC")
Grid = tuple[int, int]
Size = tuple[int, int]

MOST_PREFIX_TOKENS = 16  # a larger number is considered a wrong guess
# For models without such parameters: CLS, CLS and distillation, four registers with or without CLS.
USUAL_PREFIXES = frozenset({0, 1, 2, 4, 5})
_PREFIX_PARAMETER = re.compile(
    r"(^|\.)(cls|class|dist|distillation|reg|register|storage)_(token|embed|embedding)s?(_\d+)?$"
)
_POSITION_PARAMETER = re.compile(r"(^|\.)[a-z_]*pos[a-z]*_(embed|embedding|embeddings)(_\d+)?(\.weight)?$")


_REORDERING = re.compile(
    "unroll|reroll|window|shuffle|sort|randperm|permutation|gather|take_along|index_select|topk|scan|merg|hilbert|morton"
)
_HARMLESS_BUFFER = re.compile("position_id|num_batches_tracked|relative_")


@functools.cache
def _reorderings(kind: type[nn.Module]) -> str:
    """The names after a reordering in a module's class: the class, its methods, and names in ``forward``."""
    if kind.__module__.partition(".")[0] == "torch" or issubclass(kind, torch.jit.ScriptModule):
        return ""
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    names = [kind.__name__, *vars(kind), *(code.co_names if code is not None else ())]
    return " ".join(name for name in names if _REORDERING.search(name.lower()))


@dataclass(frozen=True)
class ModelTraits:
    """Traits of a model's modules and parameters that determine its grids.

    Args:
        patch_stride: stride of the patch embedding, the first image convolution, if kernel and stride are equal.
        prefix_parts: number of tokens of each of the CLS, distillation and register parameters.
        positions: lengths of the position embeddings.
        convolutional: the model has convolutions, and no layer norm, attention or permutation.
        volumetric: the model has 3-d convolutions, so its tokens may be cells of a volume or a video.
        reorders: the model's code names an operation that may change the order of tokens.
        unrolls: that operation is Hiera's.
    """

    patch_stride: Size | None = None
    prefix_parts: tuple[int, ...] = ()
    positions: frozenset[int] = frozenset()
    convolutional: bool = False
    volumetric: bool = False
    reorders: bool = False
    unrolls: bool = False

    @staticmethod
    def of(modules: Mapping[str, nn.Module]) -> ModelTraits:
        """The traits of all named modules of a model."""
        first: nn.Conv2d | None = None
        last_dimension = volumetric = False
        prefixes: dict[nn.Parameter, int] = {}
        positions = set()
        reorderings = ""
        for path, module in modules.items():
            kind = type(module)
            reorderings += _reorderings(kind)  # type: ignore[arg-type]
            if isinstance(module, nn.Conv2d):
                first = first or module
                if module.in_channels in (1, 3, 4) and first.in_channels not in (1, 3, 4):
                    first = module
            volumetric = volumetric or isinstance(module, nn.Conv3d)
            last_dimension = (
                last_dimension
                or isinstance(module, (nn.LayerNorm, nn.MultiheadAttention))
                or kind.__name__ in ("Permute", "Rearrange")
            )
            for name, p in module._parameters.items():
                if p is None or p.ndim == 0:
                    continue
                name = f"{path}.{name}"
                if _PREFIX_PARAMETER.search(name):
                    prefixes[p] = p.shape[-2] if p.ndim > 1 else 1
                if p.ndim > 1 and _POSITION_PARAMETER.search(name):
                    positions.add(p.shape[-2])
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_floating_point() and not _HARMLESS_BUFFER.search(name):
                    reorderings += name
        stride = None
        if first is not None and first.in_channels in (1, 3, 4) and first.kernel_size == first.stride:
            stride = (first.stride[0], first.stride[1]) if first.stride[0] > 1 else None
        return ModelTraits(
            stride,
            tuple([count for count in prefixes.values() if count <= MOST_PREFIX_TOKENS]),
            frozenset(positions),
            first is not None and not last_dimension,
            volumetric,
            bool(reorderings),
            "reroll" in reorderings.lower(),
        )


@dataclass(frozen=True)
class Layout:
    """The order of examples, channels and positions in a layer's output.

    Args:
        kind: ``"NCHW"``, ``"NHWC"``, ``"NLC"`` (batch-first tokens) or ``"LNC"`` (tokens first).
        grid: ``(h, w)`` rows and columns of positions.
        prefix_tokens: number of tokens before the grid (CLS, distillation, registers).

    Example:
        >>> tokens = torch.rand(2, 1 + 6, 8)
        >>> layout = Layout("NLC", (2, 3), 1)
        >>> layout.maps(tokens).shape, layout.prefix(tokens).shape
        (torch.Size([2, 8, 2, 3]), torch.Size([2, 1, 8]))
    """

    kind: str
    grid: tuple[int, int]
    prefix_tokens: int = 0

    def maps(self, output: Tensor) -> Tensor:
        """``(N, C, h, w)`` view of ``output`` without its prefix tokens."""
        if self.kind == "NCHW":
            return output
        if self.kind == "NHWC":
            return output.permute(0, 3, 1, 2)
        tokens = output.transpose(0, 1) if self.kind == "LNC" else output
        return tokens[:, self.prefix_tokens :].transpose(1, 2).unflatten(2, self.grid)

    def prefix(self, output: Tensor) -> Tensor:
        """``(N, P, C)`` prefix tokens; P is 0 for layouts without tokens."""
        if self.kind in ("NCHW", "NHWC"):
            return self.maps(output).flatten(2).transpose(1, 2)[:, :0]
        tokens = output.transpose(0, 1) if self.kind == "LNC" else output
        return tokens[:, : self.prefix_tokens]


def check_prefix_tokens(prefix_tokens: Any) -> None:
    """Raise unless ``prefix_tokens`` is None or a number of tokens.

    >>> check_prefix_tokens(1.5)
    Traceback (most recent call last):
    ...
    captum_concepts.errors.InputError: prefix_tokens must be 0 or more, as an integer, or None, got 1.5
    """
    whole = isinstance(prefix_tokens, Integral) and not isinstance(prefix_tokens, bool)
    if prefix_tokens is not None and not (whole and int(prefix_tokens) >= 0):
        raise InputError(f"prefix_tokens must be 0 or more, as an integer, or None, got {prefix_tokens!r}")


def infer_layout(
    output: Tensor,
    batch: int,
    image_size: tuple[int, int] | None,
    *,
    layout: str = "auto",
    prefix_tokens: int | None = None,
    module: nn.Module | None = None,
    model: nn.Module | ModelTraits | None = None,
    name: str = "",
) -> Layout:
    """The layout of a layer's output, inferred from its shape, the input's size and the layer's type.

    Args:
        output: the layer's output.
        batch: the number of examples N in it.
        image_size: ``(H, W)`` of the images; None if the inputs are not images. Then ``layout`` is required, and tokens
            are rejected, because a square number of tokens need not be a square grid.
        layout: one of :data:`LAYOUTS`; anything but ``"auto"`` is used as passed.
        prefix_tokens: number of tokens before the grid; None infers it.
        module: the layer, whose type decides if sizes alone do not.
        model: the model (or its traits), whose patch embedding and CLS, distillation and register tokens determine the
            token grid.
        name: name of the layer in error messages.

    Raises:
        LayoutError: there is no grid, or more than one layout fits; the message shows the shape and the keyword.
    """
    if layout not in LAYOUTS:
        raise InputError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    if prefix_tokens is not None and prefix_tokens < 0:
        raise InputError(f"prefix_tokens must be 0 or more, as an integer, or None, got {prefix_tokens!r}")
    shape = tuple(output.shape)
    layer = f"layer {name!r}" if name else "the layer"
    if isinstance(model, nn.Module):
        model = ModelTraits.of(dict(model.named_modules()))
    traits = model or ModelTraits()
    if not output.is_floating_point():
        raise LayoutError(f"{layer} returns {output.dtype}; choose a layer with floating-point activations")
    if image_size is None and (layout == "auto" or output.ndim == 3):
        raise LayoutError(
            f"{layer} returns {shape}, which cannot be read as a grid of image positions, because the inputs are not "
            "images (N, C, H, W) of one size"
        )
    if output.ndim == 4:
        if batch != shape[0]:
            raise LayoutError(
                f"{layer} returns {shape} for {batch} examples: its first dimension is not the batch (a layer inside "
                "windowed attention?); choose the block around it"
            )
        kind = layout if layout != "auto" else _image_kind(output, image_size, module, traits, layer)
        if kind not in ("NCHW", "NHWC"):
            raise LayoutError(
                f"{layer} returns {shape}, which has four dimensions; layout={kind!r} is for three (tokens)"
            )
        return Layout(kind, (shape[2], shape[3]) if kind == "NCHW" else (shape[1], shape[2]))
    if output.ndim == 3:
        kind = layout if layout != "auto" else _token_kind(shape, batch, module, layer)
        if kind not in ("NLC", "LNC"):
            raise LayoutError(
                f"{layer} returns {shape}, which has three dimensions; layout={kind!r} is for four (images)"
            )
        if shape[0 if kind == "NLC" else 1] != batch:
            raise LayoutError(
                f"{layer} returns {shape}, which, read as {kind}, is not a batch of {batch} examples; choose the "
                "block around a windowed attention, or pass another layout="
            )
        if traits.volumetric:
            raise LayoutError(
                f"{layer} returns {shape}, the tokens of a model with 3-d convolutions: they may be cells of a volume "
                "or a video, which are not a 2-d grid"
            )
        length = shape[1 if kind == "NLC" else 0]
        grid, prefix = token_grid(length, image_size, prefix_tokens, traits, layer, shape)
        if layout == "auto" and kind == "NLC" and _may_be_channels_first(shape, image_size, module, traits):
            raise LayoutError(
                f"{layer} returns {shape}, which may be channels first (N, C, L) as well as tokens (N, L, C); choose "
                "the layer before it is flattened, or pass layout='NLC' if these are tokens"
            )
        return Layout(kind, grid, prefix)
    raise LayoutError(
        f"{layer} returns {shape}, which is not a grid of positions; choose a layer before pooling that returns (N, "
        "C, h, w), (N, h, w, C) or tokens (N, L, C)"
    )


def _may_be_channels_first(
    shape: tuple[int, ...], image_size: Size | None, module: nn.Module | None, traits: ModelTraits
) -> bool:
    """Whether the last dimension of ``(N, L, C)`` may equally be the positions, as in a flattened (N, C, h * w)."""
    if module is None:
        return False
    for leaf in reversed(list(module.modules())):
        if isinstance(leaf, (nn.Conv1d, nn.ConvTranspose1d)):
            return leaf.out_channels == shape[1]
        if isinstance(leaf, (nn.BatchNorm1d, nn.InstanceNorm1d)):
            return leaf.num_features == shape[1]
        if any(p.ndim < 3 and p.shape[:1] == shape[2:] for p in leaf.parameters(recurse=False)):
            return False  # a linear map to, or a norm of, the last dimension
    tokens, _ = token_grids(shape[1], image_size, None, traits)
    channels, fits = token_grids(shape[2], image_size, 0, traits)
    return bool(fits) and channels <= tokens


def _misfit(h: int, w: int, image_size: tuple[int, int] | None) -> float:
    """Distance, in cells, of an h x w grid from one of the image with a single stride; infinite if too large."""
    if image_size is None:
        return math.inf
    height, width = image_size
    off = max(abs(w - width * h / height), abs(h - height * w / width))
    # Rounding and unpadded borders cost about a cell, slightly more on fine grids.
    allowed = 1.0 + max(h, w) / 80
    return off if off <= allowed and h <= height + 2 and w <= width + 2 else math.inf


def _image_kind(
    output: Tensor, image_size: tuple[int, int] | None, module: nn.Module | None, traits: ModelTraits, layer: str
) -> str:
    shape = tuple(output.shape)
    _, a, b, c = shape
    hint = _channel_hint(module)
    if hint == ("NCHW", a) and (_is_leaf(module) or _is_dense(output)):
        return "NCHW"
    if hint == ("NHWC", c) and _misfit(a, b, image_size) < math.inf:
        return "NHWC"
    if b == c and _is_attention(output):
        raise LayoutError(f"{layer} returns {shape}, attention weights between tokens; choose the block around it")
    grids = {"NCHW": (b, c), "NHWC": (a, b)}
    fits = [kind for kind, grid in grids.items() if _misfit(*grid, image_size) < math.inf]
    if len(fits) > 1 and traits.patch_stride is not None and image_size is not None:
        known = set().union(*pyramid(image_size, traits.patch_stride))
        fits = [kind for kind in fits if grids[kind] in known] or fits
    if len(fits) > 1 and traits.convolutional:
        return "NCHW"
    if len(fits) == 1:
        return fits[0]
    fit = "fits channels first and channels last" if fits else f"fits no grid of the input {image_size}"
    raise LayoutError(f"{layer} returns {shape}, which {fit}; pass layout='NCHW' or layout='NHWC'")


def _channel_hint(module: nn.Module | None) -> tuple[str, int] | None:
    """Layout and channel count of ``module``'s output, if all its typed leaves agree on the layout."""
    first: list[int] = []
    last: list[int] = []
    for leaf in module.modules() if module is not None else ():
        if isinstance(leaf, (nn.Conv2d, nn.ConvTranspose2d)):
            first.append(leaf.out_channels)
        elif isinstance(leaf, (nn.BatchNorm2d, nn.InstanceNorm2d)):
            first.append(leaf.num_features)
        elif isinstance(leaf, nn.GroupNorm):
            first.append(leaf.num_channels)
        elif isinstance(leaf, nn.LayerNorm):
            (first if _is_norm_2d(leaf) else last).append(leaf.normalized_shape[-1])
        elif isinstance(leaf, nn.Linear):
            last.append(leaf.out_features)
    if bool(first) == bool(last):
        return None
    return ("NCHW", first[-1]) if first else ("NHWC", last[-1])


def _is_norm_2d(norm: nn.LayerNorm) -> bool:
    """Whether it is ConvNeXt's LayerNorm over the channels of (N, C, h, w) (torchvision, timm, transformers)."""
    return type(norm).__name__.endswith("2d") or getattr(norm, "data_format", "") == "channels_first"


def _is_leaf(module: nn.Module | None) -> bool:
    return module is not None and next(module.children(), None) is None


def _is_dense(output: Tensor) -> bool:
    """Whether it is not a permuted view, which a module of convolutions may end with."""
    return output.is_contiguous() or output.is_contiguous(memory_format=torch.channels_last)


def _is_attention(output: Tensor) -> bool:
    rows = output.detach().float()
    return bool((rows >= 0).all()) and bool(((rows.sum(-1) - 1).abs() < 0.02).all())


def _token_kind(shape: tuple[int, ...], batch: int, module: nn.Module | None, layer: str) -> str:
    first, second = shape[0] == batch, shape[1] == batch
    if first and second:
        # torch's transformer layers specify which dimension is the batch.
        part = module.layers[0].self_attn if isinstance(module, nn.TransformerEncoder) else module
        flag = getattr(part, "batch_first", getattr(getattr(part, "self_attn", None), "batch_first", None))
        if isinstance(part, (nn.MultiheadAttention, nn.TransformerEncoderLayer)) and isinstance(flag, bool):
            return "NLC" if flag else "LNC"
        raise LayoutError(
            f"{layer} returns {shape} for {batch} examples, which fits both batch first and tokens first; pass "
            "layout='NLC' or layout='LNC'"
        )
    if first or second:
        return "NLC" if first else "LNC"
    raise LayoutError(
        f"{layer} returns {shape} for {batch} examples: no dimension is the batch (a layer inside windowed "
        "attention?); choose the block around it"
    )


def token_grid(
    length: int,
    image_size: tuple[int, int] | None,
    prefix_tokens: int | None,
    traits: ModelTraits,
    layer: str,
    shape: tuple[int, ...],
) -> tuple[tuple[int, int], int]:
    """``((h, w), prefix)`` for a sequence of ``length`` tokens."""
    _, fits = token_grids(length, image_size, prefix_tokens, traits)
    if len(fits) == 1:
        h, w = fits.pop()
        return (h, w), length - h * w
    why = "no grid fits" if not fits else f"several grids fit ({sorted(fits)})"
    stride = traits.patch_stride
    patches = f" in patches of {stride[0]} x {stride[1]}" if stride is not None else ""
    with_prefix = "any usual number of" if prefix_tokens is None else str(prefix_tokens)
    raise LayoutError(
        f"{layer} returns {shape}: {length} tokens for an input of size {image_size}{patches}, and {why} with "
        f"{with_prefix} prefix tokens; pass prefix_tokens= (CLS, registers, ...), or choose a layer of image patches"
    )


def pyramid(image_size: Size, stride: Size) -> list[set[Grid]]:
    """The grids of the model's patches and of repeated halvings, rounded down or up at the border."""
    height, width = image_size[0] / stride[0], image_size[1] / stride[1]
    levels = [{(math.floor(height), math.floor(width)), (math.ceil(height), math.ceil(width))}]
    while any(min(grid) > 1 for grid in levels[-1]):
        levels.append(
            {(cut(h / 2), cut(w / 2)) for h, w in levels[-1] if min(h, w) > 1 for cut in (math.floor, math.ceil)}
        )
    return levels


def token_grids(
    length: int, image_size: Size | None, prefix_tokens: int | None, traits: ModelTraits
) -> tuple[int, set[Grid]]:
    """The rank of the best evidence that fits any grid of ``length`` tokens, and the grids that fit it.

    The best evidence (0) is the stride of the model's patches and the number of its prefix tokens, followed by a
    halving of that grid (1) and any stride (2). A sequence that does not match the model (pruned or merged tokens,
    text, latents) has no grid, even if its length is a square number.
    """
    for evidence, grids, prefixes in _attempts(length, image_size, prefix_tokens, traits):
        fits = {(h, w) for h, w in grids if h * w > 1 and length - h * w in prefixes}
        if fits:
            return evidence, fits
    return 3, set()


def _attempts(
    length: int, image_size: Size | None, prefix_tokens: int | None, traits: ModelTraits
) -> Iterator[tuple[int, set[Grid], set[int] | frozenset[int]]]:
    if image_size is None:
        return
    parts = traits.prefix_parts if prefix_tokens is None else (prefix_tokens,)
    own = [{sum(parts)}] if prefix_tokens is not None else [{sum(parts)}, _subset_sums(parts)]
    if traits.patch_stride is not None:
        first, *halved = pyramid(image_size, traits.patch_stride)
        levels = (first, set().union(*halved))
        yield 0, first, own[0]
        whole = _is_whole_sequence(length, sum(parts), traits)
        side = math.isqrt(max(length - sum(parts), 0))
        if whole and side > 1:  # the model resizes images of any size to a square
            yield 1, {(side, side)}, own[0]
        yield from ((level, grids, prefixes) for level, grids in enumerate(levels) for prefixes in own)
        if prefix_tokens is None:
            yield 1, first, set(range(MOST_PREFIX_TOKENS + 1))
            if not whole:
                return
    anywhere = list(_any_stride(image_size))
    if parts:
        yield from ((2, grids, prefixes) for grids in anywhere for prefixes in own)
    if prefix_tokens is None:
        yield from ((2, grids, USUAL_PREFIXES) for grids in anywhere)


def _any_stride(image_size: Size) -> Iterator[set[Grid]]:
    """Grids of one stride: first strides that divide the image, then rounded ones, then rounded per dimension."""
    height, width = image_size
    strides = range(1, max(image_size) + 1)
    cuts = (math.floor, math.ceil)
    yield {(height // s, width // s) for s in strides if height % s == 0 and width % s == 0}
    yield {(cut(height / s), cut(width / s)) for s in strides for cut in cuts}
    if height != width:
        yield {(one(height / s), other(width / s)) for s in strides for one in cuts for other in cuts}


def _subset_sums(parts: tuple[int, ...]) -> set[int]:
    sums = {0}
    for part in parts:
        sums |= {total + part for total in sums}
    return sums


def _is_whole_sequence(length: int, prefix: int, traits: ModelTraits) -> bool:
    """Whether the model has as many position embeddings, so that no token is missing and it resizes its images."""
    return bool(traits.positions & {length, length - prefix})
