"""The same concepts at several layers, with :meth:`SpatialACV.layer_sweep` as a function."""

from captum_concepts.attr.spatial_acv import SpatialACV
from captum_concepts.attr.spatial_acv.sweep import LayerSweep

layer_sweep = SpatialACV.layer_sweep

__all__ = ["LayerSweep", "layer_sweep"]
