"""Data sets of Hugging Face, with the real library where it is installed."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from PIL import Image

from captum_concepts.images import batches, open_images

# Not plain "datasets": without the library, the folder of tests of that name would be imported.
pytest.importorskip("datasets.arrow_dataset", reason="the library `datasets` of Hugging Face is not installed")
datasets = importlib.import_module("datasets")
pytestmark = pytest.mark.filterwarnings("default")  # the library's own


@pytest.fixture
def rows(tmp_path: Path):
    paths = []
    for i in range(5):
        paths.append(str(tmp_path / f"{i}.png"))
        Image.new("RGB", (6, 4), (i * 20, 0, 0)).save(paths[-1])
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    return datasets.Dataset.from_dict({"image": paths, "label": [0, 1, 1, 0, 1]}, features=features)


def red(source) -> list[int]:
    return [round(float(image[0].max()) * 255 / 20) for image in source]


def test_rows(rows):
    source = open_images(rows)
    assert red(source) == [0, 1, 2, 3, 4]
    assert (source.labels, source.class_names) == ([0, 1, 1, 0, 1], ["cat", "dog"])
    assert source[0].shape == (3, 4, 6)
    assert red(open_images(rows.select([3, 1]))) == [3, 1]
    assert open_images(rows.select([3, 1])).labels == [0, 1]
    shuffled = open_images(rows.shuffle(seed=0))
    assert [[0, 1, 1, 0, 1][i] for i in red(shuffled)] == shuffled.labels


def test_undecoded_and_formatted(rows):
    assert red(open_images(rows.cast_column("image", datasets.Image(decode=False)))) == [0, 1, 2, 3, 4]
    assert red(open_images(rows.with_format("torch"))) == [0, 1, 2, 3, 4]
    assert open_images(rows.with_format("torch")).labels == [0, 1, 1, 0, 1]


def test_a_transform_that_relabels(rows):
    def transform(batch):
        pixels = [torch.full((3, 2, 2), float(image.getpixel((0, 0))[0]) / 255) for image in batch["image"]]
        return {"pixel_values": pixels, "label": [1 - y for y in batch["label"]]}

    source = open_images(rows.with_transform(transform))
    assert red(source) == [0, 1, 2, 3, 4]
    assert source.labels == [1, 0, 0, 1, 0]


def test_streams(rows):
    stream = rows.to_iterable_dataset()
    found = list(batches(stream, 2))
    assert red(image for batch in found for image in batch.images) == [0, 1, 2, 3, 4]
    assert [label for batch in found for label in batch.labels] == [0, 1, 1, 0, 1]
    assert open_images(stream).streamed
    assert open_images(stream).class_names == ["cat", "dog"]


def test_loaders(rows):
    loader = torch.utils.data.DataLoader(rows.with_format("torch"), batch_size=2, shuffle=True)
    assert red(open_images(loader)) == [0, 1, 2, 3, 4]
    assert open_images(loader).labels == [0, 1, 1, 0, 1]
