"""Every reader of files against damaged and forged ones: it reads them, or refuses in the package's own words.

``FUZZ=10000 pytest tests/contract/test_hostile_files.py`` (`make fuzz`) tries that many files against each entry point
of :data:`ENTRIES`; by default some dozens. A file is damaged blindly (bits, cuts, insertions) or forged knowingly (one
value of its JSON, CSV or text replaced, removed, renamed: sizes, types, paths), because blind damage rarely gets past a
checksum; checksums are made to fit. Each try is bounded in time and memory.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save as safetensors_bytes
from tiny import (
    DENSE,
    NET,
    PICTURES,
    POOLED,
    Colors,
    activation_map,
    audit,
    bottleneck,
    discovered,
    explanation,
    fitted,
    fusion_map,
    network,
    spatial_acv,
    table,
)
from torch import nn

from captum_concepts import (
    SALFCBM,
    ConceptExplanation,
    ConceptFusionMap,
    FeatureActivationMap,
    SpatialACV,
    load,
)
from captum_concepts.activations import Layers
from captum_concepts.attr.discovered_concepts import DiscoveredConcepts
from captum_concepts.audit import ConceptAudit
from captum_concepts.commands.fit_salf_config import fit_arguments, read_config
from captum_concepts.commands.models import load_model
from captum_concepts.commands.report import SavedSettings, report_saved
from captum_concepts.concepts import Vocabulary, generate_concepts
from captum_concepts.datasets import (
    CUB,
    Broden,
    COCOPanoptic,
    COCOParts,
    ImageNetS,
    ImageNetSegmentation,
    MaskFolder,
    PascalVOC,
)
from captum_concepts.datasets.annotation import read_ids
from captum_concepts.errors import ArtifactError, CaptumConceptsError, InputError
from captum_concepts.images import load_image, preprocessing_of, read_words
from captum_concepts.metrics import EvaluationTable
from captum_concepts.models.concept_translator.data import collect_pairs
from captum_concepts.models.salf_cbm import hub
from captum_concepts.store import RegionEmbeddingStore
from captum_concepts.store.shards import ShardReader, ShardWriter
from captum_concepts.vlm import RegionPrompt

FILES, SEED = int(os.environ.get("FUZZ", "40")), os.environ.get("FUZZ_SEED", "")  # others with every seed
HOSTILE = [
    None, True, -1, 0, 1, 10**5, 3 * 10**8, 2**31, 2**63, 2**80, -(2**40), 1e308, float("nan"), float("inf"), "", "a",
    "../../etc/passwd", "/dev/zero", "\x00", "é" * 200, [], {}, [[]], [None], ["a", "a"], [2**40, 2**40],
    [12_000, 12_000], [3, 20_000, 20_000], [0], [-1], {"a": 1}, "F64", "U8", "captum_concepts", [[1, 2], [3]],
    {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 8]},
]  # fmt: skip
REMOVED, RENAMED, JOINED = object(), object(), object()
MEGABYTES, SECONDS = 200, 2.0
FEW = PICTURES[:7]


# ---------------------------------------------------------------------------------------------- files and their readers


def read_audit(path: Path) -> None:
    found = ConceptAudit.load(path)
    found.report(path.with_suffix(".html"))
    repr(found), [found.to_records(kind) for kind in ("drivers", "errors", "images")]


def shown_table(path: Path) -> None:
    found = EvaluationTable.from_json(path.read_text(errors="replace"))
    found.to_markdown(), found.to_csv(), found.to_json(), repr(found)


def explained(explainer: object, images: torch.Tensor = PICTURES[:1]) -> None:
    """What was read is used: sizes are believed at the latest here."""
    repr(explainer.explain(images, top_k=2))


def image(path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (12, 9, 3), np.uint8)).save(path)


def labels(path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 9, (12, 9), np.uint8)).save(path)


def halves(path: Path) -> None:
    """Segment 1 above, none below."""
    pixels = np.zeros((12, 9, 3), np.uint8)
    pixels[:6, :, 0] = 1
    Image.fromarray(pixels).save(path)


def hdf5(path: Path) -> None:
    """The layout of gtsegs_ijcv.mat with one picture."""
    h5py = pytest.importorskip("h5py", reason="gtsegs_ijcv.mat is HDF5: install h5py to test its reader")
    with h5py.File(path, "w") as file:
        image = file.create_dataset("#refs#/image", data=np.zeros((3, 9, 12), np.uint8))
        mask = file.create_dataset("#refs#/mask", data=np.ones((9, 12), np.uint8))
        cell = file.create_dataset("#refs#/cell", (1, 1), dtype=h5py.ref_dtype)
        text = file.create_dataset("#refs#/id", data=np.array([[ord(c)] for c in "n01443537"], dtype=np.uint16))
        cell[0, 0] = mask.ref
        for key, value in (("img", image), ("gt", cell), ("target", text)):
            file.create_dataset(f"value/{key}", (1, 1), dtype=h5py.ref_dtype)[0, 0] = value.ref


def words(content: object) -> Callable[[Path], None]:
    return lambda path: path.write_text(content if isinstance(content, str) else json.dumps(content)) and None


# -------------------------------------------------------------------------------------------- folders and their readers


def region_store(prompt, *, cut=False, extended=False):
    def make(folder: Path) -> None:
        RegionEmbeddingStore.build(folder, FEW, Colors(), prompt, **STORE)
        if extended:
            file = folder / "manifest.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), "planned": [3, 1]}))
        if cut:
            max(folder.glob("shard-*")).unlink()

    return make


PROMPT = RegionPrompt("crop", (2, 2), 2)
CIRCLES = RegionPrompt("circle", (2, 2), 2)
STORE = {"batch_size": 8, "shard_rows": 3}


def format_1(folder: Path) -> None:
    """As an earlier version wrote it: checksums in the manifest."""
    region_store(CIRCLES)(folder)
    found, entries = json.loads((folder / "manifest.json").read_text()), []
    for file, rows in zip(sorted(folder.glob("shard-*")), found["rows"], strict=True):
        with safe_open(file, "pt") as opened:
            data = safetensors_bytes({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
        file.write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        entries.append({"file": file.name, "rows": rows, "bytes": len(data), "sha256": digest})
    old = {"format": "captum_concepts.shards/1", "fingerprint": found["fingerprint"], "shards": entries}
    old |= {"complete": True, "info": {**found["info"], "error_bound": 1e-4}}
    (folder / "manifest.json").write_text(json.dumps(old))


def opened(folder: Path) -> None:
    store = RegionEmbeddingStore.open(folder, encoder=Colors())
    store.embeddings(slice(None))
    assert 0 <= store.error_bound <= 1
    repr(store)


def built(prompt):
    return lambda folder: RegionEmbeddingStore.build(folder, FEW, Colors(), prompt, **STORE)


def shards(path: Path) -> None:
    with ShardWriter(path, {"seed": 1}, shard_rows=2) as writer:
        writer.append({"embedding": torch.rand(4, 3)})


def shard_rows(folder: Path) -> None:
    reader = ShardReader(folder, verify=True)
    for name in reader.names:
        reader.rows(name, range(len(reader)))


def appended(folder: Path) -> None:
    with ShardWriter(folder, {"seed": 1}, shard_rows=2) as writer:
        writer.append({"embedding": torch.rand(1, 3)})


def pretrained(folder: Path) -> None:
    bottleneck().save_pretrained(folder)


def fit_digest(folder: Path) -> None:
    """The digest that ties the weights of a SALFCBM to its configuration."""
    weights = folder / "model.safetensors"
    with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError, AttributeError, struct.error):
        digest = hub._digest({**hub._SINCE_2, **json.loads((folder / "config.json").read_bytes())})
        header, values = unpacked(weights.read_bytes())
        header["__metadata__"]["info"] = json.dumps({"config": digest})
        weights.write_bytes(packed(header, values))


def fit(folder: Path) -> None:
    fitted(folder, cache_features=True)


def pairs(folder: Path) -> None:
    found = collect_pairs(Layers.resolve(NET, ["0"]), Colors(), PICTURES, cache_dir=folder)
    found.rows([0, 3])


def audited(folder: Path) -> None:
    audit(store_path=folder)


def explanations(folder: Path) -> None:
    saved = "a.explanation.safetensors"
    explanation(1).save(folder / saved)
    image(folder / "a.png")
    entry = {"image": "a.png", "input": "a.png", "explanation": saved, "significant": [True, True]}
    summary = {"model": "demo:classifier", "method": "SpatialACV", "layer": "x", "size": 8, "classes": ["x", "y"]}
    (folder / "explanations.json").write_text(json.dumps({**summary, "explained": [entry], "failed": []}))


def reported(folder: Path) -> dict[str, object]:
    return report_saved(SavedSettings(str(folder), str(folder / "report.html")))


def configuration(folder: Path) -> None:
    config = {
        "model": "demo:classifier", "layer": "layer4", "encoder": "demo:clip", "train": "demo:scenes:12", "size": 64,
        "val": "demo:scenes:8", "concepts": ["circle", "red"], "store": "work/store", "output": "work/model",
        "prompt": {"kind": "circle", "grid": 7, "radius": 32}, "nonzeros_per_class": 3, "clean": True,
        "filter": {"max_length": 30, "similarity": False}, "within_hours": 24, "batch_size": 4,
        "feature_dtype": "float16", "lam": None, "templates": ["a {}"], "skip_unreadable": False,
    }  # fmt: skip
    (folder / "a.json").write_text(json.dumps(config))


def configured(folder: Path) -> None:
    fit_arguments(read_config(folder / "a.json"), "cpu")


def mask_folder(root: Path) -> None:
    for part, draw in (("images", image), ("masks", labels)):
        (root / part).mkdir()
        draw(root / part / "a.png")
    (root / "classes.json").write_text(json.dumps({str(i): f"class {i}" for i in range(1, 9)}))


def panoptic(root: Path) -> None:
    (root / "val2017").mkdir()
    (root / "annotations" / "panoptic_val2017").mkdir(parents=True)
    image(root / "val2017" / "a.png")
    halves(root / "annotations" / "panoptic_val2017" / "a.png")
    segments = [{"id": 1, "category_id": 18, "iscrowd": 0, "area": 54, "bbox": [0, 0, 9, 6]}]
    index = {
        "images": [{"id": 139, "file_name": "a.png", "height": 12, "width": 9}],
        "annotations": [{"image_id": 139, "file_name": "a.png", "segments_info": segments}],
        "categories": [{"id": 18, "name": "dog", "isthing": 1}, {"id": 193, "name": "grass", "isthing": 0}],
    }
    (root / "annotations" / "panoptic_val2017.json").write_text(json.dumps(index))


RUNS = "X1T2"  # twelve times nine pixels: 40 zeros, 68 ones


def parts(root: Path) -> None:
    (root / "images").mkdir()
    (root / "json").mkdir()
    image(root / "images" / "a.png")
    square, runs = [[1, 1, 5, 1, 5, 7, 1, 7]], {"size": [12, 9], "counts": [10, 20, 78]}
    index = {
        "images": [{"id": 1, "file_name": "a.png", "height": 12, "width": 9}],
        "categories": [{"id": 1, "name": "head"}, {"id": 2, "name": "tail"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "segmentation": square},
            {"id": 2, "image_id": 1, "category_id": 2, "segmentation": runs},
            {"id": 3, "image_id": 1, "category_id": 2, "segmentation": {"size": [12, 9], "counts": RUNS}},
        ],
    }
    (root / "json" / "n01440764.json").write_text(json.dumps(index))


def broden(root: Path) -> None:
    (root / "images").mkdir()
    image(root / "images" / "a.png")
    halves(root / "images" / "b.png")
    (root / "index.csv").write_text("image,split,object,scene\na.png,train,b.png,2\na.png,val,1,\n")
    (root / "label.csv").write_text("number,name,category\n1,wall,object(5)\n2,street,scene(2);object(1)\n")
    (root / "category.csv").write_text("name,first,last\nobject,1,1\nscene,2,2\n")


def birds(root: Path) -> None:
    write = {
        "images.txt": "1 001.A/a.png\n2 002.B/b.png\n", "image_class_labels.txt": "1 1\n2 2\n",
        "train_test_split.txt": "1 1\n2 0\n", "classes.txt": "1 001.A\n2 002.B\n",
        "bounding_boxes.txt": "1 0.0 0.0 9.0 9.0\n2 1.0 1.0 8.0 8.0\n", "parts/parts.txt": "1 back\n2 tail\n",
        "parts/part_locs.txt": "1 1 4.0 4.0 1\n1 2 0.0 0.0 0\n2 1 2.0 2.0 1\n2 2 3.0 3.0 1\n",
        "attributes/image_attribute_labels.txt": "1 1 0 3 27.7\n2 1 1 3 2.0\n", "attributes.txt": "1 has_bill::long\n",
    }  # fmt: skip
    for name, content in write.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(content)
    for name in ("001.A/a.png", "002.B/b.png"):
        (root / "images" / name).parent.mkdir(parents=True)
        image(root / "images" / name)


def imagenet_s(root: Path) -> None:
    for part in ("validation", "validation-segmentation"):
        (root / part / "n01440764").mkdir(parents=True)
    image(root / "validation" / "n01440764" / "a.png")
    halves(root / "validation-segmentation" / "n01440764" / "a.png")
    (root / "categories.txt").write_text("n01440764\nn01443537\n")


def voc(root: Path) -> None:
    for part, draw, suffix in (("JPEGImages", image, ".jpg"), ("SegmentationClass", labels, ".png")):
        (root / part).mkdir()
        draw(root / part / f"a{suffix}")
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    (root / "ImageSets" / "Segmentation" / "val.txt").write_text("a\na\n")


def processor(folder: Path) -> None:
    """As transformers writes it, in its three forms of a size."""
    config = {
        "size": {"shortest_edge": 8, "height": 8, "width": 8}, "crop_size": [8, 8], "resample": 3, "crop_pct": 0.9,
        "do_center_crop": True, "do_normalize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": 0.5,
        "do_rescale": True, "rescale_factor": 0.0039, "image_processor_type": "ViTImageProcessor",
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(config))


def prepared(folder: Path) -> None:
    network = nn.Conv2d(3, 4, 3)
    network.config = SimpleNamespace(_name_or_path=str(folder))
    found = preprocessing_of(network)
    found(PICTURES[:1])
    repr(found)


def weights(folder: Path) -> None:
    network = torchvision.models.squeezenet1_1(num_classes=3)
    (folder / "a.safetensors").write_bytes(safetensors_bytes(network.state_dict()))


def every_item(data) -> None:
    for item in (data[i] for i in range(min(len(data), 5))):
        assert item.image.ndim == 3


@dataclass(frozen=True)
class Entry:
    """Something that reads files.

    Args:
        make: fills a folder.
        call: reads it.
        files: patterns of the files that are forged.
        writes: whether the call may change the folder.
        refused: whether it refuses also what was not forged.
        fit: makes checksums elsewhere fit a forged file.
    """

    make: Callable[[Path], None]
    call: Callable[[Path], object]
    files: tuple[str, ...] = ("*",)
    writes: bool = False
    refused: bool = False
    fit: Callable[[Path], None] = lambda folder: None


def one(name: str, make: Callable[[Path], None], read: Callable[[Path], object]) -> Entry:
    return Entry(lambda folder: make(folder / name), lambda folder: read(folder / name), (name,))


def store(make: Callable[[Path], None], call: Callable[[Path], object], writes: bool = False) -> Entry:
    return Entry(make, call, ("manifest.json", "shard-00000*", "shard-00001*"), writes)


#: A new reader is one line.
ENTRIES = {
    "ConceptExplanation": one(
        "a.safetensors", lambda path: explanation().save(path), lambda path: repr(ConceptExplanation.load(path))
    ),
    "SpatialACV": one(
        "a.safetensors", lambda path: spatial_acv().save(path), lambda path: explained(SpatialACV.load(path, NET))
    ),
    "ConceptFusionMap": one(
        "a.safetensors", lambda path: fusion_map().save(path), lambda path: explained(ConceptFusionMap.load(path, NET))
    ),
    "FeatureActivationMap": one(
        "a.safetensors",
        lambda path: activation_map().save(path),
        lambda path: explained(FeatureActivationMap.load(path, POOLED)),
    ),
    "DiscoveredConcepts": one(
        "a.safetensors",
        lambda path: discovered().save(path),
        lambda path: explained(DiscoveredConcepts.load(path, POOLED)),
    ),
    "captum_concepts.load": one("a.safetensors", lambda path: spatial_acv().save(path), lambda path: load(path, NET)),
    "ConceptAudit": one("a.safetensors", lambda path: audit(class_names=["x", "y", "z"]).save(path), read_audit),
    "audit parts": Entry(audited, audited, writes=True),
    "SALFCBM": Entry(
        pretrained,
        lambda folder: explained(SALFCBM.from_pretrained(folder, backbone=network())),
        ("config.json", "model.safetensors"),
        fit=fit_digest,
    ),
    "SALFCBM without its backbone": Entry(
        pretrained, SALFCBM.from_pretrained, ("config.json", "model.safetensors"), refused=True, fit=fit_digest
    ),
    "Vocabulary.json": one(
        "a.json", lambda path: Vocabulary(["red ball", "blue box", "red  ball"]).clean().save(path), Vocabulary.load
    ),
    "Vocabulary.txt": one("a.txt", words("red ball\nblue box\n"), Vocabulary.load),
    "classes.json": one("a.json", words({"0": ["n01", "tench"], "1": "goldfish"}), read_words),
    "classes.txt": one("a.txt", words("tench\ngoldfish\n"), read_words),
    "answers.json": one(
        "a.json",
        words({"Q bird": ["a beak, wings"], "Q fish": ["- fins\n- gills"]}),
        lambda path: generate_concepts(["bird", "fish"], lambda question: "a", prompts={"q": "Q {class}"}, cache=path),
    ),
    "EvaluationTable": one("a.json", lambda path: table().to_json(path), shown_table),
    "report": Entry(explanations, reported, ("explanations.json", "a.explanation.safetensors"), writes=True),
    "fit-salf": Entry(configuration, configured),
    "MaskFolder": Entry(mask_folder, lambda root: every_item(MaskFolder(root)), ("classes.json",)),
    "COCOPanoptic": Entry(panoptic, lambda root: every_item(COCOPanoptic(root)), ("annotations/*.json",)),
    "COCOParts": Entry(parts, lambda root: every_item(COCOParts(root / "json", root / "images")), ("json/*.json",)),
    "Broden": Entry(broden, lambda root: every_item(Broden(root)), ("*.csv",)),
    "CUB": Entry(birds, lambda root: every_item(CUB(root, None)), ("*.txt", "*/*.txt")),
    "PascalVOC": Entry(voc, lambda root: every_item(PascalVOC(root)), ("ImageSets/Segmentation/val.txt",)),
    "preprocessor_config.json": Entry(processor, prepared),
    "--weights": Entry(
        weights, lambda folder: load_model("squeezenet1_1", weights=str(folder / "a.safetensors"), num_classes=3)
    ),
    "ImageNetS": Entry(
        imagenet_s,
        lambda root: every_item(ImageNetS(root, categories=root / "categories.txt")),
        ("categories.txt",),
    ),
    "ImageNetSegmentation": one("gtsegs_ijcv.mat", hdf5, lambda path: ImageNetSegmentation(path, labelled=True)[0]),
    **{f"image.{kind}": one(f"a.{kind}", image, load_image) for kind in ("png", "jpg", "gif", "tif")},
    **{f"labels.{kind}": one(f"a.{kind}", labels, read_ids) for kind in ("png", "tif")},
    "store: open": store(region_store(PROMPT), opened),
    "store: open, dense": store(region_store(DENSE), opened),
    "store: open, format 1": store(format_1, opened),
    "store: open while it is extended": store(region_store(PROMPT, extended=True), opened),
    "store: verify": store(region_store(CIRCLES), lambda folder: RegionEmbeddingStore.open(folder).verify(FEW)),
    "store: build": store(region_store(PROMPT), built(PROMPT), True),
    "store: build, format 1": store(format_1, built(CIRCLES), True),
    "store: resume": store(region_store(DENSE, cut=True), built(DENSE), True),
    "store: build_part": store(
        region_store(PROMPT, cut=True),
        lambda folder: RegionEmbeddingStore.build_part(folder, FEW, Colors(), PROMPT, rank=1, num_replicas=2, **STORE),
        True,
    ),
    "store: repair": store(
        region_store(CIRCLES), lambda folder: RegionEmbeddingStore.repair(folder, FEW, Colors()), True
    ),
    "store: repair, format 1": store(format_1, lambda folder: RegionEmbeddingStore.repair(folder, FEW, Colors()), True),
    "store: extend": store(
        region_store(PROMPT), lambda folder: RegionEmbeddingStore.extend_at(folder, FEW[:4], Colors()), True
    ),
    "store: resume extend": store(
        region_store(PROMPT, extended=True),
        lambda folder: RegionEmbeddingStore.extend_at(folder, FEW[:4], Colors()),
        True,
    ),
    "ShardReader": store(shards, shard_rows),
    "ShardWriter": store(shards, appended, True),
    "translator's cache": Entry(pairs, pairs, ("manifest.json", "shard-00000*"), True),
    "fit_salf_cbm: steps": Entry(fit, fit, ("head-*", "bottleneck-*"), True),
    "fit_salf_cbm: caches": Entry(fit, fit, ("*/manifest.json", "features-*/shard-*", "activations-*/shard-*"), True),
}

# -------------------------------------------------------------------------------------------------------------- forging


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Bits flipped, cut, doubled, overwritten, or bytes that never were a file."""
    raw = bytearray(data)
    kind = rng.randrange(6)
    at = rng.randrange(len(raw)) if raw else 0
    if kind == 0:
        for _ in range(rng.randrange(1, 8)):
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del raw[at:]
    elif kind == 2:
        raw[at:at] = rng.randbytes(rng.randrange(1, 40))
    elif kind == 3:
        raw[:8] = struct.pack("<Q", rng.choice([0, 1, len(raw), 2**31, 2**40, 2**63, rng.randrange(2**20)]))
    elif kind == 4:
        end = min(len(raw), at + rng.randrange(1, 64))
        raw[at:end] = rng.randbytes(end - at)
    else:
        return rng.randbytes(rng.randrange(0, 200))
    return bytes(raw)


