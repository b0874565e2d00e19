"""Readers of segmentation data sets, each on a tiny tree written here in the data set's own format."""

from __future__ import annotations

import csv
import importlib
import io
import json
import pickle
import sys
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

from captum_concepts import metrics
from captum_concepts.datasets import (
    Broden,
    COCOPanoptic,
    ImageNetS,
    ImageNetSegmentation,
    MaskFolder,
    PascalVOC,
    collate_segmented,
)
from captum_concepts.errors import InputError, InputWarning

H, W = 24, 32


def photo(seed: int, height: int = H, width: int = W) -> np.ndarray:
    """A picture smooth enough for JPEG."""
    rng = np.random.default_rng(seed)
    return np.asarray(Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)).resize((width, height)))


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def rgb(ids: np.ndarray) -> np.ndarray:
    """Ids as R + 256 G + 65536 B."""
    return np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)


def rectangle(value: int, top: int, left: int, bottom: int, right: int, on: np.ndarray | None = None) -> np.ndarray:
    ids = np.zeros((H, W), dtype=np.int64) if on is None else on.copy()
    ids[top:bottom, left:right] = value
    return ids


def mask_of(item, concept: str) -> np.ndarray:
    return item.masks[item.concepts.index(concept)].numpy()


# ------------------------------------------------------------------------------------------------------ MaskFolder

