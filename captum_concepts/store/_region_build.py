"""Building, joining and extending a store of region embeddings; what may be resumed and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from captum_concepts.activations import evaluation_mode
from captum_concepts.errors import ArtifactError, InputError
from captum_concepts.store._region_data import Pictures, check_pictures
from captum_concepts.store._region_parts import check_parts, default_shard_rows, join_parts, part_name, share
from captum_concepts.store._region_pipeline import check_embedding, device_of, embed_spans, module_of
from captum_concepts.store.lock import FolderLock
from captum_concepts.store.manifest import check_fingerprint, fingerprint_callable
from captum_concepts.store.shard_files import MANIFEST, check_files, read_manifest
from captum_concepts.store.shards import ShardReader, ShardWriter
from captum_concepts.vlm import RegionPrompt

KIND = "region embeddings, version 1"
DTYPES = {"float16": torch.float16, "float32": torch.float32}
_PROBE, _PROBE_TOLERANCE = 16, 5e-3


def origin(encoder: Any, prompt: RegionPrompt, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    """What the embeddings are made from: everything that must be equal for two stores to be one."""
    if not callable(getattr(encoder, "encode_image", None)):
        raise InputError(f"encoder {type(encoder).__name__} has no encode_image; see captum_concepts.vlm")
    if not isinstance(prompt, RegionPrompt):
        raise InputError(f"prompt must be a RegionPrompt, got {type(prompt).__name__}")
    if dtype not in DTYPES.values():
        raise InputError(f"dtype={dtype} must be torch.float16 or torch.float32")
    preprocess = getattr(encoder, "preprocess", None)
    return {
        "kind": KIND,
        "encoder": fingerprint_callable(encoder.encode_image),
        "preprocess": json.loads(json.dumps(preprocess, default=str)) if isinstance(preprocess, Mapping) else None,
        "prompt": prompt.as_dict(),
        "image": list(shape),
        "dtype": str(dtype).removeprefix("torch."),
    }


@torch.no_grad()
def probe(encoder: Any, shape: tuple[int, ...]) -> list[float]:
    """The first numbers of the unit embedding of a fixed image: tells encoders apart that differ outside weights."""
    image = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0)).to(device_of(encoder))
    with evaluation_mode(module_of(encoder)):
        embedding = check_embedding(encoder.encode_image(image), 1)[0].cpu()
    unit = torch.nn.functional.normalize(embedding, dim=0)[:_PROBE]
    return [round(float(v), 4) for v in unit]


def check_origin(manifest: Mapping[str, Any], wanted: Mapping[str, Any], found: list[float], what: str) -> None:
    """Refuse a store of another encoder, preprocessing, prompt, grid, image size or precision."""
    made_with(manifest)
    differing = {key: wanted[key] for key in wanted if manifest["fingerprint"].get(key) != wanted[key]}
    if "prompt" in differing:  # name the one setting, not two long dictionaries
        check_fingerprint(wanted["prompt"], manifest["fingerprint"]["prompt"], f"{what} (its prompt)")
    check_fingerprint(differing, manifest["fingerprint"], what)
    stored = manifest.get("info", {}).get("probe")
    if stored and not torch.allclose(torch.tensor(stored), torch.tensor(found), atol=_PROBE_TOLERANCE, rtol=0):
        raise ArtifactError(
            f"{what} was made by an encoder with the same weights that embeds a test image differently: its "
            "preprocessing or settings have changed"
        )


def made_with(manifest: Mapping[str, Any]) -> tuple[RegionPrompt, torch.dtype]:
    """The prompt and the precision of a store."""
    fingerprint = manifest["fingerprint"]
    if fingerprint.get("kind") != KIND:
        raise ArtifactError("the folder holds a store, but not one of region embeddings of this version")
    return RegionPrompt.from_dict(fingerprint["prompt"]), DTYPES[fingerprint["dtype"]]


def build_part(
    path: Path,
    pictures: Pictures,
    encoder: Any,
    prompt: RegionPrompt,
    *,
    batch_size: int,
    rank: int,
    num_replicas: int,
    resume: bool,
    dtype: torch.dtype,
    shard_rows: int | None,
    show_progress: bool,
) -> bool:
    """Embed this process' share; True once the store is whole."""
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size} must be at least 1")
    if shard_rows is not None and shard_rows < 1:
        raise InputError(f"shard_rows={shard_rows} must be at least 1, or None")
    if not 0 <= rank < num_replicas:
        raise InputError(f"rank={rank} must lie in [0, num_replicas={num_replicas})")
    what, count = f"the store at {path}", len(pictures)
    made_from = origin(encoder, prompt, pictures.shape, dtype)
    probed = probe(encoder, pictures.shape)
    whole = read_manifest(path) if resume else None
    if whole is not None:
        check_origin(whole, made_from, probed, what)
        if whole["complete"]:
            check_files(path, whole)
            _check_count(whole, count, what)
            check_pictures(pictures, digests(path), 0, what)
            return True
    check_parts(path, num_replicas, whole, remove=not resume and num_replicas == 1)
    if not resume and num_replicas > 1:  # nobody can join before this process has finished its part
        (path / MANIFEST).unlink(missing_ok=True)
    folder = path if num_replicas == 1 else path / part_name(rank, num_replicas)
    with ExitStack() as stack:
        with _explained(folder, count):
            stack.enter_context(FolderLock(folder, "the store at"))
        manifest = read_manifest(folder) if resume else None
        fingerprint = made_from if num_replicas == 1 else {**made_from, "part": f"{rank} of {num_replicas}"}
        if manifest is not None:
            check_origin(manifest, fingerprint, probed, what)
            _check_count(manifest, count, what)
        if manifest is None or not manifest["complete"]:  # the files of a complete part may be with the others already
            rows = (manifest or {}).get("info", {}).get("shard_rows") or shard_rows or default_shard_rows(count)
            first, last = share(count, rows, rank, num_replicas)
            with _explained(folder, count):
                writer = ShardWriter(folder, fingerprint, shard_rows=rows, resume=resume)
            if writer.rows:
                check_pictures(pictures, _stored_digests(folder, manifest), first, what)
            for key, value in {"images": count, "shard_rows": rows, "probe": probed}.items():
                writer.info.setdefault(key, value)
            span = (first + writer.rows, last)
            _append(writer, pictures, span, encoder, prompt, batch_size, dtype, show_progress, count)
            with _explained(folder, count):
                writer.finish()
    return num_replicas == 1 or join_parts(path, made_from, num_replicas)


