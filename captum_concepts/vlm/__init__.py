"""Image-text models: what the package asks of one, and open_clip's models behind that interface."""

from captum_concepts.vlm.encoder import ImageTextEncoder
from captum_concepts.vlm.open_clip import OpenCLIPEncoder
from captum_concepts.vlm.region_prompt import RegionPrompt

__all__ = ["ImageTextEncoder", "OpenCLIPEncoder", "RegionPrompt"]
