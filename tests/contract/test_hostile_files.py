"""Every loader against damaged and hostile files: it loads, or one of the package's own exceptions comes out.

``FUZZ=10000 pytest tests/contract/test_hostile_files.py`` (`make fuzz`) tries that many files against each loader; by
default a few hundred. A file is damaged blindly (bits, cuts, insertions) or knowingly (a value of its JSON replaced:
sizes, types, paths, offsets), because blind damage rarely gets past a checksum.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import os
import random
import re
import resource
import shutil
import struct
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save as safetensors_bytes
from torch import nn

from captum_concepts import ConceptExplanation, ConceptFusionMap, ConceptTranslator, SpatialACV
from captum_concepts.concepts import Vocabulary
from captum_concepts.datasets import ImageNetSegmentation
from captum_concepts.datasets.annotation import read_ids
from captum_concepts.errors import ArtifactError, CaptumConceptsError
from captum_concepts.images import load_image
from captum_concepts.metrics import EvaluationTable
from captum_concepts.store import RegionEmbeddingStore
from captum_concepts.store.shards import ShardReader, ShardWriter
from captum_concepts.vlm import DenseRegions, RegionPrompt

FILES = int(os.environ.get("FUZZ", "300"))
HOSTILE = [
    None, True, -1, 0, 1, 2**31, 2**63, 2**80, -(2**40), 1e308, float("nan"), float("inf"), "", "a", "../../etc/passwd",
    "/dev/zero", "\x00", "é" * 200, [], {}, [[]], [None], ["a", "a"], [2**40, 2**40], [0], [-1], {"a": 1}, "F64", "U8",
    "captum_concepts", [[1, 2], [3]], {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 8]},
]  # fmt: skip
MEMORY = 2 << 30
SECONDS = 2.0


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()


def explanation(path: Path) -> None:
    ConceptExplanation(
        ["a", "b"], scores=torch.rand(2, 2), maps=torch.rand(2, 2, 3, 3), contributions=torch.rand(2, 2), layer="x"
    ).save(path)


def spatial_acv(path: Path) -> None:
    images = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    SpatialACV(network(), "0").fit({"bright": images[:4] + 1}, images[4:]).save(path)


def fusion_map(path: Path) -> None:
    torch.manual_seed(0)
    translator = ConceptTranslator([4], 6, hidden=(5, 5))
    ConceptFusionMap(network(), ["0"], translator, ["a", "b"], torch.randn(2, 6)).save(path)


def vocabulary(path: Path) -> None:
    Vocabulary(["red ball", "blue box", "red  ball"]).clean().save(path)


def table(path: Path) -> None:
    row = {"explainer": "a", "metric": "nra", "value": 0.5, "ci_low": None, "ci_high": 0.6, "examples": 3}
    row |= {"counted": 3, "skipped": 0, "higher_is_better": True}
    path.write_text(json.dumps({"rows": [row], "confidence": 0.95}))


def image(path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (12, 9, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def labels(path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 9, (12, 9), np.uint8)).save(path)


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


def shards(path: Path) -> None:
    with ShardWriter(path, {"seed": 1}, shard_rows=2) as writer:
        writer.append({"embedding": torch.rand(4, 3)})


#: name of the file, how it is made, how it is read. A new loader is one line.
LOADERS = {
    "ConceptExplanation": ("a.safetensors", explanation, ConceptExplanation.load),
    "SpatialACV": ("a.safetensors", spatial_acv, lambda path: SpatialACV.load(path, network(), "0")),
    "ConceptFusionMap": ("a.safetensors", fusion_map, lambda path: ConceptFusionMap.load(path, network())),
    "Vocabulary.json": ("a.json", vocabulary, Vocabulary.load),
    "Vocabulary.txt": ("a.txt", vocabulary, Vocabulary.load),
    "EvaluationTable": ("a.json", table, lambda path: EvaluationTable.from_json(path.read_text(errors="replace"))),
    "image.png": ("a.png", image, load_image),
    "image.jpg": ("a.jpg", image, load_image),
    "image.gif": ("a.gif", image, load_image),
    "image.tif": ("a.tif", image, load_image),
    "labels.png": ("a.png", labels, read_ids),
    "labels.tif": ("a.tif", labels, read_ids),
    "ImageNetSegmentation": ("gtsegs_ijcv.mat", hdf5, lambda path: ImageNetSegmentation(path, labelled=True)[0]),
}


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


def poisoned(tree: object, rng: random.Random) -> object:
    """The JSON value with one part replaced, removed, or buried in a thousand lists."""
    tree = copy.deepcopy(tree)
    places: list[tuple[object, object]] = []

    def walk(node: object) -> None:
        for key in list(node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else []):
            places.append((node, key))
            walk(node[key])

    walk(tree)
    if not places or rng.random() < 0.05:
        return rng.choice(HOSTILE)
    node, key = rng.choice(places)
    if isinstance(node, dict) and rng.random() < 0.2:
        del node[key]
    else:
        node[key] = rng.choice(HOSTILE)
    return tree


def hostile(data: bytes, suffix: str, rng: random.Random) -> bytes:
    """A damaged file, or for JSON and safetensors one whose content is wrong behind a flawless form."""
    if rng.random() < 0.4 or suffix not in (".json", ".safetensors"):
        return damaged(data, rng)
    if suffix == ".json":
        if rng.random() < 0.02:
            return b"[" * 100_000
        return json.dumps(poisoned(json.loads(data), rng)).encode()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    inner = header.get("__metadata__", {})
    if "info" in inner and rng.random() < 0.7:
        inner["info"] = "[" * 100_000 if rng.random() < 0.02 else json.dumps(poisoned(json.loads(inner["info"]), rng))
    else:
        header = poisoned(header, rng)
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data[8 + length :]


def outcome(read, path: Path) -> str | None:
    """None where it loads or fails in the package's own words, else what came out instead."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(path)
    except CaptumConceptsError:
        return None
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