def forgeries(tree: object, rng: random.Random) -> Iterator[object]:
    """Every value of a JSON tree replaced by every hostile one, every key removed, renamed and joined by another, in
    random order; then the same in pairs, without end."""
    places: list[tuple[list[object], object]] = []

    def walk(node: object, path: list[object]) -> None:
        for key in list(node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else []):
            places.append((path, key))
            walk(node[key], [*path, key])

    walk(tree, [])
    changes = [(path, key, value) for path, key in places for value in (*HOSTILE, REMOVED, RENAMED, JOINED)]
    rng.shuffle(changes)
    for change in changes:
        yield changed(tree, change)
    while changes:
        try:
            yield changed(changed(tree, rng.choice(changes)), rng.choice(changes))
        except (LookupError, TypeError):
            continue


def changed(tree: object, change: tuple[list[object], object, object]) -> object:
    path, key, value = change
    forged = copy.deepcopy(tree)
    node = forged
    for step in path:
        node = node[step]
    if value is REMOVED:
        del node[key]
    elif value is RENAMED and isinstance(node, dict):
        node[f"{key}x"] = node.pop(key)
    elif value is JOINED and isinstance(node, dict):
        node[f"{key}x"] = node[key]
    elif value not in (RENAMED, JOINED):
        node[key] = value
    return forged


