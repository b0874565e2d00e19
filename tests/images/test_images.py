"""Reading image files: every mode gives RGB, every broken file is named."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from captum_concepts.datasets.images import class_folders, find_images, load_image
from captum_concepts.errors import InputError


def png_claiming(width: int, height: int) -> bytes:
    """A valid PNG header for a picture that is not there."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_pixels_are_exact(tmp_path: Path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png")
    assert image.shape == (3, 5, 7)
    assert torch.equal((image * 255).round().to(torch.uint8), torch.from_numpy(pixels).permute(2, 0, 1))


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str):
    if mode == "I;16":
        Image.fromarray(np.full((4, 4), 9000, dtype=np.uint16)).save(tmp_path / "a.tif")
    else:
        grey = Image.new("RGB", (4, 4), (200, 200, 200))
        grey.convert(mode).save(tmp_path / "a.tif")
    image = load_image(tmp_path / "a.tif")
    assert image.shape == (3, 4, 4)
    assert 0 <= image.min() <= image.max() <= 1


def test_transparency_lies_on_white(tmp_path: Path):
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (load_image(tmp_path / "clear.png") == 1).all()


def test_exif_rotation_is_applied(tmp_path: Path):
    image = Image.new("RGB", (6, 2))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").shape == (3, 6, 2)


def test_size_crops_the_centre_or_distorts(tmp_path: Path):
    pixels = np.zeros((10, 30, 3), dtype=np.uint8)
    pixels[:, 10:20] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert load_image(tmp_path / "wide.png", 10).min() > 0.9
    whole = load_image(tmp_path / "wide.png", (8, 6), crop=False)
    assert whole.shape == (3, 8, 6)
    assert whole[:, :, 0].max() < 0.2


@pytest.mark.parametrize(
    ("name", "content"),
    [("text.jpg", b"not an image"), ("empty.png", b""), ("cut.png", png_claiming(8, 8)[:40])],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: bytes):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=name):
        load_image(tmp_path / name)


def test_truncated_jpeg(tmp_path: Path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"a\.jpg"):
        load_image(tmp_path / "a.jpg")


@pytest.mark.parametrize("side", [12_000, 60_000])
def test_a_file_that_claims_too_many_pixels_is_refused_before_decoding(tmp_path: Path, side: int):
    (tmp_path / "bomb.png").write_bytes(png_claiming(side, side))
    with pytest.raises(InputError, match="pixels"):
        load_image(tmp_path / "bomb.png")


def test_find_images_and_class_folders(tmp_path: Path):
    for name in ("b/2.png", "b/1.JPG", "a/deep/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    assert [p.name for p in find_images(tmp_path)] == ["3.png", "1.JPG", "2.png"]
    assert {name: len(files) for name, files in class_folders(tmp_path).items()} == {"a": 1, "b": 2}
    with pytest.raises(InputError, match="no folders"):
        class_folders(tmp_path / "b")
    (tmp_path / "c").mkdir()
    with pytest.raises(InputError, match="no image"):
        class_folders(tmp_path)
    with pytest.raises(InputError, match="no file or folder"):
        find_images([tmp_path / "missing.png"])
