"""Embeddings and activations on disk: sharded, memory-mapped, resumable, and sure of what they were made from."""

from captum_concepts.store.region_embeddings import RegionEmbeddingStore
from captum_concepts.store.shards import ShardReader, ShardWriter
from captum_concepts.store.similarity import Similarity

__all__ = ["RegionEmbeddingStore", "ShardReader", "ShardWriter", "Similarity"]
