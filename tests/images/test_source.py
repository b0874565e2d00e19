"""Images from whatever holds them: the same images, names and labels each time, or a refusal in words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)

from captum_concepts.errors import InputError, InputWarning
from captum_concepts.images import (
    ImageSource,
    Preprocessing,
    as_seen,
    batches,
    checked_labels,
    class_name,
    digest,
    fingerprint,
    open_images,
    thumbnails,
)

N = 7
PIXELS = torch.arange(N).view(N, 1, 1, 1).expand(N, 3, 6, 8).contiguous().to(torch.uint8) * 20
IMAGES = PIXELS.float() / 255
LABELS = [0, 2, 1, 0, 2, 1, 0]


class Items(Dataset):
    """Items of any form, one for each image."""

    def __init__(self, make):
        self.make = make

    def __len__(self):
        return N

    def __getitem__(self, i):
        if not 0 <= i < N:
            raise KeyError(i)
        return self.make(i)


class Stream(IterableDataset):
    """Has a length, as many have, and no items by number."""

    def __init__(self, make):
        self.make = make

    def __len__(self):
        return N

    def __iter__(self):
        return (self.make(i) for i in range(N))


class Rows:
    """Anything with length and items, such as a Hugging Face data set."""

    def __init__(self, make):
        self.make = make

    def __len__(self):
        return N

    def __getitem__(self, i):
        return self.make(i)


def pil(i: int) -> Image.Image:
    return Image.fromarray(PIXELS[i].permute(1, 2, 0).numpy())


def png(i: int) -> dict:
    import io

    file = io.BytesIO()
    pil(i).save(file, "png")
    return {"bytes": file.getvalue(), "path": None}


MAKERS = {
    "float": lambda i: IMAGES[i],
    "uint8": lambda i: PIXELS[i],
    "PIL": pil,
    "array": lambda i: PIXELS[i].permute(1, 2, 0).numpy(),
    "undecoded": png,
    "tuple": lambda i: (IMAGES[i], LABELS[i]),
    "list": lambda i: [pil(i), torch.tensor(LABELS[i]), "caption"],
    "one-hot": lambda i: (IMAGES[i], torch.nn.functional.one_hot(torch.tensor(LABELS[i]), 3)),
    "column": lambda i: (IMAGES[i], np.array([LABELS[i]])),
    "image": lambda i: {"image": pil(i), "label": LABELS[i]},
    "pixel_values": lambda i: {"pixel_values": IMAGES[i], "labels": torch.tensor(LABELS[i])},
    "inputs": lambda i: {"inputs": IMAGES[i], "y": np.int64(LABELS[i])},
    "img": lambda i: {"img": png(i), "target": float(LABELS[i])},
}


@pytest.mark.parametrize("holder", [Items, Stream, Rows, lambda make: [make(i) for i in range(N)]])
@pytest.mark.parametrize("name", MAKERS)
def test_items(holder, name: str):
    source = open_images(holder(MAKERS[name]))
    assert torch.allclose(torch.stack(list(source)), IMAGES)
    found = list(batches(source, 3))
    assert [len(batch) for batch in found] == [3, 3, 1]
    assert torch.allclose(torch.cat([batch.images for batch in found]), IMAGES)
    assert [i for batch in found for i in batch.indices] == list(range(N))
    if isinstance(MAKERS[name](0), (tuple, list)) or name in ("image", "pixel_values", "inputs", "img"):
        assert [label for batch in found for label in batch.labels] == LABELS
        assert holder is Stream or source.labels == LABELS
    else:
        assert all(batch.labels is None for batch in found)
        assert source.labels is None
    if holder is not Stream:
        assert torch.equal(source[-1], list(source)[-1])
        assert source.names[3] == found[1].names[0] == "image 3"


@pytest.mark.parametrize(
    "source",
    [IMAGES, PIXELS, PIXELS.numpy(), list(IMAGES), [IMAGES[:4], IMAGES[4:]], (IMAGES, LABELS), {"pixel_values": IMAGES},
     TensorDataset(IMAGES), {"image": IMAGES, "label": torch.tensor(LABELS)}, IMAGES.double().half().double()],
    ids=["floats", "bytes", "array", "list", "batches", "pair", "batch", "dataset", "labelled batch", "double"],
)  # fmt: skip
def test_stacks(source):
    opened = open_images(source)
    assert len(opened) == N
    assert torch.allclose(torch.stack([opened[i] for i in range(N)]).float(), IMAGES, atol=1e-3)
    assert torch.allclose(torch.cat([b.images for b in batches(source, 4)]).float(), IMAGES, atol=1e-3)
    labelled = isinstance(source, tuple) or (isinstance(source, dict) and "label" in source)
    assert opened.labels == (LABELS if labelled else None)


def test_floating_tensors_keep_their_dtype_and_range():
    images = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    assert torch.equal(open_images(images)[0], images[0])


class TestLoaders:
    pairs = TensorDataset(IMAGES, torch.tensor(LABELS))

    @pytest.mark.parametrize(
        "options",
        [{}, {"shuffle": True}, {"drop_last": True}, {"num_workers": 1}, {"collate_fn": lambda items: {
            "pixel_values": torch.stack([x for x, _ in items]), "labels": torch.stack([y for _, y in items])}},
         {"batch_sampler": torch.utils.data.BatchSampler(range(N), 2, False)}],
        ids=["plain", "shuffle", "drop_last", "workers", "collate", "batch_sampler"],
    )  # fmt: skip
    def test_in_the_order_of_the_data_set(self, options):
        options = options if "batch_sampler" in options else {"batch_size": 3, **options}
        state = torch.get_rng_state()
        source = open_images(DataLoader(self.pairs, **options))
        found = list(batches(source, 2))
        assert torch.equal(torch.cat([b.images for b in found]), IMAGES)
        assert [label for b in found for label in b.labels] == LABELS == source.labels
        assert torch.equal(torch.get_rng_state(), state)

    def test_a_sampler_of_its_own_chooses(self):
        source = open_images(DataLoader(self.pairs, batch_size=2, sampler=SubsetRandomSampler([4, 1])))
        first, second = (round(float(image.max() * 255 / 20)) for image in source)
        assert {first, second} == {1, 4}
        assert source.labels == [LABELS[first], LABELS[second]]
        assert [round(float(image.max() * 255 / 20)) for image in source] == [first, second]

    def test_without_batches_and_of_streams(self):
        unbatched = DataLoader(Items(lambda i: (IMAGES[:2] + i, LABELS[i : i + 1] * 2)), batch_size=None)
        assert torch.cat([b.images for b in batches(unbatched, 5)]).shape == (2 * N, 3, 6, 8)
        stream = DataLoader(Stream(lambda i: (IMAGES[i], LABELS[i])), batch_size=3)
        assert [label for b in batches(stream, 2) for label in b.labels] == LABELS
        assert open_images(stream).streamed

    def test_batches_of_pil_images(self):
        def collate(items):
            return [image for image, _ in items], [label for _, label in items]

        pairs = Items(lambda i: (pil(i), LABELS[i]))
        by_number = DataLoader(pairs, 3, collate_fn=collate)
        stream = DataLoader(Stream(lambda i: (pil(i), LABELS[i])), 3, collate_fn=collate)
        for loader in (by_number, stream, [collate([pairs[i]]) for i in range(N)]):
            found = list(batches(loader, 4))
            assert torch.allclose(torch.cat([b.images for b in found]), IMAGES)
            assert [label for b in found for label in b.labels] == LABELS

    def test_labels_beside(self):
        assert open_images(DataLoader(TensorDataset(IMAGES), 3), labels=LABELS).labels == LABELS
        with pytest.raises(InputError, match="RandomSampler"):
            open_images(DataLoader(TensorDataset(IMAGES), 3, shuffle=True), labels=LABELS)
        with pytest.raises(InputError, match="6 labels for 7 images"):
            open_images(DataLoader(TensorDataset(IMAGES), 3, drop_last=True), labels=LABELS[:6])

    def test_workers_keep_order_and_report_errors(self):
        assert torch.equal(torch.cat([b.images for b in batches(Items(lambda i: IMAGES[i]), 2, num_workers=2)]), IMAGES)


class TestLabels:
    @pytest.mark.parametrize(
        "labels",
        [LABELS, tuple(LABELS), torch.tensor(LABELS), torch.tensor(LABELS).float(), np.array(LABELS),
         [torch.tensor(y) for y in LABELS], torch.tensor(LABELS)[:, None], torch.eye(3)[LABELS],
         list(torch.eye(3, dtype=torch.long)[LABELS]), [np.int64(y) for y in LABELS], torch.tensor(LABELS).bfloat16()],
    )  # fmt: skip
    def test_forms(self, labels):
        assert open_images(IMAGES, labels=labels).labels == LABELS

    def test_names_and_booleans(self):
        assert checked_labels(np.array(["a", "b"])) == ["a", "b"]
        assert checked_labels([True, False]) == [1, 0]

    @pytest.mark.parametrize(
        ("labels", "message"),
        [([0.0, float("nan")], "nan"), (torch.tensor([0.5, 1.0]), "0.5"), (torch.tensor([[1, 1], [0, 1]]), "multi-hot"),
         (torch.tensor([[0.2, 0.8], [0.6, 0.4]]), "not one-hot"), (["a", 1], "mix"), ([None, 1], "NoneType"),
         ("ab", "one label per image"), (torch.tensor(3), "one label per image"), ([1], "1 labels for 2"), (3, "int"),
         ([{}, {}], "dict"), (torch.zeros(2, 2, 2), "tensor|ndarray")],
    )  # fmt: skip
    def test_refused(self, labels, message: str):
        with pytest.raises(InputError, match=message):
            open_images(IMAGES[:2], labels=labels)

    def test_items_are_believed_before_targets(self):
        relabelled = Items(lambda i: (IMAGES[i], 5 if LABELS[i] == 2 else LABELS[i]))
        relabelled.targets = LABELS
        expected = [5 if y == 2 else y for y in LABELS]
        assert open_images(relabelled).labels == expected
        assert open_images(Subset(relabelled, [1, 2])).labels == [5, 1]
        assert open_images(ConcatDataset([relabelled, relabelled])).labels == expected * 2

    def test_targets_of_torchvision_are_known(self, tmp_path: Path):
        from torchvision.datasets import ImageFolder

        for name in ("a/1.png", "a/2.png", "b/1.png"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            pil(0).save(tmp_path / name)
        (tmp_path / "b" / "1.png").write_bytes(b"broken")  # so reading it would raise
        source = open_images(ImageFolder(tmp_path))
        assert source.labels == [0, 0, 1]
        assert source.class_names == ["a", "b"]
        changed = ImageFolder(tmp_path, target_transform=lambda y: 1 - y, transform=lambda _: IMAGES[0])
        changed.loader = lambda _: pil(0)
        assert open_images(changed).labels == [1, 1, 0]

    def test_multi_hot_items_can_be_read_without_labels(self):
        data = Items(lambda i: (IMAGES[i], torch.ones(4)))
        with pytest.raises(InputError, match="labels=False"):
            list(batches(data, 2))
        assert all(b.labels is None for b in batches(data, 2, labels=False))
        boxes = Items(lambda i: (IMAGES[i], {"boxes": torch.ones(2, 4)}))
        assert open_images(boxes).labels is None

    def test_labels_twice(self):
        with pytest.raises(InputError, match="twice"):
            open_images((IMAGES, LABELS), labels=LABELS)


class TestFiles:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        for i, name in enumerate(["cat/1.png", "cat/2.png", "dog/1.png"]):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            pil(i).save(tmp_path / name)
        return tmp_path

    def test_class_folders(self, root: Path):
        source = open_images(root, size=4)
        assert (source.labels, source.class_names) == ([0, 0, 1], ["cat", "dog"])
        assert source.names == ["cat/1.png", "cat/2.png", "dog/1.png"]
        assert source.files == [root / name for name in source.names]
        assert source[2].shape == (3, 4, 4)
        pil(5).save(root / "loose.png")
        assert open_images(root).labels is None
        assert len(open_images(root)) == 4

    def test_paths(self, root: Path):
        source = open_images([root / "cat" / "1.png", str(root / "dog" / "1.png")], labels=["x", "y"])
        assert (source.names, source.labels) == (["cat/1.png", "dog/1.png"], ["x", "y"])
        assert open_images(root / "cat" / "1.png").names == ["1.png"]
        assert open_images(f"{root}/*/1.png").names == ["cat/1.png", "dog/1.png"]
        assert open_images(([root / "cat" / "1.png"], [4])).labels == [4]

    def test_broken_files_are_noted_once(self, root: Path):
        (root / "cat" / "3.png").write_bytes(b"broken")
        with pytest.raises(InputError, match=r"cat/3\.png"):
            list(open_images(root))
        source = open_images(root, skip_broken=True)
        for _ in range(2):
            found = list(batches(source, 2))
            assert [i for b in found for i in b.indices] == [0, 1, 2]
            assert [b.names for b in found] == [["cat/1.png", "cat/2.png"], ["dog/1.png"]]
            assert [b.labels for b in found] == [[0, 0], [1]]
        assert (len(source), source.labels) == (3, [0, 0, 1])
        assert [s["image"] for s in source.skipped] == [str(root / "cat" / "3.png")]
        assert "3.png" in source.skipped[0]["reason"]
        assert source.select([2, 0]).names == ["dog/1.png", "cat/1.png"]
        assert source.select([2, 0]).labels == [1, 0]
        for path in root.rglob("*.png"):
            path.write_bytes(b"broken")
        with pytest.raises(InputError, match="none of the 4 images"):
            len(open_images(root, skip_broken=True))

    def test_workers_skip_too(self, root: Path):
        (root / "cat" / "0.png").write_bytes(b"broken")
        source = open_images(root, skip_broken=True)
        assert [n for b in batches(source, 2, num_workers=1) for n in b.names] == [
            "cat/1.png",
            "cat/2.png",
            "dog/1.png",
        ]
        assert len(source) == 3

    def test_transform(self, root: Path):
        seen = []

        def transform(image):
            seen.append(image.mode)
            return torch.ones(3, 2, 2)

        assert torch.stack(list(open_images(root, transform=transform))).shape == (3, 3, 2, 2)
        assert seen == ["RGB"] * 3
        with pytest.raises(InputError, match="one float tensor"):
            open_images(root, transform=lambda image: image)[0]
        with pytest.raises(ZeroDivisionError):  # an error of the user's own is not a broken file
            len(open_images(root, transform=lambda image: 1 / 0, skip_broken=True))


class TestShapes:
    @pytest.mark.parametrize(
        ("source", "message"),
        [(IMAGES[0], r"no batch dimension.*image\[None\]"), (torch.zeros(3), r"\(N, C, H, W\)"),
         (IMAGES[:, :1].expand(-1, 4, -1, -1), "4 channels.*bands"), (IMAGES[:, :2], "2 channels.*bands"),
         (IMAGES.permute(0, 2, 3, 1), r"\(.*, 3\), channels last.*movedim"), (PIXELS.int(), "int32.*value_range"),
         (IMAGES > 0, "bool"), ([], "no image in an empty list"),
         (IMAGES[:0], "no image"), ([3], "int"), (3, "int"), (None, "NoneType"),
         ({"pictures": IMAGES}, "pictures.*pixel_values"), (Items(lambda i: {"x": 1}), "keys"),
         (Items(lambda i: ()), "empty"), (Items(lambda i: IMAGES), "is a batch"), ("no/such", "no file or folder"),
         (Items(lambda i: np.zeros((3, 5, 3), np.uint8)), "first or last"),
         (Items(lambda i: np.zeros((4, 5, 1), np.uint8)), "first or last"), (Items(lambda i: IMAGES[0, 0]), "shape")],
    )  # fmt: skip
    def test_refused(self, source, message: str):
        with pytest.raises(InputError, match=message) as error:
            list(open_images(source))
        assert len(str(error.value)) <= 600

    def test_bands(self):
        four = torch.rand(2, 4, 5, 5)
        assert torch.equal(open_images(four, bands=(2, 1, 0))[0], four[0, [2, 1, 0]])
        assert torch.equal(open_images(four, mode="any")[1], four[1])
        with pytest.raises(InputError, match="has 4 channels"):
            open_images(four, bands=(0, 1, 4))[0]

    def test_channels(self):
        assert open_images(IMAGES[:, :1])[0].shape == (3, 6, 8)
        assert open_images(IMAGES, mode="L")[0].shape == (1, 6, 8)
        assert torch.allclose(open_images(IMAGES, mode="L")[3], IMAGES[3, :1])

    def test_sizes(self):
        mixed = [torch.zeros(3, 4, 4), torch.zeros(3, 4, 4), torch.ones(3, 6, 4), torch.zeros(3, 4, 4)]
        assert [tuple(b.images.shape) for b in batches(mixed, 8)] == [(2, 3, 4, 4), (1, 3, 6, 4), (1, 3, 4, 4)]
        assert [tuple(b.images.shape) for b in batches(mixed, 8, size=5)] == [(4, 3, 5, 5)]

    def test_files_and_tensors_are_resized_alike(self, tmp_path: Path):
        image = Image.effect_noise((40, 30), 60).convert("RGB")
        image.save(tmp_path / "a.png")
        tensor = open_images(tmp_path / "a.png")[0]
        for options in ({}, {"resize": "squash"}, {"resize": "pad"}, {"interpolation": "bilinear", "crop": 0.8}):
            file = open_images(tmp_path / "a.png", size=(13, 17), **options)[0]
            assert (file - open_images(tensor[None], size=(13, 17), **options)[0]).abs().max() < 0.01

    def test_streams(self):
        source = open_images(image for image in IMAGES)
        with pytest.raises(InputError, match="stream"):
            len(source)
        with pytest.raises(InputError):
            source[0]
        assert len(list(source)) == N
        with pytest.raises(InputError, match="only once"):
            list(source)
        assert [b.labels for b in batches(Stream(lambda i: IMAGES[i]), 4, labels=LABELS)] == [LABELS[:4], LABELS[4:]]
        with pytest.raises(InputError, match="more images than the 2 labels"):
            list(batches(Stream(lambda i: IMAGES[i]), 4, labels=[0, 1]))

    def test_a_batch_of_a_stream_with_one_label(self):
        stream = Stream(lambda i: (IMAGES[i : i + 2], torch.tensor(1)))
        with pytest.raises(InputError, match="a batch of 2 images has 1 labels"):
            list(batches(stream, 4))

    def test_opened_twice(self):
        source = open_images(IMAGES)
        assert open_images(source) is source
        assert isinstance(source, ImageSource)
        with pytest.raises(InputError, match="already"):
            open_images(source, size=3)
        assert repr(source) == "ImageSource(7 images, own sizes)"
        labelled = open_images(source, labels=LABELS)
        assert (labelled.labels, source.labels) == (LABELS, None)
        assert torch.equal(labelled[2], source[2])
        assert open_images(labelled, labels=False).labels is None
        with pytest.raises(InputError, match="2 labels for 7"):
            open_images(source, labels=[0, 1])


class TestFingerprint:
    def test_every_image_counts(self):
        whole = fingerprint(IMAGES)
        assert whole == fingerprint(list(IMAGES)) == fingerprint(DataLoader(TensorDataset(IMAGES), 2, shuffle=True))
        for i in range(N):
            changed = IMAGES.clone()
            changed[i, 2, 5, 7] += 0.01
            assert fingerprint(changed) != whole
        assert fingerprint(IMAGES.flip(0)) != whole
        assert fingerprint(IMAGES[:-1]) != whole
        assert fingerprint(IMAGES.reshape(N, 3, 8, 6)) != whole

    def test_options_count(self):
        images = torch.rand(2, 3, 8, 6)
        assert fingerprint(images, size=4) != fingerprint(images, size=4, resize="squash")
        assert fingerprint(IMAGES, transform=lambda x: x * 2) != fingerprint(IMAGES)

    def test_digest(self):
        assert digest(IMAGES[0]) == digest(IMAGES[0].double())
        assert len(digest(IMAGES[0], 8)) == 8


def test_scenes_tell_their_labels_without_drawing_them(monkeypatch: pytest.MonkeyPatch):
    from captum_concepts.datasets import CaptionedScenes

    scenes = CaptionedScenes(20, seed=0, size=16)
    expected = [int(scenes[i].label) for i in range(20)]
    assert open_images(scenes).class_names == scenes.classes
    assert torch.equal(open_images(scenes)[3], scenes[3].image)
    monkeypatch.setattr("captum_concepts.datasets.scenes.draw_ground", None)
    assert open_images(scenes).labels == expected


def test_pixels_that_were_not_scaled_are_warned_about():
    with pytest.warns(InputWarning, match="values far above 1 are used unchanged"):
        found = open_images(torch.full((2, 3, 4, 4), 200.0))[1]
    assert float(found.max()) == 200
    assert torch.allclose(open_images(torch.full((2, 3, 4, 4), 51.0), value_range=(0, 255))[1], torch.tensor(0.2))


def test_a_stream_without_images():
    with pytest.raises(InputError, match="no image in the stream"):
        list(batches(iter([]), 4))


def test_numbers_of_classes():
    assert [class_name(label, ["cat", "dog"]) for label in (1, "fox", 0)] == ["dog", "fox", "cat"]
    for label in (-1, 2):
        with pytest.raises(InputError, match=f"label {label} is out of range: there are 2 classes, 0 to 1"):
            class_name(label, ["cat", "dog"])


@pytest.mark.parametrize("workers", [2**31, 257, -1, 1.5])
def test_numbers_of_workers_are_checked_before_any_starts(workers):
    images = torch.rand(3, 3, 4, 4)
    for read in (
        lambda: list(batches(images, 2, num_workers=workers)),
        lambda: fingerprint(images, num_workers=workers),
    ):
        with pytest.raises(InputError, match="num_workers must be an integer of at least 0 and at most 256"):
            read()


class TestPicturesForPeople:
    def test_thumbnails_are_small(self):
        small, wide = thumbnails(torch.rand(2, 3, 20, 30)), thumbnails(torch.rand(2, 3, 300, 200))
        assert [tuple(image.shape) for image in small + wide] == [(3, 20, 30)] * 2 + [(3, 160, 107)] * 2

    def test_only_what_was_normalized_is_undone(self):
        p = Preprocessing((6, 8), (0.5,) * 3, (0.25,) * 3)
        dark = torch.full((3, 6, 8), 0.2)
        assert torch.equal(as_seen(dark, p), dark)
        assert torch.allclose(as_seen(p(dark), p), dark)
