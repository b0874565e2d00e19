"""CUB and PartImageNet++, each on a tiny tree in its own format."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from captum_concepts.datasets import CUB, COCOParts, collate_segmented
from captum_concepts.errors import InputError

PHOTO = Image.effect_noise((50, 40), 60).convert("RGB")


@pytest.fixture
def cub(tmp_path: Path) -> Path:
    root = tmp_path / "CUB_200_2011"
    files = ["001.Black_footed_Albatross/a.jpg", "002.Laysan_Albatross/b.jpg", "002.Laysan_Albatross/c.jpg"]
    for name in files:
        (root / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        PHOTO.save(root / "images" / name)
    (root / "parts").mkdir()
    (root / "attributes").mkdir()
    write = {
        "images.txt": "".join(f"{i} {name}\n" for i, name in enumerate(files, 1)),
        "image_class_labels.txt": "1 1\n2 2\n3 2\n",
        "train_test_split.txt": "1 1\n2 0\n3 0\n",
        "classes.txt": "1 001.Black_footed_Albatross\n2 002.Laysan_Albatross\n",
        "bounding_boxes.txt": "1 0.0 0.0 40.0 30.0\n2 5.0 5.0 40.0 30.0\n3 5.0 5.0 20.0 20.0\n",
        "parts/parts.txt": "1 back\n2 left eye\n3 tail\n",
        "parts/part_locs.txt": "1 1 9.0 9.0 1\n1 2 0.0 0.0 0\n1 3 0.0 0.0 0\n2 1 20.0 12.0 1\n2 2 35.0 30.0 1\n"
        "2 3 0.0 0.0 0\n3 1 0.0 0.0 0\n3 2 0.0 0.0 0\n3 3 0.0 0.0 0\n",
        "attributes/image_attribute_labels.txt": "1 1 0 3 27.7\n1 2 1 4 27.7\n2 1 1 3 2.0\n2 2 0 1 0.5 extra 7\n"
        "3 1 0 4 1\n3 2 1 2 1\n",
        "../attributes.txt": "1 has_bill_shape::curved_(up_or_down)\n2 has_wing_color::blue\n",
    }  # fmt: skip
    for name, text in write.items():
        (root / name).write_text(text)
    return root


class TestCUB:
    def test_items(self, cub: Path):
        data = CUB(cub, radius=0.1)
        assert len(data) == 2
        assert data.concepts == ["back", "left eye", "tail"]
        assert data.classes == ["Black footed Albatross", "Laysan Albatross"]
        item = data[0]
        assert (item.concepts, item.label, item.name) == (("back", "left eye"), 1, "002.Laysan_Albatross/b.jpg")
        radius = 0.1 * (40 * 30) ** 0.5
        for mask, (x, y) in zip(item.masks, [(20, 12), (35, 30)], strict=True):
            rows, columns = np.nonzero(mask.numpy())
            assert (rows.mean(), columns.mean()) == pytest.approx((y, x), abs=0.6)
            assert len(rows) == pytest.approx(np.pi * radius**2, rel=0.25)
        assert data[1].masks.shape == (0, 40, 50)
        assert data.keypoints(0).tolist() == [[20, 12, 1], [35, 30, 1], [0, 0, 0]]
        assert collate_segmented([data[0], data[1]]).masks.shape == (2, 40, 50)

    def test_splits_and_attributes(self, cub: Path):
        assert len(CUB(cub, None)) == 3
        train = CUB(cub, "train")
        assert [item.label for item in train] == [0]
        assert train.attribute_names == ["has_bill_shape::curved_(up_or_down)", "has_wing_color::blue"]
        both = CUB(cub, None)
        assert both.attributes.tolist() == [[False, True], [True, False], [False, True]]
        assert both.certainty.tolist() == [[3, 4], [3, 1], [4, 2]]

    def test_attributes_of_other_images_are_left_out(self, cub: Path):
        test = CUB(cub)  # images 2 and 3; the first has attributes too
        assert test.attributes.tolist() == [[True, False], [False, True]]
        file = cub / "attributes" / "image_attribute_labels.txt"
        file.write_text("".join(reversed(file.read_text().splitlines(keepends=True))))
        assert CUB(cub).attributes.tolist() == [[True, False], [False, True]]

    def test_the_disks_move_with_the_crop(self, cub: Path):
        item = CUB(cub, size=40)[0]  # columns 5 to 45 remain
        columns = torch.nonzero(item.masks[0])[:, 1].float()
        assert columns.mean() == pytest.approx(15, abs=0.6)

    def test_missing_and_broken(self, cub: Path, tmp_path: Path):
        with pytest.raises(InputError, match=r"(?s)images\.txt.*vision\.caltech\.edu"):
            CUB(tmp_path)
        with pytest.raises(InputError, match="split must be"):
            CUB(cub, "val")
        (cub / "parts" / "part_locs.txt").write_text("1 1 x y 1\n")
        with pytest.raises(InputError, match=r"part_locs\.txt must have 5 numbers"):
            CUB(cub)
        (cub / "classes.txt").write_text("Albatross\n")
        with pytest.raises(InputError, match=r"classes\.txt must have a number and a name on every line; line 1"):
            CUB(cub)


def instance(image: int, category: int, shape: object) -> dict:
    return {"id": image * 10 + category, "image_id": image, "category_id": category, "segmentation": shape, "bbox": []}


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """Two classes, a JSON each; polygons, run lengths, and the compressed run lengths of the same square."""
    square = [[10, 5, 20, 5, 20, 15, 10, 15]]
    runs = {"size": [40, 50], "counts": [10 * 40 + 5, *[10, 30] * 9, 10, 40 * 50 - 19 * 40 - 15]}
    for wnid, names in (("n01440764", ["head", "tail"]), ("n01443537", ["tail"])):
        folder = tmp_path / "images" / wnid
        folder.mkdir(parents=True)
        PHOTO.save(folder / f"{wnid}_1.JPEG")
        index = {
            "images": [{"id": 1, "file_name": f"{wnid}_1.JPEG", "height": 40, "width": 50}],
            "categories": [{"id": i + 1, "name": name} for i, name in enumerate(names)],
            "annotations": [instance(1, i + 1, [square, runs][i]) for i in range(len(names))],
        }
        (tmp_path / "json").mkdir(exist_ok=True)
        (tmp_path / "json" / f"{wnid}.json").write_text(json.dumps(index))
    return tmp_path


def test_cub_names_out_of_the_folder(cub: Path):
    text = (cub / "images.txt").read_text()
    (cub / "images.txt").write_text(text.replace("2 002.Laysan_Albatross/b.jpg", "2 ../../b.jpg"))
    with pytest.raises(InputError, match="which is not in"):
        CUB(cub)[0]


class TestCOCOParts:
    def test_items(self, parts: Path):
        data = COCOParts(parts / "json", parts / "images")
        assert data.concepts == ["head", "tail"]
        first, second = data[0], data[1]
        assert (first.concepts, first.label, first.name) == (("head", "tail"), 0, "n01440764_1.JPEG")
        assert (second.concepts, second.label) == (("tail",), 1)
        expected = torch.zeros(40, 50, dtype=torch.bool)
        expected[5:15, 10:20] = True
        assert torch.equal(first.masks[0], expected)
        assert torch.equal(first.masks[1], expected)
        assert not first.ignore.any()

    def test_compressed_run_lengths(self, parts: Path):
        """Two pixels in each of the last two columns of a 4 x 3 mask, as pycocotools encodes them."""
        from captum_concepts.datasets.coco_parts import _decoded

        assert _decoded("5220O") == [5, 2, 2, 2, 1]
        whole = COCOParts(parts / "json" / "n01443537.json", parts / "images")
        assert len(whole) == 1

    @pytest.mark.parametrize("name", ["/etc/passwd", "../images/n01440764_1.JPEG"])
    def test_names_out_of_the_folder(self, name: str, parts: Path):
        file = parts / "json" / "n01440764.json"
        index = json.loads(file.read_text())
        index["images"][0]["file_name"] = name
        file.write_text(json.dumps(index))
        with pytest.raises(InputError, match="which is not in"):
            COCOParts(file, parts / "images")[0]

    def test_several_annotations_of_one_part_are_joined(self, parts: Path):
        file = parts / "json" / "n01443537.json"
        index = json.loads(file.read_text())
        index["annotations"].append(instance(1, 1, [[30, 30, 34, 30, 34, 34, 30, 34]]))
        file.write_text(json.dumps(index))
        item = COCOParts(file, parts / "images")[0]
        assert item.concepts == ("tail",)
        assert int(item.masks.sum()) == 10 * 10 + 4 * 4

    @pytest.mark.parametrize(
        ("change", "message"),
        [({"categories": []}, "category that it does not list"), ({"images": 3}, "in COCO's instance format"),
         ({"annotations": [instance(1, 1, {"size": [4, 4], "counts": [16]})]}, "cannot be read"),
         ({"annotations": [instance(1, 1, {"size": [40, 50], "counts": [3]})]}, "run lengths of 3 pixels"),
         ({"annotations": [instance(1, 1, [["x", 2]])]}, "'x'; it must be a finite number")],
    )  # fmt: skip
    def test_broken(self, parts: Path, change: dict, message: str):
        file = parts / "json" / "n01443537.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
        with pytest.raises(InputError, match=message):
            COCOParts(parts / "json", parts / "images")[1]

    def test_missing(self, parts: Path):
        with pytest.raises(InputError, match="PartImageNetPP"):
            COCOParts(parts / "none.json", parts / "images")
        (parts / "images" / "n01443537" / "n01443537_1.JPEG").unlink()
        with pytest.raises(InputError, match="no image at"):
            COCOParts(parts / "json", parts / "images")[1]
