"""A photograph becomes a square in three ways; what the model saw of it is known, and lies where it is drawn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from captum_concepts.errors import InputError
from captum_concepts.images import Preprocessing, load_photograph, open_images

#: An upright photograph of 240 x 120 pixels, gray, white at its left border: x from 0 to 40, y from 40 to 80.
WIDE, TALL = (240, 120), (120, 240)


def photograph(folder: Path, upright: tuple[int, int], turn: int, name: str = "a.png") -> Path:
    """White at the left border of a wide photograph, at the top of a tall one; stored as ``turn`` (EXIF) says."""
    image = Image.new("RGB", WIDE, (64, 64, 64))
    image.paste((255, 255, 255), (0, 40, 40, 80))
    if upright == TALL:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    exif = Image.Exif()
    exif[0x0112] = turn
    stored = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90}[turn]
    image = image if stored is None else image.transpose(stored)
    image.save(folder / name, exif=exif, **({"quality": 95} if name.endswith("jpg") else {}))
    return folder / name


def bright(image: torch.Tensor) -> list[int] | None:
    """The box of the white patch, ``[x0, y0, x1, y1]``."""
    y, x = torch.nonzero(image[0] > 0.7, as_tuple=True)
    return None if not len(x) else [int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1]


def across(box: list[float], upright: tuple[int, int]) -> list[float]:
    """A box of the wide photograph, in the tall one."""
    return box if upright == WIDE else [box[1], box[0], box[3], box[2]]


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif"])
@pytest.mark.parametrize("turn", [1, 3, 6])
@pytest.mark.parametrize("upright", [WIDE, TALL])
@pytest.mark.parametrize(
    ("resize", "crop", "patch", "seen", "shown"),
    [
        ("crop", 1.0, None, [60, 0, 180, 120], [60, 120]),
        ("crop", 0.5, None, [90, 30, 150, 90], [60, 120]),
        ("squash", 1.0, [0, 20, 10, 40], [0, 0, 240, 120], [60, 120]),
        ("squash", 0.5, None, [60, 30, 180, 90], [60, 120]),
        ("pad", 1.0, [0, 25, 10, 35], [0, 0, 240, 120], [120, 120]),
    ],
)
def test_where_the_border_lands(tmp_path: Path, name, turn, upright, resize, crop, patch, seen, shown):
    path = photograph(tmp_path, upright, turn, name)
    source = open_images([path], size=60, resize=resize, crop=crop, background=0.0)
    assert bright(source[0]) == (patch and across(patch, upright))
    found = load_photograph(path, source.reading, longest=120)
    assert found.seen == tuple(across(seen, upright))
    assert list(found.picture.shape[1:]) == (shown if upright == WIDE else shown[::-1])
    hidden = seen != [0, 0, 240, 120]
    assert found.crop == (tuple(v / 2 for v in found.seen) if hidden else None)
    # What the model saw is what lies in the box.
    height, width = found.picture.shape[1:]
    x0, y0, x1, y1 = map(round, found.crop or (0, 0, width, height))
    inside = F.interpolate(found.picture[None, :, y0:y1, x0:x1], (60, 60), mode="bilinear", antialias=True)[0]
    assert float((inside - source[0]).abs().mean()) < 0.02


def test_small_photographs_keep_their_size(tmp_path: Path):
    path = photograph(tmp_path, WIDE, 1)
    found = load_photograph(path, open_images([path], size=224).reading)
    assert found.picture.shape == (3, 120, 240)
    assert found.crop == found.seen == (60.0, 0.0, 180.0, 120.0)


def test_normalization_is_not_drawn(tmp_path: Path):
    path = photograph(tmp_path, WIDE, 1)
    p = Preprocessing((60, 60), (0.5,) * 3, (0.25,) * 3)
    found = load_photograph(path, open_images([path], preprocessing=p, normalize=p).reading)
    assert (float(found.picture.min()), float(found.picture.max())) == (pytest.approx(64 / 255), 1.0)


def test_a_transform_does_not_say_what_it_cuts(tmp_path: Path):
    path = photograph(tmp_path, WIDE, 1)
    with pytest.raises(InputError, match="transform"):
        load_photograph(path, open_images([path], transform=lambda image: torch.zeros(3, 4, 4)).reading)
