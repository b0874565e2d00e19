"""What the papers printed, as shares of 1, and the settings they name: the rows beside which ours are put."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]


def _rows(
    columns: tuple[str, ...], values: dict[str, tuple[float | str | None, ...]], percent: bool = False
) -> list[Row]:
    """A row for each method; numbers in percent become shares."""
    out = []
    for method, found in values.items():
        row: Row = {"method": f"{method} (published)"}
        for column, value in zip(columns, found, strict=True):
            row[column] = round(value / 100, 6) if percent and isinstance(value, float) else value
        out.append(row)
    return out


_REGIONS = ("epg", "nra", "hit_rate")
_MEANS = tuple(f"{column}, mean of categories" for column in _REGIONS)
_OBJECTS = tuple(f"{column}, object" for column in _REGIONS)

#: CE-FAM, tables 1 and 2. Of Broden the "average" is taken as that over the categories.
CE_FAM_BRODEN = _rows(
    (*_MEANS, *_OBJECTS),
    {
        "CLIP-Dissect": (0.146, 0.334, 0.199, 0.197, 0.327, 0.215),
        "WWW": (0.117, 0.278, 0.114, 0.179, 0.322, 0.154),
        "CE-FAM": (0.154, 0.361, 0.247, 0.233, 0.459, 0.436),
    },
)
CE_FAM_IMAGENET_S = _rows(
    _REGIONS,
    {
        "CLIP-Dissect": (0.047, 0.105, 0.013),
        "WWW": (0.076, 0.232, 0.017),
        "CE-FAM": (0.138, 0.273, 0.193),
    },
)
#: SALF-CBM, table 2.
SALF_SEGMENTATION = _rows(
    ("pixel_accuracy", "mean_iou", "average_precision"),
    {
        "LRP": (69.52, 36.85, 69.95),
        "integrated gradients": (68.49, 46.59, 73.46),
        "Grad-CAM": (71.34, 53.34, 83.88),
        "Grad-CAM++": (71.31, 53.56, 83.93),
        "Score-CAM": (69.56, 51.44, 81.78),
        "FullGrad": (73.04, 55.78, 88.35),
        "SALF-CBM": (76.94, 58.30, 85.31),
    },
    percent=True,
)
#: SALF-CBM, table 1.
SALF_ACCURACY = _rows(
    ("head", "CUB-200", "Places365", "ImageNet"),
    {
        "backbone, sparse": ("sparse", 75.96, 38.46, 74.35),
        "P-CBM": ("sparse", 59.60, None, None),
        "LF-CBM": ("sparse", 74.31, 43.68, 71.95),
        "SALF-CBM, sparse": ("sparse", 74.35, 46.73, 75.32),
        "backbone, its own head": ("dense", 76.70, 48.56, 76.13),
        "SALF-CBM, dense": ("dense", 76.21, 49.38, 76.26),
    },
    percent=True,
)

PUBLISHED: dict[str, list[Row]] = {
    "ce-fam-broden": CE_FAM_BRODEN,
    "ce-fam-imagenet-s": CE_FAM_IMAGENET_S,
    "salf-segmentation": SALF_SEGMENTATION,
    "salf-accuracy": SALF_ACCURACY,
}

#: Of the public training commands of LF-CBM, whose settings SALF-CBM takes over: strength of the sparse head and the
#: least similarity of a concept that is kept.
SETTINGS: dict[str, dict[str, float]] = {
    "CUB-200": {"lam": 0.0002, "presence_cutoff": 0.26},
    "Places365": {"lam": 0.0003, "presence_cutoff": 0.28},
    "ImageNet": {"lam": 0.0001, "presence_cutoff": 0.28},
}