def unpacked(data: bytes) -> tuple[dict, bytes]:
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def packed(header: object, values: bytes) -> bytes:
    """A safetensors file; a shard's checksum is made to fit."""
    encoded = json.dumps(header).encode()
    raw = struct.pack("<Q", len(encoded)) + encoded + values
    found = re.search(rb'sha256\\": \\"([0-9a-f]{64})', raw)
    if found is None:
        return raw
    blank = raw.replace(found[1], b"0" * 64, 1)
    return blank.replace(b"0" * 64, hashlib.sha256(blank).hexdigest().encode(), 1)


def forged_tensors(data: bytes, rng: random.Random) -> Iterator[bytes]:
    """The header of a safetensors file forged, and in turns the JSON inside it."""
    header, values = unpacked(data)
    metadata = header.get("__metadata__", {})
    inner = [(key, json.loads(text)) for key, text in metadata.items() if text.startswith(("{", "["))]
    streams = [(packed(one, values) for one in forgeries(header, rng))]
    for key, tree in inner:
        streams.append(
            packed({**header, "__metadata__": {**metadata, key: json.dumps(one)}}, values)
            for one in forgeries(tree, rng)
        )
    for several in itertools.zip_longest(*streams):
        yield from (one for one in several if one is not None)


def forged_lines(text: str, rng: random.Random) -> Iterator[bytes]:
    """One cell of a CSV or a list replaced, or a line removed or doubled."""
    while True:
        lines = text.split("\n")
        at = rng.randrange(len(lines))
        cells = re.split(r"([,\s;]+)", lines[at])
        cells[rng.randrange(len(cells))] = str(rng.choice([*HOSTILE, '"', ",", ";", "\n", "1.5", "١"]))
        lines[at : at + 1] = rng.choice([["".join(cells)]] * 8 + [[], [lines[at]] * 2])
        yield "\n".join(lines).encode(errors="replace")


