"""`ColorScale`, the mapping from values to colors of a map, a row of maps or a whole figure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_concepts.errors import InputError

#: A perceptually uniform color map from dark to bright, and a diverging one that is near white at zero and in which
#: opposite values are about equally light (CIE L* differs by at most 5.1, at the ends by 0.1). Both are readable with
#: the common kinds of color blindness.
SEQUENTIAL, DIVERGING = "inferno", "RdBu_r"

_NEGLIGIBLE = 0.05


@dataclass(frozen=True)
class ColorScale:
    """The values at the two ends of a color map.

    Args:
        low, high: values of the first and the last color; values beyond are clipped.
        signed: whether the scale is symmetric, ``low == -high``, so that zero has the neutral middle color.
        cmap: a matplotlib color map or its name; None: :data:`SEQUENTIAL` or, if signed, :data:`DIVERGING`.

    Raises:
        InputError: the ends are not finite, not in order, or more than 1e38 apart; the color map is unknown (raised on
            first use).

    Example:
        >>> scale = ColorScale.of(torch.tensor([[-1.0, 0.0, 2.0]]))
        >>> scale.low, scale.high, scale.signed
        (-2.0, 2.0, True)
        >>> scale.colors(torch.zeros(4, 5)).shape
        torch.Size([3, 4, 5])
    """

    low: float
    high: float
    signed: bool = False
    cmap: Any = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise InputError(f"a color scale needs finite vmin < vmax, got {self.low:g} and {self.high:g}")
        if self.high - self.low > 1e38:  # differences of such numbers overflow in float32
            raise InputError(f"values from {self.low:g} to {self.high:g} are too large to draw; divide them")

    @classmethod
    def of(
        cls,
        heatmaps: Tensor | Iterable[Tensor],
        signed: bool | str = "auto",
        vmin: float | None = None,
        vmax: float | None = None,
        cmap: Any = None,
    ) -> ColorScale:
        """The scale for all finite values of one or several maps.

        Args:
            heatmaps: one tensor of any shape, or several.
            signed: True, False, or ``"auto"``: signed if the largest magnitude of negative values is more than 5 % of
                the largest of all.
            vmin, vmax: ends to use instead of the data's; a signed scale uses the larger magnitude of the two.
            cmap: see the class.

        Returns:
            Signed: ``(-m, m)`` with m the largest magnitude. Otherwise ``(min(lowest, 0), highest)``, so that a map of
            positive values starts at zero. Data without range (constant zero, empty) have a scale of length 1.
        """
        if signed not in (True, False, "auto"):
            raise InputError(f"signed must be True, False or 'auto', got {signed!r}")
        for name, value in (("vmin", vmin), ("vmax", vmax)):
            if value is not None and not math.isfinite(value):
                raise InputError(f"{name} must be finite, got {value}")
        if vmin is not None and vmax is not None and not vmin < vmax:
            raise InputError(f"vmin must be less than vmax, got {vmin:g} and {vmax:g}")
        maps = [heatmaps] if isinstance(heatmaps, Tensor) else list(heatmaps)
        values = torch.cat([m.detach().flatten().float().cpu() for m in maps] or [torch.empty(0)])
        values = values[values.isfinite()]
        low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 0.0)
        top = max(-low, high, 0.0)
        if low < -_NEGLIGIBLE * top if signed == "auto" else signed:
            given = [abs(v) for v in (vmin, vmax) if v is not None]
            bound = max(given, default=top) or 1.0
            return cls(-bound, bound, True, cmap)
        low = float(vmin) if vmin is not None else min(low, 0.0 if vmax is None else min(0.0, vmax - 1.0))
        high = float(vmax) if vmax is not None else high
        return cls(low, high if high > low else low + 1.0, False, cmap)

    def colormap(self) -> Any:
        """The matplotlib color map."""
        from matplotlib import colormaps

        name = self.cmap if self.cmap is not None else DIVERGING if self.signed else SEQUENTIAL
        if not isinstance(name, str):
            return name
        if name not in colormaps:
            raise InputError(
                f"no color map {name!r} in matplotlib; perceptually uniform ones include 'viridis' and 'magma'"
            )
        return colormaps[name]

    def fraction(self, values: Tensor) -> Tensor:
        """Position of finite values between the ends of the scale, in [0, 1]."""
        return ((values.detach().float().cpu() - self.low) / (self.high - self.low)).clamp(0, 1)

    def colors(self, values: Tensor) -> Tensor:
        """Colors ``(3, ...)`` in [0, 1] of finite values of any shape."""
        colors = self.colormap()
        table = torch.from_numpy(colors(range(colors.N))[:, :3].T).float()
        index = (self.fraction(values) * colors.N).int().clamp(max=colors.N - 1)
        return table.index_select(1, index.flatten()).reshape(3, *values.shape)

    def opacity(self, values: Tensor, alpha: float) -> Tensor:
        """Opacity of the colors over an image, so that strong values have the color of the color bar on any image.

        It grows from 0 at zero (at ``low`` if not signed) to ``alpha`` from half of the scale on.

        >>> ColorScale(-1.0, 1.0, signed=True).opacity(torch.tensor([-1.0, -0.5, 0.0, 0.25]), 0.8)
        tensor([0.8000, 0.8000, 0.0000, 0.4000])
        """
        fraction = self.fraction(values)
        strength = (2 * fraction - 1).abs() if self.signed else fraction
        return alpha * (2 * strength).clamp(max=1)


def schemes(groups: Iterable[Iterable[Tensor]], signed: bool | str = "auto") -> bool:
    """Whether a figure needs the diverging scheme, which ``"auto"`` selects if negative values matter in any of its
    groups of maps, each of which has its own scale."""
    if signed != "auto":
        return ColorScale.of([], signed).signed
    return any(ColorScale.of(group).signed for group in groups)


def value_range(
    heatmap: Tensor, signed: bool | str = "auto", vmin: float | None = None, vmax: float | None = None
) -> tuple[float, float]:
    """Values at the two ends of the color map, symmetric around zero for signed maps (:meth:`ColorScale.of`).

    >>> value_range(torch.tensor([0.2, 1.0])), value_range(torch.tensor([-0.5, 1.0]))
    ((0.0, 1.0), (-1.0, 1.0))
    """
    scale = ColorScale.of(heatmap, signed, vmin, vmax)
    return scale.low, scale.high
