"""Data sets with concept masks: synthetic scenes with an exact truth."""

from captum_concepts.datasets.scenes import CaptionedScenes, Scene

__all__ = ["CaptionedScenes", "Scene"]