def forged(data: bytes, suffix: str, rng: random.Random) -> Iterator[bytes]:
    """Files like ``data``, without end."""
    known: Iterator[bytes] = iter(())
    if suffix == ".json":
        known = (json.dumps(tree).encode() for tree in forgeries(json.loads(data), rng))
    elif suffix == ".safetensors":
        known = forged_tensors(data, rng)
    elif suffix in (".csv", ".txt"):
        known = forged_lines(data.decode(), rng)
    while True:
        draw = rng.random()
        yield (b"[" * 100_000 if draw < 0.002 else None if draw < 0.2 else next(known, None)) or damaged(data, rng)


class Memory:
    """The most memory that was in use since it was asked before, where the system counts it (Linux)."""

    def __init__(self) -> None:
        self.known = sys.platform == "linux" and os.access("/proc/self/clear_refs", os.W_OK)

    def start(self) -> None:
        if self.known:
            Path("/proc/self/clear_refs").write_text("5")
            self.before = self._read("VmRSS")

    def grown(self) -> float:
        """Megabytes since :meth:`start`."""
        return (self._read("VmHWM") - self.before) / 1024 if self.known else 0.0

    def _read(self, name: str) -> int:
        return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def tried(case: Entry, folder: Path, memory: Memory) -> tuple[str, str | None, float, float]:
    """Whether the folder was read or refused; what is wrong with that; seconds and megabytes."""
    wrong, outcome = None, "read"
    memory.start()
    started = time.process_time()
    try:
        case.call(folder)
    except CaptumConceptsError:
        outcome = "refused"
    except Exception as error:
        outcome, wrong = "raw", f"{type(error).__name__}: {error}"[:200]
    seconds, megabytes = time.process_time() - started, memory.grown()
    if seconds > SECONDS:
        wrong = f"{seconds:.1f} s of work"
    if megabytes > MEGABYTES:
        wrong = f"{megabytes:.0f} MB"
    return outcome, wrong, seconds, megabytes


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("entry", ENTRIES)
def test_only_the_packages_own_exceptions_come_out(tmp_path, entry):
    """Within 2 s and 200 MB each."""
    case, rng, memory = ENTRIES[entry], random.Random(entry + SEED), Memory()
    good, folder = tmp_path / "good", tmp_path / "used"
    good.mkdir()
    case.make(good)
    shutil.copytree(good, folder)
    with pytest.raises(CaptumConceptsError) if case.refused else contextlib.nullcontext():
        case.call(folder)  # loads what is loaded once
    files = sorted({file for pattern in case.files for file in good.glob(pattern) if file.is_file()})
    streams = [(file, forged(file.read_bytes(), file.suffix, rng)) for file in files]
    counts, escaped, slowest, largest = Counter(), {}, 0.0, 0.0
    for number in range(FILES):
        file, stream = streams[number % len(streams)]
        for old in files:
            (folder / old.relative_to(good)).write_bytes(old.read_bytes())
        (folder / file.relative_to(good)).write_bytes(next(stream))
        case.fit(folder)
        outcome, wrong, seconds, megabytes = tried(case, folder, memory)
        counts[outcome] += 1
        slowest, largest = max(slowest, seconds), max(largest, megabytes)
        if wrong is not None:
            escaped.setdefault(f"{file.name}: {wrong}", number)
        if case.writes:
            shutil.rmtree(folder)
            shutil.copytree(good, folder)
    print(f"{entry}: {dict(counts)}, slowest {slowest:.2f} s, largest {largest:.0f} MB")
    assert not escaped


