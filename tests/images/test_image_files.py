"""One image file as a tensor, in every mode and depth that files have; and which files are images."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from captum_concepts.errors import InputError, InputWarning
from captum_concepts.images import (
    class_folders,
    files as image_files,
    find_images,
    load_image,
    names_of,
    placement,
    read_json,
    read_words,
)

RAMP = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)


def saved(folder: Path, image: Image.Image | np.ndarray, name: str = "a.png", **options) -> Path:
    path = folder / name
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(path, **options)
    return path


class TestDepths:
    @pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
    def test_sixteen_bits(self, tmp_path: Path, name: str):
        image = load_image(saved(tmp_path, RAMP, name))
        expected = torch.from_numpy(RAMP.astype(np.float32) / 65535)
        assert torch.allclose(image, expected.expand(3, 16, 16), atol=1e-6)

    def test_sixteen_bits_resized(self, tmp_path: Path):
        image = load_image(saved(tmp_path, RAMP), 8)
        assert image.shape == (3, 8, 8)
        assert abs(float(image.mean()) - 0.5) < 1e-3

    @pytest.mark.parametrize(("top", "white"), [(65535, 65535), (4095, 65535), (2**31 - 1, 2**31 - 1)])
    def test_integers_of_32_bits(self, tmp_path: Path, top: int, white: int):
        values = np.linspace(0, top, 256).astype(np.int32).reshape(16, 16)
        image = load_image(saved(tmp_path, values, "a.tif"))
        assert torch.allclose(image[0], torch.from_numpy(values / white).float(), atol=1e-6)
        assert abs(float(load_image(tmp_path / "a.tif", value_range=(0, top)).mean()) - 0.5) < 1e-3

    def test_floats(self, tmp_path: Path):
        values = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
        assert torch.allclose(load_image(saved(tmp_path, values, "a.tif"))[0], torch.from_numpy(values))
        hounsfield = saved(tmp_path, values * 4000 - 1000, "b.tif")
        with pytest.raises(InputError, match=r"b\.tif.*-1000 to 3000.*value_range"):
            load_image(hounsfield)
        assert torch.allclose(load_image(hounsfield, value_range=(-1000, 3000))[1], torch.from_numpy(values), atol=1e-6)

    def test_ranges_that_are_guessed_warn(self, tmp_path: Path):
        values = np.linspace(0, 255, 100, dtype=np.float32).reshape(10, 10)
        for pixels in (values, values.astype(np.int32)):
            with pytest.warns(InputWarning, match="255 as white"):
                image = load_image(saved(tmp_path, pixels, "a.tif"))
            assert abs(float(image.mean()) - 0.5) < 0.01
        with pytest.raises(InputError, match="NaN"):
            load_image(saved(tmp_path, np.full((4, 4), np.nan, dtype=np.float32), "n.tif"))


class TestModes:
    @pytest.mark.parametrize(
        ("mode", "color", "expected"),
        [
            ("1", 1, (1, 1, 1)),
            ("L", 51, (0.2, 0.2, 0.2)),
            ("LA", (51, 255), (0.2, 0.2, 0.2)),
            ("LA", (0, 0), (1, 1, 1)),
            ("RGBA", (255, 0, 0, 255), (1, 0, 0)),
            ("RGBA", (255, 0, 0, 0), (1, 1, 1)),
            ("RGBA", (255, 0, 0, 51), (1, 0.8, 0.8)),
            ("CMYK", (0, 255, 255, 0), (1, 0, 0)),
        ],
    )
    def test_color(self, tmp_path: Path, mode: str, color, expected):
        path = saved(tmp_path, Image.new(mode, (5, 4), color), "a.tif")
        assert torch.allclose(load_image(path), torch.tensor(expected).float().view(3, 1, 1).expand(3, 4, 5), atol=2e-3)

    def test_background(self, tmp_path: Path):
        clear = saved(tmp_path, Image.new("RGBA", (2, 2), (255, 0, 0, 0)))
        assert (load_image(clear, background=0.0) == 0).all()

    def test_palette_with_a_transparent_color(self, tmp_path: Path):
        image = Image.new("P", (2, 1), 1)
        image.putpalette([255, 0, 0, 0, 0, 255] + [0] * 762)
        image.putpixel((0, 0), 0)
        path = saved(tmp_path, image, transparency=0)
        assert load_image(path).tolist() == [[[1, 0]], [[1, 0]], [[1, 1]]]

    def test_gray_mode(self, tmp_path: Path):
        image = load_image(saved(tmp_path, Image.new("RGB", (3, 2), (255, 0, 0))), mode="L")
        assert image.shape == (1, 2, 3)
        assert abs(float(image.mean()) - 0.299) < 2e-3

    def test_bands_as_stored(self, tmp_path: Path):
        path = saved(tmp_path, Image.new("RGBA", (3, 2), (10, 20, 30, 40)))
        assert (load_image(path, bands=(3, 0))[:, 0, 0] * 255).round().tolist() == [40, 10]
        with pytest.raises(InputError, match="has 4 channels, 0 to 3"):
            load_image(path, bands=(4,))

    def test_first_frame_of_an_animation(self, tmp_path: Path):
        frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
        frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
        with pytest.warns(InputWarning, match="several frames"):
            assert load_image(tmp_path / "a.gif")[:, 0, 0].tolist() == [1, 0, 0]

    def test_exif_orientation(self, tmp_path: Path):
        exif = Image.Exif()
        exif[0x0112] = 6
        path = saved(tmp_path, Image.new("RGB", (6, 2)), "a.jpg", exif=exif)
        assert load_image(path).shape == (3, 6, 2)


class TestGeometry:
    def test_placement(self):
        assert placement(300, 400, (224, 224)) == (50, 0, 350, 300, 224, 224)
        assert placement(300, 400, (224, 224), resize="squash") == (0, 0, 400, 300, 224, 224)
        assert placement(300, 400, (224, 224), resize="pad") == (0, 0, 400, 300, 168, 224)
        assert placement(256, 256, (224, 224), crop=0.875) == (16, 16, 240, 240, 224, 224)

    def test_resize_modes(self, tmp_path: Path):
        pixels = np.zeros((20, 60, 3), dtype=np.uint8)
        pixels[:, 20:40] = 255
        path = saved(tmp_path, pixels)
        assert load_image(path, 10).min() > 0.9  # the white middle
        squashed = load_image(path, (8, 6), resize="squash")
        assert squashed.shape == (3, 8, 6)
        assert squashed[:, :, 0].max() < 0.2
        padded = load_image(path, 12, resize="pad", background=0.0)
        assert padded[:, :4].max() == 0
        assert padded[:, 5:7, 4:8].min() > 0.8
        assert load_image(path, 12, resize="pad")[:, 0].min() == 1  # white beside it

    def test_is_what_torchvision_does(self, tmp_path: Path):
        from torchvision import transforms

        rng = np.random.default_rng(0)
        small = Image.fromarray(rng.integers(0, 256, (12, 15, 3), dtype=np.uint8))
        path = saved(tmp_path, small.resize((75, 60), Image.Resampling.BICUBIC))
        theirs = transforms.Compose([transforms.Resize(32), transforms.CenterCrop(28), transforms.ToTensor()])
        ours = load_image(path, 28, crop=28 / 32, interpolation="bilinear")
        assert (ours - theirs(Image.open(path))).abs().mean() < 0.01

    def test_wrong_options(self, tmp_path: Path):
        path = saved(tmp_path, Image.new("RGB", (4, 4)))
        with pytest.raises(InputError, match="resize='squash'"):
            load_image(path, 2, crop=False)
        for wrong in ({"size": 0}, {"size": "big"}, {"size": (1, 2, 3)}, {"resize": "stretch"}, {"mode": "HSV"},
                      {"interpolation": "cubic"}, {"background": 2}, {"bands": "RGB"}, {"bands": ()},
                      {"value_range": (1, 1)}, {"transform": 3}, {"transform": np.array, "size": 3}):  # fmt: skip
            with pytest.raises(InputError):
                load_image(path, **wrong)


class TestBrokenFiles:
    def test_broken(self, tmp_path: Path):
        good = saved(tmp_path, Image.effect_noise((64, 64), 50).convert("RGB"), "a.jpg").read_bytes()
        for name, content in {"empty.png": b"", "text.png": b"no image", "cut.jpg": good[:600]}.items():
            (tmp_path / name).write_bytes(content)
            with pytest.raises(InputError, match=name.replace(".", r"\.")):
                load_image(tmp_path / name)
        with pytest.raises(InputError, match=r"none\.png"):
            load_image(tmp_path / "none.png")

    def test_size_limit(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        assert image_files.MOST_PIXELS == 100_000_000
        path = saved(tmp_path, Image.new("1", (300, 200)))
        monkeypatch.setattr(image_files, "MOST_PIXELS", 50_000)
        with pytest.raises(InputError, match="300 x 200 pixels, more than 50,000"):
            load_image(path)


JUNK = ("__MACOSX/a.jpg", "._a.jpg", ".ipynb_checkpoints/a.jpg", "Thumbs.db", "desktop.ini", ".DS_Store", ".hidden.png")


class TestFolders:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        for name in ("cat/1.png", "cat/2.JPG", "dog/1.png"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            Image.new("RGB", (4, 4)).save(tmp_path / name, "png")
        for name in JUNK:
            for path in (tmp_path / name, tmp_path / "cat" / name):
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(b"junk")
        return tmp_path

    def test_junk_is_passed_over(self, root: Path):
        assert names_of(find_images(root), root) == ["cat/1.png", "cat/2.JPG", "dog/1.png"]
        assert {name: len(found) for name, found in class_folders(root).items()} == {"cat": 2, "dog": 1}

    def test_patterns(self, root: Path):
        assert len(find_images(f"{root}/*/*.png")) == 2
        assert len(find_images(f"{root}/**/*")) == 3
        assert len(find_images([f"{root}/c*", root / "dog" / "1.png"])) == 3
        with pytest.raises(InputError, match="no image in"):
            find_images(f"{root}/*.gif")

    def test_links(self, root: Path):
        (root / "cat" / "loop").symlink_to(root)
        (root / "bird").symlink_to(root / "dog")
        assert len(find_images(root)) == 4 - 1  # the folder behind a link counts once
        assert list(class_folders(root)) == ["bird", "cat", "dog"]

    def test_links_to_other_folders_are_followed(self, root: Path):
        (root.parent / "other").mkdir()
        (root / "fox").symlink_to(root.parent / "other")
        count = len(find_images(root))
        Image.new("RGB", (4, 4)).save(root.parent / "other" / "1.png")
        assert len(find_images(root)) == count + 1

    def test_a_folder_that_cannot_be_opened_is_said(self, root: Path, monkeypatch: pytest.MonkeyPatch):
        scan = os.scandir

        def closed(path: str) -> object:  # also for root, who may open all
            if Path(path) == root / "cat":
                raise PermissionError(13, "Permission denied", str(path))
            return scan(path)

        monkeypatch.setattr(os, "scandir", closed)
        with pytest.warns(InputWarning, match=r"are skipped: .*Permission denied.*cat"):
            assert names_of(find_images(root), root) == ["dog/1.png"]

    def test_nothing_there(self, tmp_path: Path):
        with pytest.raises(InputError, match="no image"):
            find_images(tmp_path)
        with pytest.raises(InputError, match="contains no folders"):
            class_folders(tmp_path)
        with pytest.raises(InputError, match="web address"):
            find_images("https://example.org/a.png")
        (tmp_path / "empty").mkdir()
        with pytest.raises(InputError, match="empty"):
            class_folders(tmp_path)

    def test_names(self):
        assert names_of([Path("a/1.png"), Path("b/2.png")]) == ["1.png", "2.png"]
        assert names_of([Path("x/a/1.png"), Path("x/b/1.png")]) == ["a/1.png", "b/1.png"]
        assert names_of([Path("a/1.png"), Path("a/1.png")]) == ["1.png", "1.png"]


class TestWords:
    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252", "utf-16", "utf-16-le", "utf-16-be"])
    @pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
    def test_encodings(self, tmp_path: Path, encoding: str, end: str):
        path = tmp_path / "words.txt"
        path.write_bytes(end.join(["cat", "", "café noir", " dog "]).encode(encoding))
        assert read_words(path) == ["cat", "café noir", "dog"]

    @pytest.mark.parametrize(
        "text",
        ['["a", "b"]', '[["n1", "a"], ["n2", "b"]]', '{"1": "b", "0": "a"}', '{"b": 1, "a": 0}',
         '{"0": ["n1", "a"], "1": ["n2", "b"]}'],
    )  # fmt: skip
    def test_json(self, tmp_path: Path, text: str):
        (tmp_path / "names.json").write_text(text, encoding="utf-8-sig")
        assert read_words(tmp_path / "names.json") == ["a", "b"]

    @pytest.mark.parametrize(
        ("content", "message"),
        [(b"[", "not valid JSON"), (b"3", "list or object"), (b'{"0": "a", "2": "b"}', "indices 0, 1, 2"),
         (b'[{"name": "a"}]', "must contain names"), (b"[]", "no names"), (b"\x81\x00\x8d", "not a text file")],
    )  # fmt: skip
    def test_refused(self, tmp_path: Path, content: bytes, message: str):
        (tmp_path / "names.json").write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_words(tmp_path / "names.json")

    def test_missing(self, tmp_path: Path):
        with pytest.raises(InputError, match=r"none\.txt cannot be read"):
            read_words(tmp_path / "none.txt")
        (tmp_path / "a.json").write_text("{}")
        assert read_json(tmp_path / "a.json") == {}


def test_paths_that_are_none():
    with pytest.raises(InputError, match="the path of the images is empty"):
        find_images("")
    with pytest.raises(InputError, match="is not a path: File name too long"):
        find_images("a" * 5000)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_gray_files_of_any_depth_have_three_channels(tmp_path: Path, dtype):
    path = saved(tmp_path, Image.fromarray(np.full((3, 4), np.iinfo(dtype).max // 3, dtype)), "gray.png")
    image = load_image(path, mode="any")
    assert image.shape == (3, 3, 4)
    assert torch.allclose(image, torch.tensor(1 / 3), atol=1e-3)
