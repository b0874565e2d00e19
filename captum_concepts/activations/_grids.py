"""Which grid of positions a sequence of tokens is, from what the model itself tells about its patches and prefix."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from torch import nn

Grid = tuple[int, int]
Size = tuple[int, int]

MOST_PREFIX_TOKENS = 16  # more than that is taken for a wrong guess
# Where the model does not tell: CLS, CLS and distillation, four registers with or without CLS.
USUAL_PREFIXES = frozenset({0, 1, 2, 4, 5})
_PREFIX_PARAMETER = re.compile(
    r"(^|\.)(cls|class|dist|distillation|reg|register|storage)_(token|embed|embedding)s?(_\d+)?$"
)
_POSITION_PARAMETER = re.compile(r"(^|\.)[a-z_]*pos[a-z]*_(embed|embedding|embeddings)(_\d+)?$")


def patch_stride(model: nn.Module | None) -> Size | None:
    """The stride of the model's patch embedding: its first image convolution, if kernel and stride are equal."""
    for module in model.modules() if model is not None else ():
        if isinstance(module, nn.Conv2d) and module.in_channels in (1, 3, 4):
            if tuple(module.kernel_size) == tuple(module.stride) and module.stride[0] > 1:
                return module.stride[0], module.stride[1]
            return None
    return None


def prefix_parts(model: nn.Module | None) -> tuple[int, ...]:
    """How many tokens each of the model's CLS, distillation and register parameters holds."""
    named = model.named_parameters() if model is not None else ()
    counts = [p.shape[-2] if p.ndim > 1 else 1 for name, p in named if _PREFIX_PARAMETER.search(name)]
    return tuple(count for count in counts if count <= MOST_PREFIX_TOKENS)


def pyramid(image_size: Size, stride: Size) -> list[set[Grid]]:
    """The grid of the model's patches, and what halving it makes of it; cut off or padded at the border."""
    height, width = image_size[0] / stride[0], image_size[1] / stride[1]
    levels = [{(math.floor(height), math.floor(width)), (math.ceil(height), math.ceil(width))}]
    while any(min(grid) > 1 for grid in levels[-1]):
        levels.append(
            {(cut(h / 2), cut(w / 2)) for h, w in levels[-1] if min(h, w) > 1 for cut in (math.floor, math.ceil)}
        )
    return levels


def token_grids(length: int, image_size: Size | None, prefix_tokens: int | None, model: nn.Module | None) -> set[Grid]:
    """The grids that ``length`` tokens can be, by the surest evidence that fits any; none, one or several.

    The surest is the model's own: the stride of its patches and the number of its prefix tokens. A sequence that does
    not fit it (pruned or merged tokens, text, latents) is no grid, even if its length happens to be a square.
    """
    for grids, prefixes in _attempts(length, image_size, prefix_tokens, model):
        fits = {(h, w) for h, w in grids if h * w > 1 and length - h * w in prefixes}
        if fits:
            return fits
    return set()


def _attempts(
    length: int, image_size: Size | None, prefix_tokens: int | None, model: nn.Module | None
) -> Iterator[tuple[set[Grid], set[int] | frozenset[int]]]:
    parts = prefix_parts(model) if prefix_tokens is None else (prefix_tokens,)
    own = [{sum(parts)}] if prefix_tokens is not None else [{sum(parts)}, _subset_sums(parts)]
    stride = patch_stride(model)
    if image_size is None:
        anywhere = [{(side, side) for side in range(2, math.isqrt(length) + 1)}]
    else:
        anywhere = list(_any_stride(image_size))
        if stride is not None:
            first, *halved = pyramid(image_size, stride)
            smaller = set().union(*halved)
            yield from ((grids, prefixes) for grids in (first, smaller) for prefixes in own)
            if prefix_tokens is None:
                yield first, set(range(MOST_PREFIX_TOKENS + 1))
                if not _is_whole_sequence(length, sum(parts), model):
                    return
    if parts:
        yield from ((grids, prefixes) for grids in anywhere for prefixes in own)
    if prefix_tokens is None:
        yield from ((grids, USUAL_PREFIXES) for grids in anywhere)


def _any_stride(image_size: Size) -> Iterator[set[Grid]]:
    """Grids of one stride: first strides that divide the image, then rounded, then rounded differently each way."""
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


def _is_whole_sequence(length: int, prefix: int, model: nn.Module | None) -> bool:
    """Whether the model has as many position embeddings: then no token is missing, the model resizes its images."""
    named = model.named_parameters() if model is not None else ()
    lengths = {p.shape[-2] for name, p in named if p.ndim > 1 and _POSITION_PARAMETER.search(name)}
    return bool(lengths & {length, length - prefix})