def test_the_report_that_is_forged_has_its_image(tmp_path):
    explanations(tmp_path)
    assert reported(tmp_path)["explained"] == 1


SIZE, GRID, BIG = [1 << 20, 1 << 20], [12_000, 12_000], 3 * 10**8
#: Sizes that a few bytes may claim: the reader, the file, the entry of its JSON, the value.
CLAIMS = [
    ("report", "explanations.json", "size", SIZE),
    ("report", "explanations.json", "size", 1 << 20),
    ("store: open", "manifest.json", "fingerprint/image", [3, 20_000, 20_000]),
    ("store: open", "manifest.json", "fingerprint/prompt/grid", [4000, 4000]),
    ("store: open", "manifest.json", "rows/0", 1 << 40),
    ("store: repair", "manifest.json", "fingerprint/prompt/grid", [4000, 4000]),
    ("store: resume", "manifest.json", "info/shard_rows", 1 << 40),
    ("store: extend", "manifest.json", "planned", [1 << 40]),
    ("SALFCBM", "config.json", "grid", GRID),
    ("SALFCBM", "config.json", "feature_dim", BIG),
    ("SALFCBM", "config.json", "num_classes", BIG),
    ("SALFCBM", "config.json", "input_size", GRID),
    ("SALFCBM", "config.json", "reading/image_size", GRID),
    ("SALFCBM without its backbone", "config.json", "backbone/recipe", {
        "library": "timm", "name": "resnet18", "num_classes": BIG,
    }),
    ("ConceptFusionMap", "a.safetensors", "options/n_channels", BIG),
    ("ConceptFusionMap", "a.safetensors", "hidden", [10**6, 10**6]),
    ("ConceptFusionMap", "a.safetensors", "embedding_dim", 1 << 24),
    ("SpatialACV", "a.safetensors", "rows/bright/rows", BIG),
    ("COCOParts", "json/n01440764.json", "images/0/height", 1 << 20),
    ("preprocessor_config.json", "preprocessor_config.json", "size", GRID),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("entry", "name", "key", "value"), CLAIMS, ids=[f"{one[0]}, {one[2]}" for one in CLAIMS])
