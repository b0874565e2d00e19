"""What people give: kinds of images, labels, words, files and models, and what must become of each.

A row is a kind of input; a column is a public entry point, in ``columns.py``. Each column belongs to a family, which
has an outcome for every row; a column may differ from its family where it says so. ``docs/inputs.md`` is printed from
here.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

SIDE, COUNT = 32, 4


def make_pixels() -> Tensor:
    """``COUNT`` colored gradients, uint8: small as PNG files, different in every channel."""
    ramp = torch.linspace(0, 255, SIDE)
    rows, columns = ramp[:, None].expand(SIDE, SIDE), ramp[None].expand(SIDE, SIDE)
    images = [torch.stack([rows, columns, 255 - rows]), torch.stack([columns, 255 - rows, rows]),
              torch.stack([255 - columns, rows, columns]), torch.stack([rows, rows, 255 - columns])]  # fmt: skip
    return torch.stack(images).round().to(torch.uint8)


PIXELS = make_pixels()
IMAGES = PIXELS.float() / 255
LABELS = [0, 1, 1, 0]


class Items(Dataset[Any]):
    """Images with their labels."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        self.make = make

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> Any:
        return self.make(index)


class Stream(IterableDataset[Any]):
    """An ``IterableDataset`` with a length and without items by number."""

    def __len__(self) -> int:
        return COUNT

    def __iter__(self) -> Iterator[Any]:
        return zip(IMAGES, LABELS, strict=True)


def picture(index: int) -> Image.Image:
    """One image as PIL has it."""
    return Image.fromarray(PIXELS[index].permute(1, 2, 0).numpy())


def folder(space: Path) -> Path:
    """A folder of image files, with what systems leave behind."""
    root = space / "photos"
    if not root.is_dir():
        for junk in ("__MACOSX", ".ipynb_checkpoints"):
            (root / junk).mkdir(parents=True)
            (root / junk / "0.png").write_bytes(b"junk")
        for junk in ("._0.png", "Thumbs.db", ".DS_Store", "notes.txt"):
            (root / junk).write_bytes(b"junk")
        for i in range(COUNT):
            picture(i).save(root / f"{i}.png")
    return root


def class_folders(space: Path) -> Path:
    """One folder of images per class, in the order of the images."""
    root = space / "classes"
    for i, label in enumerate(sorted(LABELS)):
        path = root / ("cat", "dog")[label] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(sorted(range(COUNT), key=LABELS.__getitem__)[i]).save(path)
    return root


def empty_folder(space: Path) -> Path:
    """A folder with a text."""
    root = space / "empty"
    root.mkdir(exist_ok=True)
    (root / "notes.txt").write_text("nothing")
    return root


def deep_files(space: Path) -> list[Path]:
    """Gray files of 16 bits per pixel."""
    paths = [space / f"deep{i}.png" for i in range(COUNT)]
    for path, pixels in zip(paths, PIXELS, strict=True):
        Image.fromarray(pixels[0].numpy().astype(np.uint16) * 257).save(path)
    return paths


def inference(images: Tensor) -> Tensor:
    """A tensor that autograd cannot record."""
    with torch.inference_mode():
        return images.clone()


def broken_folder(space: Path) -> Path:
    """A folder with one file that is no image."""
    root = space / "broken"
    root.mkdir(exist_ok=True)
    picture(0).save(root / "0.png")
    (root / "1.png").write_bytes(b"not an image")
    return root


# ----------------------------------------------------------------------------------------------------------- outcomes


@dataclass(frozen=True)
class Outcome:
    """What becomes of an input.

    Args:
        kind: ``"same"``: the result is that of the reference; ``"runs"``: it ends well, with another result;
            ``"refused"``: an error of the package whose message contains ``word``.
        word: a regular expression.
        warns: a regular expression of the warning that comes with it.
    """

    kind: str
    word: str = ""
    warns: str = ""


SAME, RUNS = Outcome("same"), Outcome("runs")


def refused(word: str) -> Outcome:
    """An error of the package that contains ``word``."""
    return Outcome("refused", word)


