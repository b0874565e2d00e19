"""`RegionPrompt`: one visual prompt per region, which directs a vision-language model to that region."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from captum_concepts._checks import integer, number, one_of
from captum_concepts.errors import InputError, did_you_mean, listing, shortened
from captum_concepts.vlm._drawing import Rings, blurred, crop_windows, disc, resample

KINDS = ("circle", "crop", "blur")
PLACEMENTS = ("paper", "inset", "cells")
COLORS: dict[str, tuple[float, float, float]] = {
    "red": (1.0, 0.0, 0.0),
    "green": (0.0, 1.0, 0.0),
    "blue": (0.0, 0.0, 1.0),
    "yellow": (1.0, 1.0, 0.0),
    "white": (1.0, 1.0, 1.0),
    "black": (0.0, 0.0, 0.0),
}
#: The paper's image side, at which the radius is 32 and the line width 2 pixels.
PAPER_SIZE = 224
#: Maximum rows and columns of a grid; larger values indicate a mistake or a forged file.
FINEST_GRID = 256
#: Maximum radius, line width and blur, for the same reason.
MOST_PIXELS = 10_000
#: Settings of stored prompts that were renamed.
_EARLIER_NAMES = {"colour": "color"}
_RADIUS, _WIDTH, _SIGMA = 32.0, 2.0, 12.0  # the blur removes textures but not the layout


@dataclass(frozen=True)
class RegionPrompt:
    """Visual prompts of the cells of a grid, one marked copy of the image per cell (SALF-CBM, Algorithm 1).

    There are three kinds of prompts:

    - ``"circle"``: a red line around the center of the cell, for encoders that react to it (CLIP does). The rest of the
      image stays visible, so the encoder keeps the context.
    - ``"crop"``: the window around the center, enlarged to the size of the image; for every encoder. The window has the
      image's aspect ratio, and ``radius`` is half its extent along the image's shorter side. If it crosses the border,
      the border's pixels are repeated (``border="replicate"``), or it is moved inside the image (``"shift"``).
    - ``"blur"``: everything outside the circle is blurred (Gaussian).

    Coordinates are continuous: pixel (i, j) covers [i, i+1] x [j, j+1], and its center is (i + 0.5, j + 0.5). Lines and
    edges are anti-aliased. The line's color is blended in by the fraction of the pixel that the line covers,
    ``clip(min(d + 1/2, r + w/2) - max(d - 1/2, r - w/2), 0, 1)``, where d is the distance of the two centers. Lines are
    clipped at the image's border.

    There are three placements of an h x w grid on an H x W image (given for rows; columns are analogous):

    - ``"paper"``: ``i * floor(H / (h - 1))``, i.e. 0, 37, ..., 222 for H=224, h=7; the border clips the outer circles.
    - ``"inset"``: evenly spaced from ``radius`` to ``H - radius``, so that no circle is clipped (all are centered if
      ``radius`` is too large).
    - ``"cells"``: ``(i + 1/2) * H / h``, the centers of the cells of an h x w feature map, so that prompt and feature
      show the same part of the image. This is the default because it finds concepts best.

    A grid of size 1 is centered in the image in every placement.

    Args:
        kind: "circle", "crop" or "blur".
        grid: rows and columns (h, w), or one number for both.
        radius: of the circle (to the middle of the line) in pixels; None takes the paper's 32 at 224 px, scaled with
            the shorter side of the image.
        placement: "paper", "inset" or "cells".
        color: of the line, as R, G, B in [0, 1], or "red", "green", "blue", "yellow", "white", "black".
        width: of the line in pixels; None takes the paper's 2 at 224 px, scaled likewise. Below one pixel the line is
            drawn fainter.
        blur_sigma: of the Gaussian in pixels; None takes 12 at 224 px, scaled likewise.
        border: how a crop is continued at the border, "replicate" or "shift".
        reference_size: None interprets ``radius``, ``width`` and ``blur_sigma`` as pixels of the image that is drawn
            on. With a number they are pixels of an image whose shorter side is ``reference_size`` and are scaled by
            ``min(H, W) / reference_size``: ``radius=32, reference_size=224`` draws radius 64 on 448 px.

    Raises:
        InputError: a value not listed above.

    Example:
        >>> prompt = RegionPrompt("circle", (7, 7), 32, placement="paper")
        >>> prompt.centers(224, 224)[:3]
        tensor([[ 0.,  0.],
                [ 0., 37.],
                [ 0., 74.]])
        >>> prompt.draw(torch.rand(2, 3, 224, 224)).shape
        torch.Size([2, 49, 3, 224, 224])

    References:
        Benou and Riklin Raviv, "Show and Tell", 2025; Shtedritski et al., "What does CLIP know about a red circle?",
        2023.
    """

    kind: str = "circle"
    grid: tuple[int, int] = (7, 7)
    radius: float | None = None
    placement: str = "cells"
    color: tuple[float, float, float] = COLORS["red"]
    width: float | None = None
    blur_sigma: float | None = None
    border: str = "replicate"
    reference_size: int | None = None

    # Written out, because dataclasses cannot combine keyword-only fields with normalized arguments.
    def __init__(
        self,
        kind: str = "circle",
        grid: int | Sequence[int] = (7, 7),
        radius: float | None = None,
        *,
        placement: str = "cells",
        color: str | Sequence[float] = "red",
        width: float | None = None,
        blur_sigma: float | None = None,
        border: str = "replicate",
        reference_size: int | None = None,
    ) -> None:
        values = {
            "kind": one_of("kind", kind, KINDS),
            "grid": check_grid(grid),
            "radius": _positive("radius", radius),
            "placement": one_of("placement", placement, PLACEMENTS),
            "color": _color(color),
            "width": _positive("width", width),
            "blur_sigma": _positive("blur_sigma", blur_sigma),
            "border": one_of("border", border, ("shift", "replicate")),
            "reference_size": reference_size,
        }
        if reference_size is not None:
            integer("reference_size", reference_size, 1, MOST_PIXELS)
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        """Number of cells, h*w."""
        return self.grid[0] * self.grid[1]

    def pixels(self, height: int, width: int) -> dict[str, float]:
        """``radius``, ``width`` and ``blur_sigma`` in pixels of an image of this size.

        >>> RegionPrompt().pixels(64, 80)["radius"], RegionPrompt(radius=9).pixels(64, 80)["radius"]
        (9.142857142857142, 9.0)
        """
        short = min(height, width)
        given = 1.0 if self.reference_size is None else short / self.reference_size
        default = short / PAPER_SIZE
        return {
            name: value * given if value is not None else paper * default
            for name, value, paper in (
                ("radius", self.radius, _RADIUS),
                ("width", self.width, _WIDTH),
                ("blur_sigma", self.blur_sigma, _SIGMA),
            )
        }

    def centers(self, H: int, W: int) -> Tensor:
        """The centers (row, column) of the cells in pixels of an H x W image, in row-major order.

        Returns:
            ``(h*w, 2)`` float32; ``.view(h, w, 2)`` is the grid.

        Raises:
            InputError: "paper" placement of a grid finer than the image.
        """
        radius = self.pixels(H, W)["radius"]
        rows, columns = self._axis(H, self.grid[0], radius), self._axis(W, self.grid[1], radius)
        return torch.cartesian_prod(torch.tensor(rows), torch.tensor(columns)).reshape(-1, 2)

    def draw(self, x: Tensor) -> Tensor:
        """The visual prompts of all cells of all images.

        Args:
            x: RGB images ``(N, 3, H, W)`` in [0, 1], floating point, on any device.

        Returns:
            ``(N, h*w, 3, H, W)`` of the dtype and on the device of ``x``; differentiable.

        Raises:
            InputError: not a floating-point batch of RGB images.
        """
        n = len(_check_images(x))
        cells = torch.arange(len(self), device=x.device).repeat(n)
        which = torch.arange(n, device=x.device).repeat_interleave(len(self))
        return self.draw_cells(x, which, cells).unflatten(0, (n, len(self)))

    def draw_cells(self, x: Tensor, images: Tensor, cells: Tensor) -> Tensor:
        """The visual prompts of :meth:`draw` for image ``images[b]`` and cell ``cells[b]``, in any order.

        A loop over many cells then needs memory for one batch only.

        Args:
            x: ``(N, 3, H, W)`` as in :meth:`draw`.
            images: ``(B,)`` integers in [0, N).
            cells: ``(B,)`` integers in [0, h*w), in row-major order.

        Returns:
            ``(B, 3, H, W)``.
        """
        _check_images(x)
        height, width = x.shape[-2:]
        size = self.pixels(height, width)
        images, cells = images.to(x.device), cells.to(x.device)
        if not len(cells):
            return x.new_empty(0, *x.shape[1:])
        if self.kind == "circle":
            return _rings(self, height, width, x.device).paint(x[images], cells, x.new_tensor(self.color).expand(1, 3))
        centers = self.centers(height, width).to(x.device)
        if self.kind == "crop":
            windows = crop_windows(centers[cells], size["radius"], height, width, inside=self.border == "shift")
            return resample(x[images], windows)
        used, place = cells.unique(return_inverse=True)
        inside = disc(centers[used], size["radius"], height, width).to(x.dtype)
        soft, local = images.unique(return_inverse=True)
        return torch.lerp(blurred(x[soft], size["blur_sigma"])[local], x[images], inside[place, None])

    def as_dict(self) -> dict[str, Any]:
        """The arguments, as JSON keeps them; :meth:`from_dict` reads them back."""
        values = asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, complete: bool = True) -> RegionPrompt:
        """The prompt that :meth:`as_dict` described, in this or an earlier version.

        Args:
            values: the settings by name.
            complete: refuse missing settings instead of using their defaults.

        Raises:
            InputError: an unknown or missing setting, or a value that is not allowed.
        """
        known = [field.name for field in fields(cls)]
        if not isinstance(values, Mapping):
            raise InputError(f"a RegionPrompt is described by a dictionary of {listing(known, 20)}, got {values!r}")
        named = {_EARLIER_NAMES.get(name, name): value for name, value in values.items()}
        unknown = [name for name in named if name not in known]
        if unknown:
            raise InputError(f"RegionPrompt has no setting {unknown[0]!r}.{did_you_mean(str(unknown[0]), known)}")
        if complete and (missing := [name for name in known if name not in named]):
            raise InputError(f"the RegionPrompt lacks the keys {listing(missing)}")
        return cls(**named)

    def _axis(self, length: int, count: int, radius: float) -> list[float]:
        if count == 1:
            return [length / 2]
        if self.placement == "cells":
            return [(i + 0.5) * length / count for i in range(count)]
        if self.placement == "paper":
            stride = length // (count - 1)
            if stride == 0:
                raise InputError(
                    f"placement='paper' cannot place {count} cells along {length} pixels; use a coarser grid"
                )
            return [float(i * stride) for i in range(count)]
        first = min(radius, length / 2)
        return [first + i * (length - 2 * first) / (count - 1) for i in range(count)]


@functools.lru_cache(maxsize=8)
def _rings(prompt: RegionPrompt, height: int, width: int, device: torch.device) -> Rings:
    size = prompt.pixels(height, width)
    with torch.inference_mode(False), torch.no_grad():  # the cached table must not depend on one call's mode
        centers = prompt.centers(height, width).to(device)
        return Rings.of(centers, size["radius"], size["width"], height, width)


def _check_images(x: Tensor) -> Tensor:
    if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[1] != 3 or not x.is_floating_point() or 0 in x.shape[1:]:
        found = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f"images must be RGB (N, 3, H, W) in [0, 1], floating point; got {found}")
    return x


def check_grid(grid: int | Sequence[int]) -> tuple[int, int]:
    """``grid`` as (rows, columns).

    Raises:
        InputError: not one or two integers from 1 to 256.
    """
    found = (grid, grid) if isinstance(grid, int) else tuple(grid) if isinstance(grid, Sequence) else ()
    if len(found) != 2:
        raise InputError(f"grid={grid!r} must be two whole numbers (rows, columns), at least 1 each")
    return integer("grid's rows", found[0], 1, FINEST_GRID), integer("grid's columns", found[1], 1, FINEST_GRID)


def _positive(name: str, value: Any) -> float | None:
    if value is None:
        return None
    return number(name, value, lambda v: 0 < v <= MOST_PIXELS, f"a number of pixels in (0, {MOST_PIXELS:,}], or None")


def _color(color: Any) -> tuple[float, float, float]:
    if isinstance(color, str) and color in COLORS:
        return COLORS[color]
    allowed = f"one of {', '.join(map(repr, COLORS))}, or three numbers (R, G, B) in [0, 1]"
    if isinstance(color, str) or not isinstance(color, Sequence) or len(color) != 3:
        raise InputError(f"color must be {allowed}; got {shortened(color)}")
    red, green, blue = (number("color", v, lambda c: 0 <= c <= 1, allowed) for v in color)
    return red, green, blue