def test_sizes_that_a_file_claims_are_not_allocated(tmp_path, entry, name, key, value):
    case, file, memory = ENTRIES[entry], tmp_path / name, Memory()
    case.make(tmp_path)
    with pytest.raises(CaptumConceptsError) if case.refused else contextlib.nullcontext():
        case.call(tmp_path)
    if case.writes:
        for old in tmp_path.iterdir():
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        case.make(tmp_path)
    data = file.read_bytes()
    header, values = ({}, b"") if file.suffix == ".json" else unpacked(data)
    tree = json.loads(data if not header else header["__metadata__"]["info"])
    node, (*path, last) = tree, key.split("/")
    for step in path:
        node = node[int(step) if isinstance(node, list) else step]
    node[int(last) if isinstance(node, list) else last] = value
    text = json.dumps(tree)
    if header:
        header["__metadata__"]["info"] = text
    file.write_bytes(packed(header, values) if header else text.encode())
    case.fit(tmp_path)
    outcome, wrong, *_ = tried(case, tmp_path, memory)
    assert wrong is None
    assert outcome in ("refused", "read")


@pytest.mark.parametrize("read", [load_image, read_ids])
@pytest.mark.parametrize("side", [10_001, 20_000])  # above this package's limit, and above Pillow's own
def test_a_few_bytes_that_claim_a_huge_image_are_refused_before_they_are_decoded(tmp_path, read, side):
    path = tmp_path / "bomb.png"
    Image.new("1", (side, side)).save(path)
    assert path.stat().st_size < 100_000
    with pytest.raises(CaptumConceptsError, match=r"bomb\.png claims .*pixels"):
        read(path)