IDS = [
    rectangle(3, 12, 20, 24, 32, on=rectangle(1, 2, 3, 10, 9)),
    rectangle(1, 0, 0, 5, 5),
    rectangle(0, 0, 0, 1, 1),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "coco"
    for i, ids in enumerate(IDS):
        save(root / "images" / f"{i}.jpg", photo(i))
        save(root / "masks" / f"{i}.png", ids.astype(np.uint8))
    (root / "classes.json").write_text(json.dumps({"0": "unlabeled", "1": "cat", "2": "dog", "3": "sky"}))
    return root


class TestMaskFolder:
    def test_items(self, folder: Path):
        data = MaskFolder(folder)
        assert data.concepts == ["cat", "dog", "sky"]
        assert len(data) == 3
        item = data[0]
        assert item.image.shape == (3, H, W)
        assert item.image.dtype == torch.float32
        assert 0 <= item.image.min() <= item.image.max() <= 1
        assert np.abs(item.image.numpy() * 255 - photo(0).transpose(2, 0, 1)).mean() < 8  # JPEG's error
        assert item.concepts == ("cat", "sky")
        assert item.target.tolist() == [0, 2]
        assert item.masks.dtype == item.ignore.dtype == torch.bool
        assert (mask_of(item, "cat") == (IDS[0] == 1)).all()
        assert (mask_of(item, "sky") == (IDS[0] == 3)).all()
        assert (item.ignore.numpy() == (IDS[0] == 0)).all()
        assert (item.label, item.name) == (None, "0.jpg")

    def test_a_jpeg_is_no_mask(self, folder: Path):
        (folder / "masks" / "0.png").unlink()
        save(folder / "masks" / "0.jpg", IDS[0].astype(np.uint8))
        with pytest.raises(InputError, match=r"0\.jpg is a JPEG, which changes pixel values"):
            MaskFolder(folder)[0]

    @pytest.mark.parametrize("void", [255, "255"])
    def test_one_value_to_ignore_is_a_list(self, folder: Path, void):
        with pytest.raises(InputError, match=r"as in void=\[255\]"):
            MaskFolder(folder, void=void)

    def test_a_picture_without_concepts(self, folder: Path):
        item = MaskFolder(folder)[2]
        assert item.masks.shape == (0, H, W)
        assert item.masks.dtype == torch.bool
        assert (item.concepts, item.target.tolist()) == ((), [])

    def test_unlabelled_pixels_as_background(self, folder: Path):
        assert not MaskFolder(folder, unlabelled="background")[0].ignore.any()
        with pytest.raises(InputError, match="'ignore' or 'background'"):
            MaskFolder(folder, unlabelled="drop")

    def test_further_void_values(self, folder: Path):
        save(folder / "masks" / "1.png", rectangle(255, 0, 0, 5, 5).astype(np.uint8))
        data = MaskFolder(folder, unlabelled="background", void=[255])
        assert (data[1].ignore.numpy() == (IDS[1] == 1)).all()
        assert not data[0].ignore.any()

    def test_sequence_protocol(self, folder: Path):
        data = MaskFolder(folder)
        assert data[-1].name == "2.jpg"
        assert [item.name for item in data] == ["0.jpg", "1.jpg", "2.jpg"]
        with pytest.raises(IndexError):
            data[3]
        assert "3 images, 3 concepts" in repr(data)

    def test_chosen_concepts_in_their_order(self, folder: Path):
        item = MaskFolder(folder, concepts=["sky", "cat"])[0]
        assert item.concepts == ("sky", "cat")
        assert item.target.tolist() == [0, 1]
        assert MaskFolder(folder, concepts=["sky"])[0].concepts == ("sky",)
        with pytest.raises(InputError, match="Did you mean 'sky'"):
            MaskFolder(folder, concepts=["skyy"])
        with pytest.raises(InputError, match="more than once"):
            MaskFolder(folder, concepts=["sky", "sky"])
        with pytest.raises(InputError, match="list of names"):
            MaskFolder(folder, concepts="sky")

    def test_min_area_is_a_share_of_the_returned_picture(self, folder: Path):
        share = (IDS[0] == 1).mean()  # cat 48 of 768 pixels; sky 144
        assert MaskFolder(folder, min_area=share)[0].concepts == ("cat", "sky")
        assert MaskFolder(folder, min_area=share + 1e-6)[0].concepts == ("sky",)
        dense = MaskFolder(folder, min_area=0.1, regions="all")[0]
        assert dense.masks.sum((1, 2)).tolist() == [0, 0, 144]
        with pytest.raises(InputError, match="min_area=1"):
            MaskFolder(folder, min_area=1)

    def test_regions_all(self, folder: Path):
        item = MaskFolder(folder, regions="all")[1]
        assert item.masks.shape == (3, H, W)
        assert item.masks.any(2).any(1).tolist() == [True, False, False]
        assert item.concepts == ("cat", "dog", "sky")
        assert item.target is None
        with pytest.raises(InputError, match="class for each image"):
            MaskFolder(folder, regions="label")[0]
        with pytest.raises(InputError, match="regions must be one of"):
            MaskFolder(folder, regions="some")

    def test_names_that_occur_twice_are_told_apart(self, folder: Path):
        (folder / "classes.json").write_text(json.dumps({"1": "crane", "2": "dog", "3": "crane"}))
        assert MaskFolder(folder).concepts == ["crane (1)", "dog", "crane (3)"]

    def test_sixteen_bit_masks(self, folder: Path):
        save(folder / "masks" / "0.png", np.where(IDS[0] == 3, 40_000, IDS[0]).astype(np.uint16))
        (folder / "classes.json").write_text(json.dumps({"1": "cat", "40000": "sky"}))
        assert (mask_of(MaskFolder(folder)[0], "sky") == (IDS[0] == 3)).all()


class TestGeometry:
    @pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
    @pytest.mark.parametrize("size", [16, (12, 20), (48, 30)])
    def test_masks_move_with_the_picture(self, tmp_path: Path, resize: str, size):
        """A white rectangle on black: where the resized picture is white, the resized mask is True."""
        ids = rectangle(1, 4, 9, 19, 26)
        save(tmp_path / "images" / "a.png", np.repeat((ids * 255).astype(np.uint8)[..., None], 3, -1))
        save(tmp_path / "masks" / "a.png", ids.astype(np.uint8))
        (tmp_path / "classes.json").write_text('{"1": "box"}')
        item = MaskFolder(tmp_path, size=size, resize=resize)[0]
        height, width = (size, size) if isinstance(size, int) else size
        assert item.image.shape == (3, height, width)
        assert item.masks.shape == (1, height, width)
        bright = item.image[0]
        beside = torch.zeros_like(item.masks[0])
        if resize == "pad":  # beside the image it is white, and ignored
            high, wide = (round(side * min(height / H, width / W)) for side in (H, W))
            top, left = (height - high) // 2, (width - wide) // 2
            beside = ~torch.nn.functional.pad(
                ~beside[:high, :wide], (left, width - wide - left, top, height - high - top)
            )
        assert torch.equal(item.ignore & beside, beside)
        clear = ((bright < 0.05) | (bright > 0.95)) & ~beside
        assert clear[~beside].float().mean() > 0.6
        assert torch.equal((bright > 0.5)[clear], item.masks[0][clear])

    def test_nearest_neighbour_against_a_loop(self, folder: Path):
        height, width = 10, 13
        item = MaskFolder(folder, size=(height, width), resize="squash")[0]
        for y in range(height):
            for x in range(width):
                value = IDS[0][int((y + 0.5) * H / height), int((x + 0.5) * W / width)]
                found = [name for name in item.concepts if mask_of(item, name)[y, x]]
                assert found == {0: [], 1: ["cat"], 3: ["sky"]}[value]

    def test_a_concept_outside_the_crop_is_absent(self, folder: Path):
        assert MaskFolder(folder, size=24)[1].concepts == ("cat",)  # columns 4 to 27 remain, cat fills 0 to 4
        assert MaskFolder(folder, size=(24, 8))[1].concepts == ()
        assert MaskFolder(folder, size=(24, 8), resize="squash")[1].concepts == ("cat",)

    @pytest.mark.parametrize(
        ("orientation", "drawn_on"), [(o, "stored") for o in range(2, 9)] + [(o, "turned") for o in range(5, 9)]
    )
    def test_exif_rotation_turns_both(self, tmp_path: Path, orientation: int, drawn_on: str):
        """Masks are drawn on the stored pixels, or, where their shape tells (5 to 8), on the turned ones."""
        ids = rectangle(1, 2, 3, 10, 30)
        picture = Image.fromarray(np.repeat((ids * 255).astype(np.uint8)[..., None], 3, -1))
        exif = picture.getexif()
        exif[0x0112] = orientation
        (tmp_path / "images").mkdir()
        picture.save(tmp_path / "images" / "a.png", exif=exif)
        mask = ids.astype(np.uint8)
        if drawn_on == "turned":
            with Image.open(tmp_path / "images" / "a.png") as stored:
                mask = np.asarray(ImageOps.exif_transpose(stored).convert("L")) // 255
        save(tmp_path / "masks" / "a.png", mask)
        (tmp_path / "classes.json").write_text('{"1": "box"}')
        with nullcontext() if orientation >= 5 else pytest.warns(InputWarning, match=f"EXIF orientation {orientation}"):
            item = MaskFolder(tmp_path)[0]
        assert torch.equal(item.masks[0], item.image[0] > 0.5)

    @pytest.mark.parametrize("orientation", range(2, 9))
    def test_a_square_does_not_tell_how_its_mask_was_drawn(self, tmp_path: Path, orientation: int):
        picture = Image.fromarray(photo(0, 24, 24))
        exif = picture.getexif()
        exif[0x0112] = orientation
        (tmp_path / "images").mkdir()
        picture.save(tmp_path / "images" / "a.png", exif=exif)
        save(tmp_path / "masks" / "a.png", rectangle(1, 2, 3, 10, 20)[:24, :24].astype(np.uint8))
        (tmp_path / "classes.json").write_text('{"1": "box"}')
        with pytest.warns(InputWarning, match=r"assumed to match the pixels as stored"):
            MaskFolder(tmp_path)[0]

    @pytest.mark.parametrize("size", [0, (4, -1), "big", (1, 2, 3), True, 2.5])
    def test_bad_sizes(self, folder: Path, size):
        with pytest.raises(InputError, match="size must be"):
            MaskFolder(folder, size=size)
        with pytest.raises(InputError, match="resize='squash'"):  # what crop=False meant
            MaskFolder(folder, crop=False)


class TestBrokenTrees:
    def test_missing(self, folder: Path, tmp_path: Path):
        with pytest.raises(InputError, match=r"(?s)nowhere.*ROOT/masks/NAME\.png"):
            MaskFolder(tmp_path / "nowhere")
        (folder / "masks" / "1.png").unlink()
        with pytest.raises(InputError, match=r"no mask of the same name.*1\.jpg"):
            MaskFolder(folder)
        (folder / "images" / "1.jpg").unlink()
        (folder / "images" / "2.jpg").unlink()
        with pytest.raises(InputError, match=r"no image of the same name.*2\.png"):
            MaskFolder(folder)

    def test_two_images_of_one_name(self, folder: Path):
        save(folder / "images" / "1.png", photo(1))
        with pytest.raises(InputError, match=r"1\.jpg.*1\.png.*same name"):
            MaskFolder(folder)

    def test_sizes_that_do_not_fit(self, folder: Path):
        save(folder / "masks" / "1.png", np.zeros((H, W + 1), dtype=np.uint8))
        data = MaskFolder(folder, size=16)  # nothing but the index is read here
        assert data[0].concepts
        with pytest.raises(InputError, match=r"1\.png has 33 x 24 pixels, but its image 1\.jpg has 32 x 24"):
            data[1]

    def test_unknown_ids(self, folder: Path):
        save(folder / "masks" / "1.png", np.full((H, W), 77, dtype=np.uint8))
        with pytest.raises(InputError, match=r"1\.png contains the label ids \[77\]"):
            MaskFolder(folder)[1]

    def test_broken_files_are_named(self, folder: Path):
        data = MaskFolder(folder)
        (folder / "masks" / "0.png").write_bytes(b"not an image")
        with pytest.raises(InputError, match=r"0\.png cannot be read as a label image"):
            data[0]
        (folder / "images" / "1.jpg").write_bytes(b"\xff\xd8")
        with pytest.raises(InputError, match=r"1\.jpg"):
            data[1]
        save(folder / "masks" / "2.png", photo(0))
        with pytest.raises(InputError, match=r"2\.png must have one channel"):
            data[2]
        (folder / "images" / "2.jpg").unlink()
        save(folder / "masks" / "2.png", IDS[2].astype(np.uint8))
        with pytest.raises(InputError, match=r"no image at .*2\.jpg"):
            data[2]

    @pytest.mark.parametrize("text", ["{", "[]", '{"one": "cat"}'])
    def test_broken_class_table(self, folder: Path, text: str):
        (folder / "classes.json").write_text(text)
        with pytest.raises(InputError, match=r"classes\.json"):
            MaskFolder(folder)


# --------------------------------------------------------------------------------------------------------- batches


class TestLoading:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_ragged_batches(self, folder: Path, workers: int):
        loader = DataLoader(
            MaskFolder(folder, size=16), batch_size=3, num_workers=workers, collate_fn=collate_segmented
        )
        (batch,) = loader
        data = MaskFolder(folder, size=16)
        assert batch.images.shape == (3, 3, 16, 16)
        assert batch.image_index.tolist() == [0, 0, 1]
        assert batch.concepts == ("cat", "sky", "cat")
        assert batch.target.tolist() == [0, 2, 0]
        assert torch.equal(batch.masks, torch.cat([item.masks for item in data]))
        assert torch.equal(batch.ignore, torch.stack([data[i].ignore for i in (0, 0, 1)]))
        assert torch.equal(batch["inputs"], batch.images[[0, 0, 1]])
        assert batch.names == ("0.jpg", "1.jpg", "2.jpg")
        assert batch.labels is None

    def test_dense_batches_with_either_collate_function(self, folder: Path):
        data = MaskFolder(folder, size=16, regions="all")
        ours = next(iter(DataLoader(data, batch_size=3, collate_fn=collate_segmented)))
        default = next(iter(DataLoader(data, batch_size=3)))
        assert ours.masks.shape == (3, 3, 16, 16)
        assert set(ours) == set(default) == {"inputs", "masks", "concepts", "ignore"}
        for key in ("inputs", "masks", "ignore"):
            assert torch.equal(ours[key], default[key])

    def test_images_of_different_sizes(self, folder: Path):
        save(folder / "images" / "1.jpg", photo(1, 30, 30))
        save(folder / "masks" / "1.png", np.ones((30, 30), dtype=np.uint8))
        with pytest.raises(InputError, match="construct the data set with size="):
            collate_segmented(list(MaskFolder(folder)))

    @pytest.mark.parametrize("workers", [0, 2])
    def test_pairs(self, folder: Path, workers: int):
        data = MaskFolder(folder, size=16)
        rows = list(DataLoader(data.pairs(), batch_size=None, num_workers=workers))
        expected = {(name, target) for item in data for name, target in ((item.name, t) for t in item.target.tolist())}
        assert len(rows) == len(expected) == 3
        for item in data:
            for mask, name in zip(item.masks, item.concepts, strict=True):
                (row,) = [r for r in rows if r["concepts"] == name and torch.equal(r["inputs"], item.image)]
                assert torch.equal(row["masks"], mask)
                assert torch.equal(row["ignore"], item.ignore)
        batch = next(iter(DataLoader(data.pairs(), batch_size=3)))
        assert batch["masks"].shape == (3, 16, 16)

    def test_items_can_be_pickled(self, folder: Path):
        item = pickle.loads(pickle.dumps(MaskFolder(folder)[0]))
        assert item.concepts == ("cat", "sky")
        assert "masks=(2, 24, 32)" in repr(item)


def oracle(data):
    """For images and names of concepts the true mask, found again by the image's pixels."""
    known = {item.image.sum().item(): dict(zip(item.concepts, item.masks, strict=True)) for item in data}

    def maps(inputs, concepts):
        if len(concepts) != len(inputs):  # the names of several masks of one image
            return torch.stack([known[x.sum().item()][name].float() for x in inputs for name in concepts])[None]
        return torch.stack([known[x.sum().item()][name].float() for x, name in zip(inputs, concepts, strict=True)])

    return maps


class TestEvaluate:
    """`metrics.evaluate` takes the data sets as they are."""

    def test_pairs_with_targets(self, folder: Path):
        data = MaskFolder(folder, size=16, unlabelled="background")
        true = oracle(data)
        table = metrics.evaluate(
            {"right": true, "wrong": lambda inputs, concepts: -true(inputs, concepts)}, data.pairs(), ["nra", "epg"]
        )
        assert [table.row("right", m)["value"] for m in ("nra", "epg")] == [1, 1]
        assert [table.row("wrong", m)["value"] for m in ("nra", "epg")] == [0, 0]
        assert table.row("right", "nra")["examples"] == 3

    def test_ragged_loader(self, folder: Path):
        data = MaskFolder(folder, size=16, unlabelled="background")
        loader = DataLoader(data, batch_size=2, collate_fn=collate_segmented)
        loaded = [batch for batch in loader if len(batch.masks)]
        row = metrics.evaluate({"right": oracle(data)}, loaded, ["nra"], n_bootstrap=0).row("right", "nra")
        assert (row["value"], row["examples"]) == (1, 3)

    def test_all_concepts_at_once_and_ignored_pixels(self, folder: Path):
        data = MaskFolder(folder, size=16, regions="all")
        known = {item.image.sum().item(): item for item in data}

        def leaky(inputs):
            """The true masks, but also everything unlabelled, which must not count."""
            items = [known[x.sum().item()] for x in inputs]
            return torch.stack([(item.masks | item.ignore).float() for item in items])

        row = metrics.evaluate({"leaky": leaky}, data, ["epg"], n_bootstrap=0).row("leaky", "epg")
        assert (row["value"], row["counted"], row["skipped"]) == (1, 3, 6)
        strict = MaskFolder(folder, size=16, regions="all", unlabelled="background")
        assert metrics.evaluate({"leaky": leaky}, strict, ["epg"], n_bootstrap=0).row("leaky", "epg")["value"] < 0.7


# ---------------------------------------------------------------------------------------------------------- Broden

LABELS = [
    (1, "wall", "object(5);material(1)"), (2, "wheel", "part(3)"), (3, "car", "object(4)"), (4, "red-c", "color(9)"),
    (300, "door", "part(3);object(1)"), (301, "street-s", "scene(2)"), (302, "dotted", "texture(1)"),
]  # fmt: skip


@pytest.fixture
def broden(tmp_path: Path) -> Path:
    """As broden1_224: label maps at half the picture's size, several for one category, whole-image labels."""
    root = tmp_path / "broden1_24"
    half = (H // 2, W // 2)
    maps = {
        "a_object": np.full(half, 1), "a_part_1": np.zeros(half, int), "a_part_2": np.zeros(half, int),
        "a_color": np.zeros(half, int),
    }  # fmt: skip
    maps["a_object"][6:, 4:12] = 3
    maps["a_part_1"][8:, 4:6] = 2
    maps["a_part_1"][2:4, 0:2] = 300
    maps["a_part_2"][7:10, 7:9] = 300
    maps["a_color"][6:8, 4:12] = 4
    for name, ids in maps.items():
        save(root / "images" / "ade" / f"{name}.png", rgb(ids))
    save(root / "images" / "ade" / "a.jpg", photo(0))
    save(root / "images" / "dtd" / "b.jpg", photo(1))
    header = ["image", "split", "ih", "iw", "sh", "sw", "color", "object", "part", "material", "scene", "texture"]
    part = "ade/a_part_1.png;ade/a_part_2.png"
    rows = [
        ["ade/a.jpg", "train", H, W, *half, "ade/a_color.png", "ade/a_object.png", part, "", "301", ""],
        ["dtd/b.jpg", "val", H, W, *half, "", "", "", "", "", "302;301"],
    ]
    write_csv(root / "index.csv", header, rows)
    label = ["number", "name", "category", "frequency", "coverage", "syns"]
    write_csv(root / "label.csv", label, [[n, name, kind, 3, 0.5, name] for n, name, kind in LABELS])
    write_csv(
        root / "category.csv", ["name", "first", "last", "count", "frequency"], [[n, 0, 9, 9, 9] for n in header[6:]]
    )
    return root


def write_csv(path: Path, header: list[str], rows: list[list]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


class TestBroden:
    def test_several_labels_for_one_pixel(self, broden: Path):
        data = Broden(broden)
        assert data.concepts == ["wall", "wheel", "car", "red-c", "door", "street-s", "dotted"]
        item = data[0]
        assert item.concepts == ("wall", "wheel", "car", "red-c", "door", "street-s")
        assert mask_of(item, "street-s").all()
        assert mask_of(item, "car").sum() == 12 * 16
        expected = np.zeros((H, W), dtype=bool)  # the union of both part maps, at twice their size
        expected[4:8, 0:4] = expected[14:20, 14:18] = True
        assert (mask_of(item, "door") == expected).all()
        assert not (mask_of(item, "wheel") & ~mask_of(item, "car")).any()
        assert not item.ignore.any()
        assert data[1].concepts == ("street-s", "dotted")
        assert data[1].masks.all()

    def test_categories_and_split(self, broden: Path):
        data = Broden(broden, categories=["object"])
        assert (data.concepts, len(data)) == (["wall", "car", "door"], 1)
        assert data[0].concepts == ("wall", "car")  # the door is a part here
        assert data.concept_categories == [("object", "material"), ("object",), ("part", "object")]
        assert [item.name for item in Broden(broden, split="val")] == ["dtd/b.jpg"]
        assert Broden(broden, categories="texture")[0].concepts == ("dotted",)
        with pytest.raises(InputError, match="Did you mean 'object'"):
            Broden(broden, categories=["objects"])
        with pytest.raises(InputError, match="split='test' must be one of"):
            Broden(broden, split="test")

    def test_size(self, broden: Path):
        item = Broden(broden, size=(12, 16), resize="squash")[0]
        assert mask_of(item, "car").sum() == 6 * 8

    def test_missing_and_broken(self, broden: Path, tmp_path: Path):
        with pytest.raises(InputError, match=r"(?s)index\.csv.*netdissect\.csail\.mit\.edu"):
            Broden(tmp_path)
        png = broden / "images" / "ade" / "a_object.png"
        save(png, np.full((12, 16), 5, dtype=np.uint8))
        with pytest.raises(InputError, match=r"a_object\.png must be an RGB image"):
            Broden(broden)[0]
        save(png, rgb(np.full((12, 16), 999)))
        with pytest.raises(InputError, match=r"a_object\.png contains the label ids \[999\]"):
            Broden(broden)[0]
        png.unlink()
        with pytest.raises(InputError, match=r"no label image at .*a_object\.png"):
            Broden(broden)[0]
        write_csv(broden / "label.csv", ["number", "name"], [[1, "wall"]])
        with pytest.raises(InputError, match=r"label\.csv lacks the columns \['category'\]"):
            Broden(broden)
        (broden / "index.csv").write_text("image,split,color,object,part,material,scene,texture\nade/a.jpg,train\n")
        write_csv(broden / "label.csv", ["number", "name", "category"], [[1, "wall", "object(1)"]])
        with pytest.raises(InputError, match=r"index\.csv is truncated or damaged in row 2"):
            Broden(broden)


# ------------------------------------------------------------------------------------------------------ ImageNet-S

WNIDS = ["n02012849", "n01443537", "n03126707"]  # the bird crane, goldfish, the machine crane; not sorted, as im919


@pytest.fixture
def imagenet_s(tmp_path: Path) -> Path:
    root = tmp_path / "ImageNetS919"
    for i, wnid in enumerate(WNIDS):
        for split in ("validation", "train-semi"):
            name = f"ILSVRC2012_val_{i:08}"
            save(root / split / wnid / f"{name}.png", photo(i)).rename(root / split / wnid / f"{name}.JPEG")
            ids = rectangle(i + 1, 4, 4, 12, 20, on=rectangle(1000, 3, 3, 13, 21))
            save(root / f"{split}-segmentation" / wnid / f"{name}.png", rgb(ids))
    (tmp_path / "ImageNetS_categories_im919.txt").write_text("\n".join(WNIDS))
    return root


class TestImageNetS:
    def test_table_of_the_published_order(self, imagenet_s: Path):
        data = ImageNetS(imagenet_s)
        assert data.wnids == WNIDS
        assert data.concepts[1] == "goldfish"
        assert len(set(data.concepts)) == 3
        items = {item.name.split("/")[0]: item for item in data}
        assert [items[w].label for w in WNIDS] == [134, 1, 517]
        item = items["n01443537"]
        assert item.concepts == ("goldfish",)
        assert (item.masks[0].numpy() == (rectangle(1, 4, 4, 12, 20) == 1)).all()
        assert item.ignore.sum() == 10 * 18 - 8 * 16
        assert (item.ignore & item.masks[0]).sum() == 0

    def test_two_bytes(self, imagenet_s: Path):
        """Class 258 = 2 + 256 * 1; 65535 is ignored like 1000."""
        table = [f"n{i:08}" for i in range(1, 919)]
        table[257] = "n01443537"
        ids = rectangle(65535, 0, 0, 2, 2, on=rectangle(258, 4, 4, 12, 20))
        for wnid in ("n02012849", "n03126707"):
            for split in ("validation", "validation-segmentation"):
                for file in (imagenet_s / split / wnid).iterdir():
                    file.unlink()
                (imagenet_s / split / wnid).rmdir()
        save(imagenet_s / "validation-segmentation" / "n01443537" / "ILSVRC2012_val_00000001.png", rgb(ids))
        item = ImageNetS(imagenet_s, categories=table)[0]
        assert item.concepts == ("goldfish",)
        assert item.target.tolist() == [257]
        assert (int(item.masks.sum()), int(item.ignore.sum())) == (8 * 16, 4)

    def test_the_mask_of_the_own_class(self, imagenet_s: Path):
        data = ImageNetS(imagenet_s, "train-semi", regions="label", size=16)
        item = data[0]  # sorted folders: the goldfish
        assert (item.masks.shape, item.target, item.concepts) == ((16, 16), 1, ("goldfish",))
        batch = collate_segmented(list(data))
        assert batch.target.tolist() == batch.labels.tolist() == [1, 134, 517]
        assert batch.masks.shape == batch.ignore.shape == (3, 16, 16)
        seen = []

        def explainer(inputs, target):
            seen.extend(target.tolist())
            return torch.stack([data[[1, 134, 517].index(t)].masks.float() for t in target.tolist()])

        row = metrics.evaluate({"e": explainer}, data, ["nra"], n_bootstrap=0).row("e", "nra")
        assert (seen, row["value"]) == ([1, 134, 517], 1)
        with pytest.raises(InputError, match="not among the concepts"):
            ImageNetS(imagenet_s, regions="label", concepts=["goldfish"])[1]

    def test_class_table(self, imagenet_s: Path, tmp_path: Path):
        table = tmp_path / "ImageNetS_categories_im919.txt"
        assert ImageNetS(imagenet_s, categories=table).wnids == WNIDS
        assert ImageNetS(imagenet_s, categories=WNIDS).wnids == WNIDS
        with pytest.raises(InputError, match="not in the class table"):
            ImageNetS(imagenet_s, categories=WNIDS[:2])
        with pytest.raises(InputError, match="one WordNet id"):
            ImageNetS(imagenet_s, categories=["goldfish"])
        table.unlink()
        with pytest.raises(InputError, match=r"3 class folders.*ImageNetS_categories_im919\.txt"):
            ImageNetS(imagenet_s)

    def test_sorted_folders_where_all_fifty_are_there(self, imagenet_s: Path, tmp_path: Path):
        root = imagenet_s.rename(tmp_path / "ImageNetS50")
        for i in range(47):
            ids = np.full((H, W), 50)
            save(root / "validation" / f"n1{i:07}" / "x.JPEG", photo(9))
            save(root / "validation-segmentation" / f"n1{i:07}" / "x.png", rgb(ids))
        for i, wnid in enumerate(sorted(WNIDS), start=1):
            (file,) = (root / "validation-segmentation" / wnid).iterdir()
            save(file, rgb(np.full((H, W), i)))
        data = ImageNetS(root, regions="label")
        assert data.wnids[:3] == sorted(WNIDS)
        assert all(data[i].masks.all() for i in range(3))

    def test_missing(self, imagenet_s: Path, tmp_path: Path):
        with pytest.raises(InputError, match=r"(?s)test-segmentation|test.*LUSSeg/ImageNet-S"):
            ImageNetS(imagenet_s, "test")
        (file,) = (imagenet_s / "validation-segmentation" / WNIDS[0]).iterdir()
        file.rename(file.with_name("other.png"))
        with pytest.raises(InputError, match="no mask of the same name"):
            ImageNetS(imagenet_s)


# -------------------------------------------------------------------------------------------- ImageNet-segmentation


class TestImageNetSegmentationFolder:
    def test_any_value_but_zero_is_foreground(self, tmp_path: Path):
        save(tmp_path / "images" / "a.jpg", photo(0))
        save(tmp_path / "masks" / "a.png", rectangle(255, 0, 0, 5, 6).astype(np.uint8))
        item = ImageNetSegmentation(tmp_path)[0]
        assert (item.masks.shape, int(item.masks.sum())) == ((H, W), 30)
        assert item.concepts == ("foreground",)
        assert item.target is None
        assert ImageNetSegmentation(tmp_path, regions="present")[0].masks.shape == (1, H, W)
        table = metrics.evaluate(
            {"mean": lambda x: x.mean(1)}, ImageNetSegmentation(tmp_path, size=16),
            ["pixel_accuracy", "mean_iou", "average_precision"], n_bootstrap=0,
        )  # fmt: skip
        assert {row["examples"] for row in table.rows} == {1}
        with pytest.raises(InputError, match="no classes"):
            ImageNetSegmentation(tmp_path, labelled=True)

    def test_missing_folders(self, tmp_path: Path):
        (tmp_path / "images").mkdir()
        with pytest.raises(InputError, match=r"(?s)masks.*gtsegs_ijcv\.mat"):
            ImageNetSegmentation(tmp_path)

    def test_missing_file_and_missing_h5py(self, tmp_path: Path, monkeypatch):
        with pytest.raises(InputError, match=r"(?s)calvin-vision\.net.*gtsegs_ijcv\.mat"):
            ImageNetSegmentation(tmp_path / "gtsegs_ijcv.mat")
        (tmp_path / "gtsegs_ijcv.mat").write_bytes(b"\x89HDF")
        monkeypatch.setitem(sys.modules, "h5py", None)  # as if it were not installed
        with pytest.raises(InputError, match="pip install h5py"):
            ImageNetSegmentation(tmp_path)


class TestImageNetSegmentationFile:
    @pytest.fixture
    def mat(self, tmp_path: Path) -> Path:
        """The layout of gtsegs_ijcv.mat: cells are references, arrays are stored columns first."""
        h5py = pytest.importorskip("h5py", reason="gtsegs_ijcv.mat is HDF5: install h5py to test its reader")
        path = tmp_path / "gtsegs_ijcv.mat"
        wnids = ["n01443537", "n00000001", "n02012849"]
        with h5py.File(path, "w") as file:
            cells = {
                k: file.create_dataset(f"value/{k}", (3, 1), dtype=h5py.ref_dtype) for k in ("img", "gt", "target")
            }
            for i, wnid in enumerate(wnids):
                image = file.create_dataset(f"#refs#/img{i}", data=photo(i).transpose(2, 1, 0))
                mask = rectangle(1, 0, 0, 5 + i, 6).astype(np.uint8)
                inner = file.create_dataset(f"#refs#/mask{i}", data=mask.T)
                cell = file.create_dataset(f"#refs#/cell{i}", (1, 1), dtype=h5py.ref_dtype)
                cell[0, 0] = inner.ref
                text = file.create_dataset(f"#refs#/id{i}", data=np.array([[ord(c)] for c in wnid], dtype=np.uint16))
                for key, value in (("img", image), ("gt", cell), ("target", text)):
                    cells[key][i, 0] = value.ref
        return path

    def test_items(self, mat: Path):
        for path in (mat, mat.parent):
            data = ImageNetSegmentation(path)
            assert len(data) == 3
            for i, item in enumerate(data):
                assert np.array_equal((item.image.numpy() * 255).round(), photo(i).transpose(2, 0, 1))
                assert np.array_equal(item.masks.numpy(), rectangle(1, 0, 0, 5 + i, 6) == 1)
        assert data[0].target is None
        assert [data.wnid(i) for i in range(3)] == ["n01443537", "n00000001", "n02012849"]

    def test_labelled(self, mat: Path):
        data = ImageNetSegmentation(mat, labelled=True, size=16)
        assert [(item.label, item.target, item.name) for item in data] == [(1, 1, "0"), (134, 134, "2")]

    def test_workers_open_the_file_themselves(self, mat: Path):
        data = ImageNetSegmentation(mat, size=16)
        alone = data[0]
        (batch,) = DataLoader(data, batch_size=3, num_workers=2, collate_fn=collate_segmented)
        assert torch.equal(batch.masks[0], alone.masks)
        assert len(pickle.loads(pickle.dumps(data))) == 3

    def test_broken(self, mat: Path, tmp_path: Path):
        h5py = importlib.import_module("h5py")
        with h5py.File(mat, "r+") as file:
            del file["#refs#/mask1"]
            file["#refs#/mask1"] = np.zeros((W, H + 1), dtype=np.uint8)
            file["#refs#/cell1"][0, 0] = file["#refs#/mask1"].ref
        with pytest.raises(InputError, match=r"example 1 has 32 x 25 pixels"):
            ImageNetSegmentation(mat)[1]
        other = tmp_path / "other.mat"
        with h5py.File(other, "w") as file:
            file["x"] = 1
        with pytest.raises(InputError, match="not laid out like"):
            ImageNetSegmentation(other)
        other.write_bytes(b"MATLAB 5.0 MAT-file")
        with pytest.raises(InputError, match=r"other\.mat is damaged or not a MATLAB v7\.3"):
            ImageNetSegmentation(other)


# ------------------------------------------------------------------------------------------------------ Pascal VOC


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    root = tmp_path / "VOCdevkit" / "VOC2012"
    ids = rectangle(15, 4, 4, 12, 20, on=rectangle(255, 3, 3, 13, 21))
    ids[20:, :4] = 8
    for name in ("2007_000033", "2007_000042"):
        save(root / "JPEGImages" / f"{name}.jpg", photo(0))
        mask = Image.fromarray(ids.astype(np.uint8)).convert("P")
        mask.putdata(ids.ravel().tolist())
        # VOC's colours: the palette must not be mistaken for the label
        mask.putpalette(np.random.default_rng(0).integers(0, 256, 768).astype(np.uint8).tobytes())
        (root / "SegmentationClass").mkdir(exist_ok=True)
        mask.save(root / "SegmentationClass" / f"{name}.png")
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_000033\n")
    (lists / "val.txt").write_text("2007_000042\n")
    (lists / "trainval.txt").write_text("2007_000033\n2007_000042\n")
    return root


class TestPascalVOC:
    def test_palette_index_is_the_class(self, voc: Path):
        for root in (voc, voc.parent, voc.parent.parent):
            (item,) = PascalVOC(root)
            assert item.name == "2007_000042.jpg"
            assert item.concepts == ("cat", "person")
            assert item.target.tolist() == [7, 14]
            assert (mask_of(item, "person") == (rectangle(1, 4, 4, 12, 20) == 1)).all()
            assert mask_of(item, "cat").sum() == 16
            assert item.ignore.sum() == 10 * 18 - 8 * 16  # 255, the border; background is known

    def test_splits(self, voc: Path):
        assert len(PascalVOC(voc, "trainval")) == 2
        with pytest.raises(InputError, match=r"split='test' must be one of \['train', 'trainval', 'val'\]"):
            PascalVOC(voc, "test")

    def test_missing(self, voc: Path, tmp_path: Path):
        (voc.parent / "VOC2007" / "JPEGImages").mkdir(parents=True)
        with pytest.raises(InputError, match="several years"):
            PascalVOC(voc.parent)
        with pytest.raises(InputError, match=r"(?s)JPEGImages.*host\.robots\.ox\.ac\.uk"):
            PascalVOC(tmp_path / "VOC2012")
        (voc / "SegmentationClass" / "2007_000042.png").unlink()
        with pytest.raises(InputError, match=r"no label image at .*2007_000042\.png"):
            PascalVOC(voc)[0]


# --------------------------------------------------------------------------------------------------- COCO panoptic


@pytest.fixture
def panoptic(tmp_path: Path) -> Path:
    root = tmp_path / "coco"
    # Two persons of which one is a crowd, a dog, grass; ids use all three bytes. The top row is void.
    person, crowd, dog, grass = 1, 258, 3 * 65536 + 7, 9_000_000
    ids = np.full((H, W), grass)
    ids[0] = 0
    ids[4:8, 4:8], ids[10:14, 4:8], ids[10:20, 20:30] = person, crowd, dog
    save(root / "val2017" / "000000000139.jpg", photo(0))
    save(root / "annotations" / "panoptic_val2017" / "000000000139.png", rgb(ids))
    segments = [
        {"id": i, "category_id": c, "iscrowd": int(i == crowd), "area": int((ids == i).sum()), "bbox": [0, 0, 1, 1]}
        for i, c in ((person, 1), (crowd, 1), (dog, 18), (grass, 193))
    ]
    names = [(1, "person", 1), (18, "dog", 1), (193, "grass-merged", 0), (200, "rug-merged", 0)]
    index = {
        "info": {}, "licenses": [],
        "images": [{"id": 139, "file_name": "000000000139.jpg", "height": H, "width": W}],
        "annotations": [{"image_id": 139, "file_name": "000000000139.png", "segments_info": segments}],
        "categories": [{"id": i, "name": n, "isthing": t, "supercategory": "x"} for i, n, t in names],
    }  # fmt: skip
    (root / "annotations" / "panoptic_val2017.json").write_text(json.dumps(index))
    return root


class TestCOCOPanoptic:
    def test_segments_of_a_category_are_one_region(self, panoptic: Path):
        data = COCOPanoptic(panoptic)
        assert data.concepts == ["person", "dog", "grass-merged", "rug-merged"]
        assert data.is_thing == [True, True, False, False]
        item = data[0]
        assert item.concepts == ("person", "dog", "grass-merged")
        expected = rectangle(1, 10, 4, 14, 8, on=rectangle(1, 4, 4, 8, 8)) == 1
        assert (mask_of(item, "person") == expected).all()
        assert mask_of(item, "dog").sum() == 100
        assert mask_of(item, "grass-merged").sum() == 23 * W - 32 - 100
        assert item.ignore[0].all()
        assert not item.ignore[1:].any()
        assert not COCOPanoptic(panoptic, unlabelled="background")[0].ignore.any()

    @pytest.mark.parametrize("unlabelled", ["ignore", "background"])
    def test_categories_that_count_from_zero(self, panoptic: Path, unlabelled: str):
        expected = COCOPanoptic(panoptic, unlabelled=unlabelled)[0]
        path = panoptic / "annotations" / "panoptic_val2017.json"
        index = json.loads(path.read_text())
        new = {1: 0, 18: 1, 193: 2, 200: 3}
        for category in index["categories"]:
            category["id"] = new[category["id"]]
        for segment in index["annotations"][0]["segments_info"]:
            segment["category_id"] = new[segment["category_id"]]
        path.write_text(json.dumps(index))
        item = COCOPanoptic(panoptic, unlabelled=unlabelled)[0]
        assert item.concepts == expected.concepts
        assert (item.masks == expected.masks).all()
        assert (item.ignore == expected.ignore).all()
        index["categories"][1]["id"] = 0
        path.write_text(json.dumps(index))
        with pytest.raises(InputError, match="several categories with the same id"):
            COCOPanoptic(panoptic)

    def test_things_and_stuff(self, panoptic: Path):
        assert COCOPanoptic(panoptic, stuff=False)[0].concepts == ("person", "dog")
        assert COCOPanoptic(panoptic, things=False)[0].concepts == ("grass-merged",)
        chosen = COCOPanoptic(panoptic, concepts=["rug-merged", "dog"])
        assert (chosen.is_thing, chosen[0].concepts) == ([False, True], ("dog",))
        with pytest.raises(InputError, match="no concept"):
            COCOPanoptic(panoptic, things=False, stuff=False)

    def test_other_places(self, panoptic: Path, tmp_path: Path):
        images = (panoptic / "val2017").rename(tmp_path / "elsewhere")
        with pytest.raises(InputError, match=r"(?s)val2017.*cocodataset\.org"):
            COCOPanoptic(panoptic)
        annotations = panoptic / "annotations" / "panoptic_val2017.json"
        data = COCOPanoptic(tmp_path, images=images, annotations=annotations)
        assert len(data[0].concepts) == 3

    def test_png_and_json_that_do_not_fit(self, panoptic: Path):
        json_path = panoptic / "annotations" / "panoptic_val2017.json"
        index = json.loads(json_path.read_text())
        del index["annotations"][0]["segments_info"][0]
        json_path.write_text(json.dumps(index))
        with pytest.raises(InputError, match=r"000000000139\.png does not fit .*segments \[1\] are in the PNG only"):
            COCOPanoptic(panoptic)[0]
        index["annotations"][0]["segments_info"] += [{"id": 1, "category_id": 1}, {"id": 5, "category_id": 1}]
        json_path.write_text(json.dumps(index))
        with pytest.raises(InputError, match=r"\[5\] in the JSON only"):
            COCOPanoptic(panoptic)[0]
        del index["annotations"][0]["segments_info"]
        json_path.write_text(json.dumps(index))
        with pytest.raises(InputError, match="in COCO's panoptic format"):
            COCOPanoptic(panoptic)
        json_path.write_text("[")
        with pytest.raises(InputError, match="not valid JSON"):
            COCOPanoptic(panoptic)


class TestNamesOutOfTheFolder:
    """An index from elsewhere may name any file of the machine; those of the folder are read."""

    @pytest.mark.parametrize("outside", ["{root}/secret.png", "../secret.png", "a/../../secret.png"])
    def test_refused(self, outside: str, panoptic: Path, broden: Path, voc: Path):
        outside = outside.replace("{root}", str(panoptic))
        file = panoptic / "annotations" / "panoptic_val2017.json"
        index = json.loads(file.read_text())
        for one, name in (("images", "file_name"), ("annotations", "file_name")):
            forged = json.loads(json.dumps(index))
            forged[one][0][name] = outside
            file.write_text(json.dumps(forged))
            with pytest.raises(InputError, match=r"secret\.png', which is not in .*, so it is not read"):
                COCOPanoptic(panoptic)[0]
        table = broden / "index.csv"
        for column in ("image", "part"):
            rows = list(csv.DictReader(io.StringIO(table.read_text())))
            rows[0][column] = outside
            out = io.StringIO()
            writer = csv.DictWriter(out, rows[0])
            writer.writeheader()
            writer.writerows(rows)
            kept, _ = table.read_text(), table.write_text(out.getvalue())
            with pytest.raises(InputError, match="which is not in"):
                Broden(broden)[0]
            table.write_text(kept)
        for names in (voc / "ImageSets" / "Segmentation").iterdir():
            names.write_text(outside.removesuffix(".png") + "\n")
        with pytest.raises(InputError, match="which is not in"):
            PascalVOC(voc)[0]


# ------------------------------------------------------------------------------------------------------- real data


class TestRealImages:
    """`images/coco` of the shared data: 100 pictures."""

    def test_every_picture(self, shared_data: Path):
        root = shared_data / "images" / "coco"
        names = json.loads((root / "classes.json").read_text())
        data = MaskFolder(root, size=224, min_area=0.01)
        assert (len(data), len(data.concepts)) == (100, len(names) - 1)
        counts, covered = [], []
        for i, item in enumerate(data):
            assert item.image.shape == (3, 224, 224)
            assert item.image.std() > 0.01
            assert (item.masks.sum((1, 2)) >= 0.01 * 224 * 224).all()
            assert (item.masks.sum(0) <= 1).all()  # a pixel has one label
            assert not (item.masks.any(0) & item.ignore).any()
            counts.append(len(item.concepts))
            covered.append((item.masks.any(0) | item.ignore).float().mean())
            if i % 10 == 0:  # against the file itself, read and cut by hand
                mask = np.asarray(Image.open(root / "masks" / item.name.replace(".jpg", ".png")))
                height, width = mask.shape
                side = min(height, width)
                at = (np.arange(224) + 0.5) * side / 224
                rows, columns = at + (height - side) / 2, at + (width - side) / 2
                cut = mask[rows.astype(int)][:, columns.astype(int)]
                for name, region in zip(item.concepts, item.masks, strict=True):
                    (value,) = (int(i) for i, n in names.items() if n == name)
                    assert ((cut == value) == region.numpy()).mean() > 0.99
        assert 3 < np.mean(counts) < 8
        assert np.mean(covered) > 0.95

    def test_pairs_run_through_evaluate(self, shared_data: Path):
        data = MaskFolder(shared_data / "images" / "coco", size=64, min_area=0.02)
        few = torch.utils.data.Subset(data, range(12))
        regions = sum(len(item.concepts) for item in few)
        some = list(islice(data.pairs(), regions))
        table = metrics.evaluate({"brightness": lambda x: x.mean(1)}, some, ["nra", "nra_exact"], n_bootstrap=0)
        assert table.row("brightness", "nra")["examples"] == regions
        assert 0 <= table.row("brightness", "nra_exact")["value"] < 0.5
