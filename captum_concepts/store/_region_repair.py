"""Finding damaged files of a store of region embeddings, and computing them again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from captum_concepts._artifacts import write_atomically
from captum_concepts.errors import ArtifactError
from captum_concepts.store._region_build import check_origin, origin, probe
from captum_concepts.store._region_data import Pictures, check_pictures
from captum_concepts.store._region_pipeline import embed_spans
from captum_concepts.store._region_reader import RegionReader
from captum_concepts.store.lock import FolderLock
from captum_concepts.store.shard_files import MANIFEST, read_manifest
from captum_concepts.vlm import RegionPrompt


def damaged_shards(path: Path, shards: Sequence[Mapping[str, Any]]) -> list[tuple[int, int, int, str]]:
    """``(number, first image, image behind the last, what is wrong)`` of every file that is not as it was written."""
    found, first = [], 0
    for number, shard in enumerate(shards):
        file, last = path / shard["file"], first + shard["rows"]
        if not file.is_file():
            found.append((number, first, last, "missing"))
        elif file.stat().st_size != shard["bytes"]:
            found.append((number, first, last, f"{file.stat().st_size} bytes instead of {shard['bytes']}"))
        elif _sha256(file) != shard["sha256"]:
            found.append((number, first, last, "its checksum differs"))
        first = last
    return found


def verify(store: RegionReader, pictures: Pictures | None) -> dict[str, int]:
    """Read all of a store and compare it with what was written, and with ``pictures``."""
    manifest = read_manifest(store.path) or {"shards": []}
    damaged = damaged_shards(store.path, manifest["shards"])
    if damaged:
        listed = "; ".join(
            f"{manifest['shards'][n]['file']} (images {first} to {last - 1}): {why}" for n, first, last, why in damaged
        )
        raise ArtifactError(f"the store at {store.path} is damaged: {listed}. repair() computes them again")
    tolerance = 2.0**-10 if store.dtype == torch.float16 else 1e-5
    for start in range(0, len(store), 256):
        norm = store.embeddings(slice(start, start + 256)).float().norm(dim=2)
        if not ((norm - 1).abs() < tolerance).logical_or(norm == 0).all():
            raise ArtifactError(f"images {start} to {start + 255} of the store at {store.path} have no unit embeddings")
    if pictures is not None:
        if len(pictures) != len(store):
            raise ArtifactError(f"the store at {store.path} has {len(store)} images, the data {len(pictures)}")
        check_pictures(pictures, store.digests(), 0, f"the store at {store.path}", all_rows=True)
    return {
        "images": len(store),
        "shards": len(manifest["shards"]),
        "bytes": sum(f.stat().st_size for f in store.path.rglob("*") if f.is_file()),
    }


def repair(
    path: Path,
    pictures: Pictures,
    encoder: Any,
    prompt: RegionPrompt,
    *,
    batch_size: int,
    dtype: torch.dtype,
    show_progress: bool,
) -> list[int]:
    """Compute damaged shards again; the images of each that had to be."""
    from safetensors.torch import save

    what = f"the store at {path}"
    with FolderLock(path, "the store at"):
        manifest = read_manifest(path)
        if manifest is None:
            raise FileNotFoundError(f"there is no store at {path}")
        made_from = origin(encoder, prompt, pictures.shape, dtype)
        check_origin(manifest, made_from, probe(encoder, pictures.shape), what)
        shards = manifest["shards"]
        damaged = damaged_shards(path, shards)
        total = sum(shard["rows"] for shard in shards)
        if (manifest["complete"] and len(pictures) != total) or len(pictures) < total:
            raise ArtifactError(f"{what} has {total} images, the data {len(pictures)}")
        bad = {number for number, *_ in damaged}
        first = 0
        for number, shard in enumerate(shards):
            if number not in bad:  # few images of each: all files together are a good sample
                check_pictures(pictures, _digests(path / shard["file"])[:2], first, what)
            first += shard["rows"]
        waiting = iter(damaged)

        def consume(tensors: dict[str, Tensor], rounding: float) -> None:
            number = next(waiting)[0]
            data = save(tensors)
            write_atomically(path / shards[number]["file"], data)
            shards[number] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            manifest["info"]["error_bound"] = max(rounding, manifest["info"]["error_bound"])
            write_atomically(path / MANIFEST, json.dumps(manifest, indent=1).encode())

        spans = [(start, stop) for _, start, stop, _ in damaged]
        embed_spans(
            pictures, spans, encoder, prompt, consume, batch_size=batch_size, dtype=dtype, show_progress=show_progress
        )
    return [image for start, stop in spans for image in range(start, stop)]


def _digests(file: Path) -> Tensor:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor("digest")


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
