"""The interface of vision-language models, encoders from open_clip and transformers, and image regions."""

from captum_concepts.vlm.batching import trial_batch_size
from captum_concepts.vlm.dense import DenseRegions, Regions, regions_from_dict
from captum_concepts.vlm.encoder import ImageTextEncoder, check_encoder
from captum_concepts.vlm.hugging_face import from_transformers
from captum_concepts.vlm.open_clip import OpenCLIPEncoder, build_tower, tower_names
from captum_concepts.vlm.region_prompt import RegionPrompt

__all__ = [
    "DenseRegions",
    "ImageTextEncoder",
    "OpenCLIPEncoder",
    "RegionPrompt",
    "Regions",
    "build_tower",
    "check_encoder",
    "from_transformers",
    "regions_from_dict",
    "tower_names",
    "trial_batch_size",
]