@pytest.mark.parametrize("loader", LOADERS)
def test_only_the_packages_own_exceptions_come_out(tmp_path, loader):
    name, make, read = LOADERS[loader]
    path = tmp_path / name
    make(path)
    read(path)
    good = path.read_bytes()
    rng = random.Random(loader)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    escaped = {}
    for number in range(FILES):
        path.write_bytes(hostile(good, path.suffix, rng))
        if (found := outcome(read, path)) is not None:
            escaped.setdefault(found[:160], number)
    assert not escaped
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < MEMORY, f"{grown / 2**30:.1f} GB were taken for files of a few kilobytes"


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_pretrained_models(tmp_path, file):
    """A SALFCBM's folder, also where the digest that ties its two files together is forged."""
    from captum_concepts import SALFCBM
    from captum_concepts.models.salf_cbm import hub

    backbone = network()
    SALFCBM(backbone, "0", ["a", "b"], 3, grid=(2, 2)).save_pretrained(tmp_path)
    config, weights = (tmp_path / name for name in ("config.json", "model.safetensors"))
    path = tmp_path / file
    good, forged, rng, escaped = path.read_bytes(), weights.read_bytes(), random.Random(file), {}
    length = struct.unpack("<Q", forged[:8])[0]

    def read(folder: Path) -> None:
        SALFCBM.from_pretrained(folder, backbone=backbone)

    read(tmp_path)
    for number in range(FILES):
        path.write_bytes(hostile(good, path.suffix, rng))
        if file == "config.json":
            try:
                content = json.loads(config.read_bytes())
                digest = hub._digest({**hub._SINCE_2, **content})
            except (ValueError, LookupError, TypeError, RecursionError, AttributeError):
                continue  # damaged blindly: the plain loaders above are tried with such files
            header = json.loads(forged[8 : 8 + length])
            header["__metadata__"]["info"] = json.dumps({"config": digest})
            encoded = json.dumps(header).encode()
            weights.write_bytes(struct.pack("<Q", len(encoded)) + encoded + forged[8 + length :])
        if (found := outcome(read, tmp_path)) is not None:
            escaped.setdefault(found[:160], number)
    assert not escaped


# ---------------------------------------------------------------------------------------------------------- folders