@pytest.mark.parametrize("compression", ["raw", "tiff_deflate", "packbits"])
def test_a_few_bytes_that_claim_a_large_image_are_refused_too(tmp_path, compression):
    """Within the limit of pixels, but a file of so many bytes can show nothing."""
    path = tmp_path / "small.tif"
    Image.new("RGB", (9, 8)).save(path, compression=compression)
    data = bytearray(path.read_bytes())
    first = int.from_bytes(data[4:8], "little")
    for k in range(int.from_bytes(data[first : first + 2], "little")):
        entry = first + 2 + 12 * k
        if int.from_bytes(data[entry : entry + 2], "little") in (257, 278):  # length of the image, rows of a strip
            data[entry + 2 : entry + 12] = struct.pack("<HII", 4, 1, 4_194_316)
    path.write_bytes(data)
    with pytest.raises(CaptumConceptsError, match=r"claims 9 x 4194316 pixels in a file of \d+ bytes"):
        load_image(path, 64)


def test_hdf5_that_claims_a_huge_array_is_refused_before_it_is_allocated(tmp_path):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "gtsegs_ijcv.mat"
    hdf5(path)
    with h5py.File(path, "a") as file:
        big = file.create_dataset("#refs#/big", (3, 10**6, 10**6), np.uint8, chunks=(1, 100, 100))
        file["value/img"][0, 0] = big.ref
    assert path.stat().st_size < 100_000
    with pytest.raises(CaptumConceptsError, match="claims 3,000,000,000,000 numbers"):
        ImageNetSegmentation(path)[0]


def test_another_kind_of_file_is_refused_by_name(tmp_path):
    path = tmp_path / "a.safetensors"
    explanation().save(path)
    with pytest.raises(ArtifactError, match=r"is not a saved SpatialACV \(format 'captum_concepts.ConceptExplanation"):
        SpatialACV.load(path, NET, "0")
    path.write_bytes(safetensors_bytes({"a": torch.zeros(1)}))
    with pytest.raises(ArtifactError, match="format 'none'"):
        ConceptExplanation.load(path)


def test_a_store_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises((ArtifactError, FileNotFoundError, NotADirectoryError)):
        RegionEmbeddingStore.open(tmp_path / "file")


@pytest.mark.parametrize("make", [fusion_map, activation_map, discovered, spatial_acv], ids=lambda make: make.__name__)
def test_a_model_that_is_none_is_not_a_fault_of_the_file(make, tmp_path):
    explainer = make()
    path = explainer.save(tmp_path / "a.safetensors")
    with pytest.raises(InputError) as caught:
        type(explainer).load(path, None)
    assert "forward_func must be" in str(caught.value)
    assert str(path) not in str(caught.value)