@dataclass(frozen=True)
class Row:
    """One kind of input.

    Args:
        what: in words, for the documentation.
        make: builds it in a folder.
        outcomes: by family of columns; ``None`` where the family cannot be given such a thing.
    """

    what: str
    make: Callable[[Path], Any]
    outcomes: dict[str, Outcome] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------------------- images

BATCH_DIMENSION = refused(r"no batch dimension|image\[None\]")


def images_row(what: str, make: Callable[[Path], Any], anything: Outcome, tensors: Outcome | None = None) -> Row:
    """A kind of images: what entry points for any holder, and those for Captum's tensors only, make of it."""
    return Row(what, make, {"any images": anything, "tensors": tensors or refused("[Tt]ensor|floating point")})


def looped(images: Tensor) -> Tensor:
    """Strides that no fresh tensor has."""
    return torch.stack([images, images], -1)[..., 1]


IMAGE_ROWS: dict[str, Row] = {
    "float tensor": images_row("tensor `(N, 3, H, W)`, float", lambda _: IMAGES.clone(), SAME, SAME),
    "channels last memory": images_row(
        "the same, in `channels_last` memory format",
        lambda _: IMAGES.contiguous(memory_format=torch.channels_last),
        SAME,
        SAME,
    ),
    "strided": images_row("the same, with other strides", lambda _: looped(IMAGES), SAME, SAME),
    "requires grad": images_row(
        "the same, with `requires_grad`", lambda _: IMAGES.clone().requires_grad_(), SAME, SAME
    ),
    "uint8 tensor": images_row("tensor, uint8", lambda _: PIXELS.clone(), SAME, refused("float")),
    "array": images_row("NumPy array `(N, H, W, 3)`, uint8", lambda _: PIXELS.permute(0, 2, 3, 1).numpy(), SAME),
    "list of tensors": images_row("list of tensors", lambda _: list(IMAGES), SAME),
    "list of PIL images": images_row("list of PIL images", lambda _: [picture(i) for i in range(COUNT)], SAME),
    "list of arrays": images_row("list of arrays", lambda _: [np.asarray(picture(i)) for i in range(COUNT)], SAME),
    "list of paths": images_row("list of paths", lambda s: [folder(s) / f"{i}.png" for i in range(COUNT)], SAME),
    "folder": images_row("folder that also contains other files", folder, SAME),
    "folder as text": images_row("the same, as a string", lambda s: str(folder(s)), SAME),
    "pattern": images_row("pattern (`photos/*.png`)", lambda s: f"{folder(s)}/*.png", SAME),
    "class folders": images_row("folder with one folder per class", class_folders, RUNS),
    "data set": images_row("`Dataset` of (image, label)", lambda _: Items(lambda i: (IMAGES[i], LABELS[i])), SAME),
    "data set of dicts": images_row(
        "`Dataset` of dicts with `image` or `pixel_values`",
        lambda _: Items(lambda i: {"pixel_values": IMAGES[i], "labels": LABELS[i]}),
        SAME,
    ),
    "data set of PIL images": images_row(
        "`Dataset` of PIL images", lambda _: Items(lambda i: (picture(i), LABELS[i])), SAME
    ),
    "loader": images_row("`DataLoader`", lambda _: DataLoader(TensorDataset(IMAGES, torch.tensor(LABELS)), 3), SAME),
    "shuffling loader": images_row(
        "`DataLoader(shuffle=True, drop_last=True)`: read in the order of its data set",
        lambda _: DataLoader(TensorDataset(IMAGES, torch.tensor(LABELS)), 3, shuffle=True, drop_last=True),
        SAME,
    ),
    "loader of dicts": images_row(
        "`DataLoader` of dicts",
        lambda _: DataLoader(Items(lambda i: {"image": IMAGES[i], "label": LABELS[i]}), 2),
        SAME,
    ),
    "stream": images_row("`IterableDataset`, also with a length", lambda _: Stream(), SAME),
    "pair": images_row("`(images, labels)`", lambda _: (IMAGES, LABELS), SAME),
    "one PIL image": images_row("one PIL image", lambda _: picture(0), RUNS),
    "one path": images_row("one path", lambda s: folder(s) / "0.png", RUNS),
    "gray": images_row("one channel, for a model that takes three: repeated", lambda _: [IMAGES[0, :1]], RUNS),
    "one image": images_row(
        "one image `(3, H, W)` without a batch dimension", lambda _: IMAGES[0], BATCH_DIMENSION, BATCH_DIMENSION
    ),
    "four channels": images_row(
        "four channels, for a model that takes three",
        lambda _: torch.rand(2, 4, SIDE, SIDE),
        refused("channels"),
        refused("channels"),
    ),
    "channels last": images_row(
        "tensor `(N, H, W, 3)`", lambda _: IMAGES.permute(0, 2, 3, 1), refused("channels"), refused("channels")
    ),
    "integers": images_row("tensor, int64", lambda _: PIXELS.long(), refused("int64"), refused("int64|float")),
    "booleans": images_row("tensor, bool", lambda _: PIXELS > 9, refused("bool"), refused("bool|float")),
    "empty batch": images_row(
        "no images: `(0, 3, H, W)`",
        lambda _: IMAGES[:0],
        refused("no image|no example|empty"),
        refused("no example|empty"),
    ),
    "empty list": images_row(
        "empty list", lambda _: [], refused("empty|no image"), refused("[Tt]ensor|floating point")
    ),
    "broken file": images_row("folder with a damaged file", broken_folder, refused(r"1\.png")),
    "missing path": images_row("a path that does not exist", lambda s: s / "nowhere", refused("no file or folder")),
    "text": images_row("a string that is not a path", lambda _: "a photo of a cat", refused("no file or folder")),
    "made in inference mode": images_row("tensor created in `inference_mode`", lambda _: inference(IMAGES), SAME, SAME),
    "expanded": images_row("one image expanded without a copy", lambda _: IMAGES[:1].expand(4, -1, -1, -1), RUNS, RUNS),
    "parameter": images_row("`nn.Parameter`", lambda _: nn.Parameter(IMAGES.clone()), SAME, SAME),
    "doubles": images_row("tensor, float64, for a float32 model", lambda _: IMAGES.double(), SAME, refused("float64")),
    "array of floats": images_row("NumPy array `(N, 3, H, W)`, float64", lambda _: IMAGES.double().numpy(), SAME),
    "array of another byte order": images_row(
        "NumPy array with another byte order", lambda _: IMAGES.numpy().astype(">f4"), SAME
    ),
    "array of paths": images_row(
        "NumPy array of paths", lambda s: np.array([f"{folder(s)}/{i}.png" for i in range(COUNT)]), SAME
    ),
    "dict": images_row("a batch as a dict with labels", lambda _: {"pixel_values": IMAGES, "labels": LABELS}, SAME),
    "batches": images_row("list of batches", lambda _: [IMAGES[:1], IMAGES[1:]], SAME),
    "generator": images_row("a generator", lambda _: (image for image in IMAGES), SAME),
    "open file": images_row("an open file", lambda s: io.BytesIO((folder(s) / "0.png").read_bytes()), RUNS),
    "16-bit files": images_row("files with 16 bits per pixel", deep_files, RUNS),
    "dict of other keys": images_row("a dict with other keys", lambda _: {"foo": IMAGES}, refused("foo")),
    "items of other keys": images_row(
        "`Dataset` of dicts with other keys", lambda _: Items(lambda i: {"foo": IMAGES[i]}), refused("foo")
    ),
    "too small": images_row(
        "images smaller than the model's minimum size",
        lambda _: IMAGES[:, :, :2, :2],
        refused("pixels"),
        refused("pixels"),
    ),
    "different sizes": images_row(
        "images of different sizes",
        lambda _: [IMAGES[0], IMAGES[1, :, :16], IMAGES[2], IMAGES[3]],
        refused("different sizes"),
    ),
    "complex": images_row(
        "tensor, complex", lambda _: IMAGES.to(torch.complex64), refused("complex"), refused("complex|float")
    ),
    "sparse": images_row("a sparse tensor", lambda _: IMAGES.to_sparse(), refused("sparse"), refused("sparse|dense")),
    "no pixels": images_row(
        "images without rows", lambda _: IMAGES[:, :, :0], refused("no pixels|no example"), refused("no example|pixels")
    ),
    "one plane": images_row(
        "one image `(H, W)`", lambda _: IMAGES[0, 0], refused(r"\(32, 32\)"), refused(r"\(32, 32\)|dimension")
    ),
    "video": images_row(
        "five dimensions", lambda _: IMAGES[None], refused(r"\(1, 4, 3, 32, 32\)"), refused(r"\(1, 4, 3, 32, 32\)")
    ),
    "nested lists": images_row("nested lists of numbers", lambda _: IMAGES[:, :, :2, :2].tolist(), refused("list")),
    "bytes": images_row("bytes", lambda _: b"png", refused("bytes|int")),
    "empty folder": images_row("folder without images", empty_folder, refused("no image")),
    "empty path": images_row("an empty path", lambda _: "", refused("empty")),
    "web address": images_row("a web address", lambda _: "https://images.org/1.png", refused("web address")),
    "None": images_row("None", lambda _: None, refused("NoneType"), refused("NoneType")),
    "number": images_row("a number", lambda _: 3, refused("int"), refused("int")),
}


