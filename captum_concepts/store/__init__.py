"""Sharded, memory-mapped, resumable stores of embeddings and activations that record what they were computed from.

Names are imported when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from captum_concepts import _lazy

if TYPE_CHECKING:
    from captum_concepts.store.build import device_of, module_of
    from captum_concepts.store.lock import FolderLock
    from captum_concepts.store.manifest import (
        Manifest,
        check_fingerprint,
        fingerprint_callable,
        fingerprint_module,
        fingerprint_tensor,
        read_manifest,
    )
    from captum_concepts.store.processes import all_or_none, world
    from captum_concepts.store.region_embeddings import RegionEmbeddingStore
    from captum_concepts.store.shards import (
        ShardReader,
        ShardWriter,
        check_unclaimed,
        default_shard_rows,
        fill_shards,
        missing_shards,
        shard_sizes,
    )
    from captum_concepts.store.similarity import Similarity
    from captum_concepts.store.uniform_images import UniformImages

__all__ = [
    "FolderLock",
    "Manifest",
    "RegionEmbeddingStore",
    "ShardReader",
    "ShardWriter",
    "Similarity",
    "UniformImages",
    "all_or_none",
    "check_fingerprint",
    "check_unclaimed",
    "default_shard_rows",
    "device_of",
    "fill_shards",
    "fingerprint_callable",
    "fingerprint_module",
    "fingerprint_tensor",
    "missing_shards",
    "module_of",
    "read_manifest",
    "shard_sizes",
    "world",
]

__getattr__ = _lazy.getter(
    __name__,
    {
        "FolderLock": "lock",
        "Manifest": "manifest",
        "RegionEmbeddingStore": "region_embeddings",
        "ShardReader": "shards",
        "ShardWriter": "shards",
        "Similarity": "similarity",
        "UniformImages": "uniform_images",
        "all_or_none": "processes",
        "check_fingerprint": "manifest",
        "check_unclaimed": "shards",
        "default_shard_rows": "shards",
        "device_of": "build",
        "fill_shards": "shards",
        "fingerprint_callable": "manifest",
        "fingerprint_module": "manifest",
        "fingerprint_tensor": "manifest",
        "missing_shards": "shards",
        "module_of": "build",
        "read_manifest": "manifest",
        "shard_sizes": "shards",
        "world": "processes",
    },
)
