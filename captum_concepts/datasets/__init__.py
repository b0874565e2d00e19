"""Data sets with concept masks: synthetic scenes with exact ground truth, and readers for published data sets."""

from captum_concepts.datasets.folders import (
    CUB,
    Broden,
    COCOPanoptic,
    COCOParts,
    ImageNetS,
    ImageNetSegmentation,
    MaskFolder,
    PascalVOC,
    SegmentationDataset,
    SegmentedBatch,
    SegmentedImage,
    collate_segmented,
)
from captum_concepts.datasets.scenes import CaptionedScenes, Scene

__all__ = [
    "CUB",
    "Broden",
    "COCOPanoptic",
    "COCOParts",
    "CaptionedScenes",
    "ImageNetS",
    "ImageNetSegmentation",
    "MaskFolder",
    "PascalVOC",
    "Scene",
    "SegmentationDataset",
    "SegmentedBatch",
    "SegmentedImage",
    "collate_segmented",
]