# ------------------------------------------------------------------------------------------------------------- labels


def labels_row(what: str, make: Callable[[], Any], outcome: Outcome) -> Row:
    """A form of labels."""
    return Row(what, lambda _: make(), {"labels": outcome})


LABEL_ROWS: dict[str, Row] = {
    "list": labels_row("list of integers", lambda: list(LABELS), SAME),
    "tensor": labels_row("tensor `(N,)`", lambda: torch.tensor(LABELS), SAME),
    "float tensor": labels_row("tensor of whole floats", lambda: torch.tensor(LABELS).float(), SAME),
    "array": labels_row("NumPy array", lambda: np.array(LABELS), SAME),
    "column": labels_row("`(N, 1)`", lambda: torch.tensor(LABELS)[:, None], SAME),
    "one-hot": labels_row("one-hot `(N, K)`", lambda: torch.eye(2)[LABELS], SAME),
    "0-d tensors": labels_row("list of 0-d tensors", lambda: [torch.tensor(y) for y in LABELS], SAME),
    "names": labels_row("list of names", lambda: [("cat", "dog")[y] for y in LABELS], RUNS),
    "multi-hot": labels_row("multi-hot", lambda: torch.ones(COUNT, 2), refused("multi-hot")),
    "probabilities": labels_row("probabilities", lambda: torch.full((COUNT, 2), 0.5), refused("one-hot")),
    "NaN": labels_row("NaN", lambda: torch.tensor([0, 1, 1, float("nan")]), refused("nan")),
    "fractions": labels_row("fractions", lambda: [0.5, 1.0, 1.0, 0.0], refused("0.5")),
    "mixed": labels_row("names and numbers", lambda: ["cat", 1, 1, 0], refused("mix")),
    "too few": labels_row("fewer than images", lambda: [0, 1], refused("2 labels for 4|2.*4")),
    "booleans": labels_row("booleans", lambda: torch.tensor(LABELS).bool(), SAME),
    "floats of 16 bits": labels_row("tensor, bfloat16", lambda: torch.tensor(LABELS).bfloat16(), SAME),
    "infinite": labels_row("infinite", lambda: [0.0, float("inf"), 1.0, 0.0], refused("inf")),
    "missing": labels_row("some labels None", lambda: [0, None, 1, 0], refused("NoneType")),
    "row": labels_row("`(1, N)`", lambda: torch.tensor(LABELS)[None], refused("1 labels for 4")),
    "ragged": labels_row("rows of different lengths", lambda: [[0], [1, 0], [1], [0]], refused("rows of 1 to 2")),
    "blank": labels_row("empty names", lambda: ["", "a", "a", ""], refused("empty name")),
    "bytes": labels_row("bytes", lambda: [b"a", b"b", b"b", b"a"], refused("bytes")),
    "set": labels_row("a set", lambda: {0, 1, 2, 3}, refused("set")),
    "generator": labels_row("a generator", lambda: (y for y in LABELS), refused("generator")),
    "one number": labels_row("a single number", lambda: 1, refused("int")),
    "text": labels_row("a single string", lambda: "cats", refused("str")),
}


