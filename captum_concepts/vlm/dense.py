"""`DenseRegions` embeds all grid cells in one forward pass; `AdaptiveRegions` draws visual prompts of some cells only.

As in MaskCLIP, a position's embedding is the output of the tower's own pooling for a feature map that contains the
features of that position only. For attention pooling this is the value path, for average pooling the projected feature.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_concepts._checks import integer, one_of
from captum_concepts.activations import hooked
from captum_concepts.errors import InputError, listing
from captum_concepts.vlm.region_prompt import RegionPrompt, check_grid

ATTENTIONS = ("value", "qq", "kk")
#: Number of (scaled) median absolute deviations above the median at which a position's norm makes it an outlier.
_OUTLIER = 5.0


@dataclass(frozen=True)
class DenseRegions:
    """The cells of a grid, embedded in one forward pass per image; can replace a :class:`RegionPrompt` anywhere.

    The encoder must have ``encode_regions(images, grid) -> (N, h*w, D)``, as
    :class:`~captum_concepts.vlm.OpenCLIPEncoder` does.

    Args:
        grid: rows and columns (h, w), or one number for both. The tower's positions are averaged to the grid, or
            interpolated if the grid is finer.
        attention: what a position of the last block attends to, for towers that read a class token (CLIP's ViT).
            ``"value"``: itself only (MaskCLIP); ``"qq"``, ``"kk"``: positions of similar queries (ClearCLIP) or keys
            (NACLIP). The residual connection and the MLP are omitted, as in ClearCLIP.
        remove_outliers: for these towers, replace positions of extreme norm, which carry global information like
            registers, by the mean of their neighbors before the last block.

    Raises:
        InputError: a value not listed above.

    Example:
        >>> from captum_concepts import demo
        >>> regions = DenseRegions((4, 4))
        >>> regions.encode(demo.load("clip"), torch.rand(2, 3, 64, 64)).shape
        torch.Size([2, 16, 128])

    References:
        Zhou et al., "Extract free dense labels from CLIP" (MaskCLIP), 2022; Lan et al., "ClearCLIP", 2024; Hajimiri et
        al., "Pay attention to your neighbours" (NACLIP), 2025; Darcet et al., "Vision transformers need registers",
        2024.
    """

    grid: tuple[int, int] = (7, 7)
    attention: str = "value"
    remove_outliers: bool = True

    def __init__(
        self, grid: int | Sequence[int] = (7, 7), *, attention: str = "value", remove_outliers: bool = True
    ) -> None:
        if not isinstance(remove_outliers, bool):
            raise InputError(f"remove_outliers must be True or False, got {remove_outliers!r}")
        object.__setattr__(self, "grid", check_grid(grid))
        object.__setattr__(self, "attention", one_of("attention", attention, ATTENTIONS))
        object.__setattr__(self, "remove_outliers", remove_outliers)

    @property
    def kind(self) -> str:
        """The string ``"dense"``."""
        return "dense"

    def __len__(self) -> int:
        """Number of cells, h*w."""
        return self.grid[0] * self.grid[1]

    def as_dict(self) -> dict[str, Any]:
        """The arguments, as JSON keeps them; :func:`regions_from_dict` reads them back."""
        return {"kind": self.kind, **dataclasses.asdict(self), "grid": list(self.grid)}

    def encode(self, encoder: Any, images: Tensor) -> Tensor:
        """The embeddings of all cells from ``encoder.encode_regions``.

        Returns:
            ``(N, h*w, D)``, cells in row-major order, not normalized.

        Raises:
            InputError: the encoder has no ``encode_regions``, or it returns another shape.
        """
        if not callable(getattr(encoder, "encode_regions", None)):
            raise InputError(
                f"DenseRegions requires an encoder with encode_regions(images, grid), which {type(encoder).__name__} "
                "does not have; use RegionPrompt('crop'), which works with every encoder"
            )
        changed: dict[str, Any] = {} if self.attention == "value" else {"attention": self.attention}
        if not self.remove_outliers:
            changed["remove_outliers"] = False
        found = encoder.encode_regions(images, self.grid, **changed)
        if not isinstance(found, Tensor) or found.ndim != 3 or found.shape[:2] != (len(images), len(self)):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise InputError(f"encoder.encode_regions must return ({len(images)}, {len(self)}, D), got {shape}")
        return found


@dataclass(frozen=True)
class AdaptiveRegions:
    """Visual prompts of the cells that differ most from the rest of their image; the other cells share one pass.

    Most cells of a photograph show background, whose prompts have nearly equal embeddings. One pass assigns each cell a
    first embedding, that of :class:`DenseRegions` if the encoder supports them, otherwise that of the whole image. The
    ``regions_per_image`` cells whose first embedding is farthest from the mean of their image (without dense regions,
    whose mean color is farthest from the image's median color) are then drawn and embedded. The other cells keep their
    first embedding, shifted by the mean difference of the two embeddings over the drawn cells.

    Args:
        prompt: the grid and how a cell is drawn.
        regions_per_image: number of cells drawn per image; the encoder makes one more pass.

    Raises:
        InputError: not a :class:`RegionPrompt`, or not an integer from 1 to its number of cells.

    Example:
        >>> from captum_concepts import demo
        >>> regions = AdaptiveRegions(RegionPrompt("circle", (4, 4)), 3)
        >>> regions.encode(demo.load("clip"), torch.rand(2, 3, 64, 64)).shape
        torch.Size([2, 16, 128])
    """

    prompt: RegionPrompt
    regions_per_image: int

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, RegionPrompt):
            raise InputError(f"regions_per_image selects cells of a RegionPrompt, not of {type(self.prompt).__name__}")
        integer("regions_per_image", self.regions_per_image, 1, len(self.prompt))

    @property
    def kind(self) -> str:
        """The string ``"adaptive"``."""
        return "adaptive"

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the prompt."""
        return self.prompt.grid

    def __len__(self) -> int:
        """Number of cells, h*w."""
        return len(self.prompt)

    def as_dict(self) -> dict[str, Any]:
        """The arguments, as JSON keeps them; :func:`regions_from_dict` reads them back."""
        return {"kind": self.kind, "regions_per_image": self.regions_per_image, "prompt": self.prompt.as_dict()}

    def encode(self, encoder: Any, images: Tensor) -> Tensor:
        """The embeddings of all cells, from ``regions_per_image + 1`` calls of the encoder with one view per image.

        Returns:
            ``(N, h*w, D)``, cells in row-major order; those of drawn cells have unit length.
        """
        first, differs = self._first(encoder, images)
        rows = torch.arange(len(images), device=images.device)
        chosen = differs.topk(self.regions_per_image, dim=1).indices.sort(dim=1).values
        views = (self.prompt.draw_cells(images, rows, cells) for cells in chosen.to(images.device).unbind(1))
        drawn = F.normalize(torch.stack([encoder.encode_image(view).float() for view in views], 1), dim=2)
        where = chosen.to(drawn.device)[:, :, None].expand_as(drawn)
        shift = (drawn - first.gather(1, where)).mean(1, keepdim=True)
        return (first + shift).scatter(1, where, drawn)

    def _first(self, encoder: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        """Unit embeddings ``(N, h*w, D)`` from one pass, and the distance ``(N, h*w)`` of each cell from its image."""
        try:
            # An encoder may normalize in place, and prompts are drawn on the images later.
            first = F.normalize(DenseRegions(self.grid).encode(encoder, images.clone()).float(), dim=2)
            return first, (first - first.mean(1, keepdim=True)).norm(dim=2)
        except InputError:  # no encode_regions, or an unsupported tower
            pass
        whole = F.normalize(encoder.encode_image(images.clone()).float(), dim=1)
        colors = resized(images.float(), self.grid).flatten(2)
        differs = (colors - colors.median(2, keepdim=True).values).norm(dim=1)
        return whole[:, None].expand(-1, len(self), -1), differs


#: How regions are shown to an encoder.
Regions = RegionPrompt | DenseRegions | AdaptiveRegions


def regions_from_dict(values: Any, *, complete: bool = True) -> Regions:
    """The :class:`RegionPrompt`, :class:`DenseRegions` or :class:`AdaptiveRegions` that ``as_dict`` described.

    Args:
        values: the settings by name; ``"kind"`` is ``"dense"`` for :class:`DenseRegions` and ``"adaptive"`` for
            :class:`AdaptiveRegions`.
        complete: refuse missing settings instead of using their defaults.

    Raises:
        InputError: an unknown or missing setting, or a value that is not allowed.

    >>> regions_from_dict(DenseRegions(3).as_dict()) == DenseRegions(3)
    True
    """
    if isinstance(values, Mapping) and values.get("kind") == "dense":
        known = {"kind", *(field.name for field in dataclasses.fields(DenseRegions))}
        if not set(values) <= known or (complete and set(values) != known):
            raise InputError(f"DenseRegions has the settings {sorted(known)}, got {listing(map(str, values))}")
        return DenseRegions(**{key: value for key, value in values.items() if key != "kind"})
    if isinstance(values, Mapping) and values.get("kind") == "adaptive":
        if set(values) != {"kind", "regions_per_image", "prompt"}:
            raise InputError(f"AdaptiveRegions has prompt and regions_per_image, got {listing(map(str, values))}")
        return AdaptiveRegions(RegionPrompt.from_dict(values["prompt"], complete=complete), values["regions_per_image"])
    return RegionPrompt.from_dict(values, complete=complete)


@dataclass(frozen=True)
class Tower:
    """The two parts of an image tower that dense embeddings need.

    Args:
        features: ``pixels -> (N, h, w, C)``, the features per position before pooling; for a tower with a class token
            the output of the modified last block.
        pool: ``(M, C) -> (M, D)``, the tower's pooling and projection of feature maps with a single position.
    """

    features: Callable[[Tensor], Tensor]
    pool: Callable[[Tensor], Tensor]


def encode_cells(tower: Tower, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """``(N, h*w, D)``: the tower's dense embeddings, averaged (or interpolated) to the grid."""
    found = tower.features(pixels)
    n, h, w, _ = found.shape
    maps = tower.pool(found.flatten(0, 2)).float().unflatten(0, (n, h, w)).permute(0, 3, 1, 2)
    return resized(maps, grid).flatten(2).transpose(1, 2)


def resized(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """``(N, C, h, w)`` averaged over the cells of a coarser grid, or interpolated bilinearly to a finer one."""
    h, w = (min(size, side) for size, side in zip(grid, maps.shape[2:], strict=True))
    maps = F.adaptive_avg_pool2d(maps, (h, w))
    return maps if (h, w) == grid else F.interpolate(maps, grid, mode="bilinear", align_corners=False)


def without_outliers(tokens: Tensor) -> Tensor:
    """``(N, h, w, C)`` with positions of extreme norm replaced by the mean of their other neighbors.

    A norm is extreme if it exceeds the image's median by five median absolute deviations (times 1.4826) and also by
    half of the median.
    """
    norm = tokens.float().norm(dim=3)
    flat = norm.flatten(1)
    median = flat.median(1, keepdim=True).values
    spread = 1.4826 * (flat - median).abs().median(1, keepdim=True).values
    extreme = ((flat > median + _OUTLIER * spread) & (flat > 1.5 * median)).view_as(norm)
    if not bool(extreme.any()):
        return tokens
    ordinary = (~extreme)[:, None].float()
    window = tokens.new_ones(1, 1, 3, 3, dtype=torch.float32)
    count = F.conv2d(ordinary, window, padding=1)
    masked = tokens.float().permute(0, 3, 1, 2) * ordinary
    channels = masked.shape[1]
    total = F.conv2d(masked, window.expand(channels, 1, 3, 3), padding=1, groups=channels)
    whole = (masked.sum((2, 3), keepdim=True) / ordinary.sum((2, 3), keepdim=True).clamp(min=1)).expand_as(total)
    mean = torch.where(count > 0, total / count.clamp(min=1), whole).permute(0, 2, 3, 1)
    return torch.where(extreme[..., None], mean.to(tokens.dtype), tokens)


def attend(q: Tensor, k: Tensor, v: Tensor, attention: str) -> Tensor:
    """``(N, L, C)`` attention outputs of ``(N, heads, L, d)``: each position's own value, or those of similar ones."""
    if attention == "value":
        out = v
    else:
        like = q if attention == "qq" else k
        out = F.scaled_dot_product_attention(like, like, v)
    return out.transpose(1, 2).flatten(2)


def multihead_projections(attention: nn.MultiheadAttention, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``(N, heads, L, d)`` of a module with one joint projection."""
    joint = F.linear(tokens, attention.in_proj_weight, attention.in_proj_bias)
    q, k, v = (part.unflatten(2, (attention.num_heads, -1)).transpose(1, 2) for part in joint.chunk(3, dim=2))
    return q, k, v


class LastBlock:
    """Captures the input of a block during a forward pass, without changing the tower."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.tokens: Tensor | None = None

    def run(self, function: Callable[[Tensor], Any], pixels: Tensor) -> Tensor:
        """The block's input tokens ``(N, L, C)`` in ``function(pixels)``; the block itself is not run."""

        def keep(_module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], _output: None) -> None:
            self.tokens = args[0] if args else keywords["hidden_states"]
            raise _Reached

        try:
            with hooked([self.block], keep, at_input=True):
                function(pixels)
        except _Reached:
            pass
        if self.tokens is None:
            raise InputError(f"the last block {type(self.block).__name__} did not run; use RegionPrompt instead")
        return self.tokens


class _Reached(Exception):
    pass


def class_token_tower(
    block: nn.Module,
    run: Callable[[Tensor], Any],
    grid: Callable[[Tensor], tuple[int, int]],
    prefix: int,
    project: Callable[[Tensor, str], Tensor],
    pool: Callable[[Tensor], Tensor],
    *,
    attention: str,
    remove_outliers: bool,
) -> Tower:
    """The tower of a transformer that reads its class token.

    Args:
        block: the last block.
        run: runs the tower at least up to this block.
        grid: from pixels to the rows and columns of their patches.
        prefix: tokens before the patches.
        project: ``(tokens of all positions, attention) -> (N, L, C)``, the block's modified attention.
        pool: see :class:`Tower`.
        attention, remove_outliers: see :class:`DenseRegions`.
    """

    def features(pixels: Tensor) -> Tensor:
        tokens = LastBlock(block).run(run, pixels)
        size = grid(pixels)
        if tokens.shape[1] != prefix + size[0] * size[1]:
            raise InputError(
                f"the last block has {tokens.shape[1]} tokens, not {prefix} + {size[0]} * {size[1]}: DenseRegions "
                "cannot read a grid from this tower; use RegionPrompt instead"
            )
        patches = tokens[:, prefix:].unflatten(1, size)
        if remove_outliers:
            patches = without_outliers(patches)
        every = torch.cat([tokens[:, :prefix], patches.flatten(1, 2)], 1)
        return project(every, attention)[:, prefix:].unflatten(1, size)

    return Tower(features, pool)


def needs_class_token(attention: str, what: str) -> None:
    """Refuse ``attention`` other than "value" for a tower without a class token."""
    if attention != "value":
        raise InputError(
            f"attention={attention!r} is for towers that read a class token; {what} pools all positions, so only "
            "'value' applies"
        )
