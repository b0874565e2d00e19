"""Explanations as pictures. matplotlib is imported when something is drawn, not before."""

from captum_concepts.visualization.overlay import as_image, overlay, upsample, value_range
from captum_concepts.visualization.panels import heatmap_figure, panel, save_figure

__all__ = ["as_image", "heatmap_figure", "overlay", "panel", "save_figure", "upsample", "value_range"]