# -------------------------------------------------------------------------------------------------------------- words


def words_row(what: str, make: Callable[[Path], Any], words: Outcome, files: Outcome | None = None) -> Row:
    """A form of words."""
    return Row(what, make, {"words": words} if files is None else {"files of words": files})


def word_file(name: str, data: bytes) -> Callable[[Path], Path]:
    """A file of words."""

    def make(space: Path) -> Path:
        (space / name).write_bytes(data)
        return space / name

    return make


WORDS = ["red sky", "green sea"]
TEXT = "red sky\r\ngreen sea\r\n"
WORD_ROWS: dict[str, Row] = {
    "list": words_row("list", lambda _: list(WORDS), SAME),
    "tuple": words_row("tuple", lambda _: tuple(WORDS), SAME),
    "vocabulary": words_row("`Vocabulary`", lambda _: vocabulary(), SAME),
    "empty": words_row("empty list", lambda _: [], refused("")),
    "one text": words_row("a single string instead of a list", lambda _: "red sky", refused("list")),
    "twice": words_row("a duplicate concept", lambda _: ["red sky", "red sky"], refused("once|twice")),
    "numbers": words_row("numbers", lambda _: [1, 2], refused("string|text|name")),
    "array": words_row("NumPy array", lambda _: np.array(WORDS), SAME),
    "None": words_row("None", lambda _: None, refused("None|names")),
    "number": words_row("a number", lambda _: 3, refused("int|3")),
    "nested": words_row("nested lists", lambda _: [["red sky"], ["green sea"]], refused("string|text|name")),
    "blank": words_row("a blank string", lambda _: ["red sky", "  "], refused("empty|blank|whitespace")),
}
FILE_ROWS: dict[str, Row] = {
    "UTF-8": Row("text file, UTF-8", word_file("a.txt", TEXT.encode()), {"files of words": SAME}),
    "BOM": Row(
        "text file with a byte order mark", word_file("b.txt", TEXT.encode("utf-8-sig")), {"files of words": SAME}
    ),
    "UTF-16": Row("text file, UTF-16", word_file("c.txt", TEXT.encode("utf-16")), {"files of words": SAME}),
    "cp1252": Row(
        "text file, Windows (cp1252)", word_file("d.txt", (TEXT + "café").encode("cp1252")), {"files of words": RUNS}
    ),
    "JSON list": Row("JSON list", word_file("e.json", json.dumps(WORDS).encode()), {"files of words": SAME}),
    "JSON index": Row(
        'JSON object `{"0": name}` or `{name: 0}`',
        word_file("f.json", json.dumps({w: i for i, w in enumerate(WORDS)}).encode()),
        {"files of words": SAME},
    ),
    "broken JSON": Row("invalid JSON", word_file("g.json", b"["), {"files of words": refused("JSON")}),
    "binary": Row("a binary file", word_file("h.txt", bytes(range(256))), {"files of words": refused("text")}),
    "missing": Row("a file that does not exist", lambda s: s / "none.txt", {"files of words": refused("none.txt")}),
}