class Colors:
    """An encoder as small as they come; with dense regions."""

    logit_scale, logit_bias = 10.0, 0.0

    def encode_image(self, images):
        return images.mean((2, 3)) + 0.1

    def encode_regions(self, images, grid):
        return nn.functional.adaptive_avg_pool2d(images, grid).flatten(2).transpose(1, 2) + 0.1

    def encode_text(self, texts):
        return torch.eye(3)[: len(texts)]


PICTURES = torch.rand(7, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPT = RegionPrompt("crop", (2, 2), 2)
CIRCLES = RegionPrompt("circle", (2, 2), 2)
DENSE = DenseRegions((2, 2))
STORE = {"batch_size": 8, "shard_rows": 3}


def region_store(prompt, *, cut=False, extended=False):
    def make(folder: Path) -> None:
        store = RegionEmbeddingStore.build(folder, PICTURES, Colors(), prompt, **STORE)
        if extended:
            kept = (folder / "manifest.json").read_text()
            store.extend(PICTURES[:4], Colors())
            grown = json.loads((folder / "manifest.json").read_text())
            grown["info"]["extension"] = {"first": 7, "images": 4}
            assert kept != json.dumps(grown)
            (folder / "manifest.json").write_text(json.dumps(grown))
        if cut:
            max(folder.glob("shard-*")).unlink()

    return make


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
    return lambda folder: RegionEmbeddingStore.build(folder, PICTURES, Colors(), prompt, **STORE)


def shard_rows(folder: Path) -> None:
    reader = ShardReader(folder, verify=True)
    for name in reader.names:
        reader.rows(name, range(len(reader)))


def appended(folder: Path) -> None:
    with ShardWriter(folder, {"seed": 1}, shard_rows=2) as writer:
        writer.append({"embedding": torch.rand(1, 3)})


#: how a folder is made, and what is called on it once one of its files was forged. A new entry point is one line.
FOLDERS = {
    "open": (region_store(PROMPT), opened),
    "open, dense": (region_store(DENSE), opened),
    "open, format 1": (format_1, opened),
    "verify": (region_store(CIRCLES), lambda folder: RegionEmbeddingStore.open(folder).verify(PICTURES)),
    "build": (region_store(PROMPT), built(PROMPT)),
    "build, format 1": (format_1, built(CIRCLES)),
    "resume": (region_store(DENSE, cut=True), built(DENSE)),
    "build_part": (
        region_store(PROMPT, cut=True),
        lambda folder: RegionEmbeddingStore.build_part(
            folder, PICTURES, Colors(), PROMPT, rank=1, num_replicas=2, **STORE
        ),
    ),
    "repair": (region_store(CIRCLES), lambda folder: RegionEmbeddingStore.repair(folder, PICTURES, Colors())),
    "repair, format 1": (format_1, lambda folder: RegionEmbeddingStore.repair(folder, PICTURES, Colors())),
    "extend": (
        region_store(PROMPT),
        lambda folder: RegionEmbeddingStore.extend_at(folder, PICTURES[:4], Colors()),
    ),
    "resume extend": (
        region_store(PROMPT, extended=True),
        lambda folder: RegionEmbeddingStore.extend_at(folder, PICTURES[:4], Colors()),
    ),
    "ShardReader": (shards, shard_rows),
    "ShardWriter": (shards, appended),
}


def forgeries(tree: object, rng: random.Random) -> Iterator[object]:
    """Every value of a JSON tree replaced by every hostile one, every key removed, renamed and joined by another; in
    random order."""
    places: list[tuple[list[object], object]] = []

    def walk(node: object, path: list[object]) -> None:
        for key in list(node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else []):
            places.append((path, key))
            walk(node[key], [*path, key])

    walk(tree, [])
    changes = [(path, key, value) for path, key in places for value in (*HOSTILE, REMOVED, RENAMED, JOINED)]
    rng.shuffle(changes)
    for path, key, value in changes:
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
        yield forged


REMOVED, RENAMED, JOINED = object(), object(), object()


def forged_shards(data: bytes, rng: random.Random) -> Iterator[bytes]:
    """A shard with forged JSON: of its header, or of what the store notes in it; with a checksum that fits."""
    length = struct.unpack("<Q", data[:8])[0]
    header, values = json.loads(data[8 : 8 + length]), data[8 + length :]
    metadata = header.get("__metadata__", {})
    key = next(iter(metadata), None)

    def packed(changed: object) -> bytes:
        encoded = json.dumps(changed).encode()
        raw = struct.pack("<Q", len(encoded)) + encoded + values
        found = re.search(rb'sha256\\": \\"([0-9a-f]{64})', raw)
        if found is None:
            return raw
        blank = raw.replace(found[1], b"0" * 64, 1)
        return blank.replace(b"0" * 64, hashlib.sha256(blank).hexdigest().encode(), 1)

    outer = (packed(changed) for changed in forgeries(header, rng))
    inner = (
        packed({**header, "__metadata__": {**metadata, key: json.dumps(changed)}})
        for changed in (forgeries(json.loads(metadata[key]), rng) if key else ())
    )
    for pair in itertools.zip_longest(outer, inner):
        yield from (one for one in pair if one is not None)


@pytest.mark.parametrize("file", ["manifest.json", "shard-00000.safetensors", "shard-00001.safetensors"])
@pytest.mark.parametrize("entry", FOLDERS)
def test_folders(tmp_path, entry, file):
    """Each entry point on a folder in which one file was forged: only own errors, within 2 s and 200 MB."""
    make, call = FOLDERS[entry]
    good, folder = tmp_path / "good", tmp_path / "store"
    make(good)
    data, rng = (good / file).read_bytes(), random.Random(f"{entry} {file}")
    json_file = file.endswith(".json")
    known = forgeries(json.loads(data), rng) if json_file else forged_shards(data, rng)
    escaped: dict[str, int] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shutil.copytree(good, folder)
        call(folder)  # loads what is loaded once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(max(40, FILES // 8)):
        forged = next(known, None) if rng.random() < 0.8 else damaged(data, rng)
        if forged is None:
            break
        shutil.rmtree(folder)
        shutil.copytree(good, folder)
        (folder / file).write_bytes(
            json.dumps(forged).encode() if json_file and not isinstance(forged, bytes) else forged
        )
        started = time.process_time()
        if (found := outcome(call, folder)) is not None:
            escaped.setdefault(found[:160], number)
        if (spent := time.process_time() - started) > SECONDS:
            escaped.setdefault(f"{spent:.1f} s of work", number)
    assert not escaped
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 200 << 20, f"{grown >> 20} MB were taken for a store of some kilobytes"


@pytest.mark.parametrize("read", [load_image, read_ids])
@pytest.mark.parametrize("side", [10_001, 20_000])  # above this package's limit, and above Pillow's own
def test_a_few_bytes_that_claim_a_huge_image_are_refused_before_they_are_decoded(tmp_path, read, side):
    path = tmp_path / "bomb.png"
    Image.new("1", (side, side)).save(path)
    assert path.stat().st_size < 100_000
    with pytest.raises(CaptumConceptsError, match=r"bomb\.png claims .*pixels"):
        read(path)


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


def test_sizes_that_the_header_claims_are_not_allocated(tmp_path):
    """A translator of 10^12 weights in a file of a kilobyte."""
    path = tmp_path / "a.safetensors"
    fusion_map(path)
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    info = json.loads(header["__metadata__"]["info"])
    info["hidden"] = [10**6, 10**6]
    header["__metadata__"]["info"] = json.dumps(info)
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data[8 + length :])
    with pytest.raises(ArtifactError, match="cannot be read as a saved ConceptFusionMap"):
        ConceptFusionMap.load(path, network())


def test_another_kind_of_file_is_refused_by_name(tmp_path):
    path = tmp_path / "a.safetensors"
    explanation(path)
    with pytest.raises(ArtifactError, match=r"is not a saved SpatialACV \(format 'captum_concepts.ConceptExplanation"):
        SpatialACV.load(path, network(), "0")
    path.write_bytes(safetensors_bytes({"a": torch.zeros(1)}))
    with pytest.raises(ArtifactError, match="format 'none'"):
        ConceptExplanation.load(path)


def test_a_store_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises((ArtifactError, FileNotFoundError, NotADirectoryError)):
        RegionEmbeddingStore.open(tmp_path / "file")