def extend(
    path: Path,
    pictures: Pictures,
    encoder: Any,
    prompt: RegionPrompt,
    *,
    batch_size: int,
    dtype: torch.dtype,
    show_progress: bool,
) -> None:
    """Append the embeddings of more images; goes on where a killed extension by the same images stopped."""
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size} must be at least 1")
    what, count = f"the store at {path}", len(pictures)
    made_from, probed = origin(encoder, prompt, pictures.shape, dtype), probe(encoder, pictures.shape)
    with ExitStack() as stack:
        with _explained(path, None):
            stack.enter_context(FolderLock(path, "the store at"))
        manifest = read_manifest(path)
        if manifest is None:
            raise FileNotFoundError(f"there is no store at {path}; build it first")
        check_origin(manifest, made_from, probed, what)
        started = manifest["info"].get("extension")
        if started is None and not manifest["complete"]:
            raise ArtifactError(f"{what} is unfinished; call build again with its own images, then extend it")
        if started is not None and started["images"] != count:
            raise ArtifactError(
                f"{what} is being extended by {started['images']} images, not {count}; finish that extension first"
            )
        with _explained(path, None):
            writer = ShardWriter(path, made_from, shard_rows=manifest["info"]["shard_rows"])
        first = writer.rows if started is None else started["first"]
        if writer.rows > first:
            check_pictures(pictures, _stored_digests(path, manifest)[first:], 0, what)
        writer.info["images"] = first + count
        writer.info["extension"] = {"first": first, "images": count}
        span = (writer.rows - first, count)
        _append(writer, pictures, span, encoder, prompt, batch_size, dtype, show_progress, first + count)
        with _explained(path, first + count):
            writer.finish()  # with the note still there, so that a kill right here is not taken for an unfinished build
            del writer.info["extension"]
            writer.finish()


def _append(
    writer: ShardWriter,
    pictures: Pictures,
    span: tuple[int, int],
    encoder: Any,
    prompt: RegionPrompt,
    batch_size: int,
    dtype: torch.dtype,
    show_progress: bool,
    count: int,
) -> None:
    spans = [(s, min(s + writer.shard_rows, span[1])) for s in range(*span, writer.shard_rows)]

    def consume(tensors: dict[str, Tensor], rounding: float) -> None:
        writer.info["error_bound"] = max(rounding, writer.info.get("error_bound", 0.0))
        with _explained(writer.path, count):
            writer.append(tensors)

    embed_spans(
        pictures, spans, encoder, prompt, consume, batch_size=batch_size, dtype=dtype, show_progress=show_progress
    )


def digests(path: Path) -> Tensor:
    """The digests of all images of a complete store."""
    reader = ShardReader(path)
    return reader.rows("digest", range(len(reader))) if len(reader) else torch.empty(0, dtype=torch.int64)


def _stored_digests(path: Path, manifest: Mapping[str, Any] | None) -> Tensor:
    """The digests of an unfinished store."""
    from safetensors import safe_open

    parts = []
    for shard in (manifest or {})["shards"]:
        with safe_open(path / shard["file"], framework="pt") as file:
            parts.append(file.get_tensor("digest"))
    return torch.cat(parts)


def _check_count(manifest: Mapping[str, Any], count: int, what: str) -> None:
    info = manifest.get("info", {})
    if "extension" in info:
        raise ArtifactError(f"{what} is in the middle of an extension; call extend again with the same images")
    if "images" in info and info["images"] != count:
        raise ArtifactError(
            f"{what} was made from {info['images']} images, the data has {count}; add images with extend(), or build "
            "elsewhere"
        )


@contextmanager
def _explained(path: Path, count: int | None) -> Iterator[None]:
    """Say with an error of the file system what is safe and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno is None or isinstance(error, FileNotFoundError):
            raise
        try:
            manifest = read_manifest(path)
        except (ArtifactError, OSError):
            manifest = None
        rows = sum(shard["rows"] for shard in manifest["shards"]) if manifest else 0
        raise OSError(
            error.errno,
            f"{error.strerror}: the store at {path} cannot be written. {rows}{'' if count is None else f' of {count}'} "
            "images are safe in it; make room or give the right to write, then make the same call again to go on",
            error.filename,
        ) from error