def vocabulary() -> Any:
    """The words with their template."""
    from captum_concepts.concepts import Vocabulary

    return Vocabulary(WORDS)


# ------------------------------------------------------------------------------------------------------------- models


class Net(nn.Module):
    """Two convolutions, tanh and a linear layer; deterministic, and with the metadata that timm's models have."""

    pretrained_cfg: ClassVar = {
        "input_size": (3, SIDE, SIDE), "crop_pct": 1.0, "mean": (0.0,) * 3, "std": (1.0,) * 3,
        "interpolation": "bicubic",
    }  # fmt: skip

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first = nn.Sequential(nn.Conv2d(channels, 4, 4, stride=4), nn.ReLU(inplace=True))
            self.last = nn.Sequential(nn.Conv2d(4, 6, 2, stride=2), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
            self.head = nn.Linear(6, 2)

    def forward(self, images: Tensor) -> Tensor:
        """``(N, 2)`` logits."""
        return self.head(self.last(self.first(images)).mean((2, 3)).tanh())


class Wrapped(nn.Module):
    """A model whose output is not one tensor."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.wrap = Net(), wrap

    def forward(self, images: Tensor) -> Any:
        """The wrapped logits."""
        return self.wrap(self.inner(images))


def model_row(what: str, make: Callable[[], tuple[Any, Any]], outcome: Outcome) -> Row:
    """A kind of model, with the layer to explain."""
    return Row(what, lambda _: make(), {"models": outcome})


def scripted() -> Any:
    """A scripted model, without torch's advice against it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(Net().eval())


def loaded() -> Any:
    """A scripted model that was saved and loaded."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch advises against its own format; people have such files
        torch.jit.save(scripted(), file)
        file.seek(0)
        return torch.jit.load(file)


class Twice(Net):
    """Its layers run twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Net()

    def forward(self, images: Tensor) -> Tensor:
        """The sum of two equal terms."""
        return self.inner(images) + self.inner(images)


class Unused(Net):
    """It has a layer that does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Conv2d(3, 3, 1)


MODEL_ROWS: dict[str, Row] = {
    "module": model_row("`nn.Module`, layer by name", lambda: (Net().eval(), "last"), SAME),
    "layer": model_row("layer as a module", lambda: (lambda m: (m, m.last))(Net().eval()), SAME),
    "training mode": model_row("in training mode, with BatchNorm", lambda: (Net().train(), "last"), SAME),
    "frozen": model_row("frozen weights", lambda: (Net().eval().requires_grad_(False), "last"), SAME),
    "parallel": model_row("in `DataParallel`", lambda: (nn.DataParallel(Net().eval()), "module.last"), SAME),
    "compiled": model_row("compiled", lambda: (torch.compile(Net().eval(), backend="eager"), "last"), SAME),
    "tuple": model_row(
        "returns `(logits, more)`", lambda: (Wrapped(lambda y: (y, y.sum())).eval(), "inner.last"), SAME
    ),
    "dict": model_row(
        'returns `{"logits": ...}`', lambda: (Wrapped(lambda y: {"logits": y}).eval(), "inner.last"), SAME
    ),
    "scripted": model_row("`torch.jit.script`", lambda: (scripted(), "last"), refused("script")),
    "double": model_row("float64, for float32 images", lambda: (Net().eval().double(), "last"), refused("float64")),
    "unknown layer": model_row("a layer that does not exist", lambda: (Net().eval(), "lost"), refused("last")),
    "no grid": model_row("a layer without positions", lambda: (Net().eval(), "head"), refused("positions|grid")),
    "loaded": model_row("`torch.jit.load`", lambda: (loaded(), "last"), refused("jit")),
    "half": model_row("float16, for float32 images", lambda: (Net().eval().half(), "last"), refused("float16")),
    "four channels": model_row(
        "four input channels, for images with three", lambda: (Net(4).eval(), "last"), refused("channels")
    ),
    "runs twice": model_row(
        "a layer that runs twice", lambda: (Twice().eval(), "inner.last"), refused("more than once")
    ),
    "unused": model_row("a layer that does not run", lambda: (Unused().eval(), "unused"), refused("did not run")),
    "text output": model_row(
        "returns a string", lambda: (Wrapped(lambda y: "cat").eval(), "inner.last"), refused("without a tensor")
    ),
    "no gradient": model_row(
        "its last part does not pass gradients", lambda: (Wrapped(torch.Tensor.detach).eval(), "inner.last"), SAME
    ),
    "layer is a number": model_row("a number as the layer", lambda: (Net().eval(), 3), refused("int")),
    "no layer": model_row("None as the layer", lambda: (Net().eval(), None), refused("NoneType")),
    "class": model_row("the class of a model", lambda: (Net, "last"), refused("class|type")),
    "weights": model_row("a state dict", lambda: (Net().state_dict(), "last"), refused("OrderedDict")),
    "None": model_row("None", lambda: (None, "last"), refused("")),
    "text": model_row("the name of a model", lambda: ("resnet50", "last"), refused("")),
}
