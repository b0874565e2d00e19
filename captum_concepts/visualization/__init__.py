"""Explanations as figures and pages. matplotlib is imported when something is drawn, not before."""

from captum_concepts.visualization.explorer import Explorer, explore
from captum_concepts.visualization.overlay import as_image, overlay, upsample
from captum_concepts.visualization.panels import heatmap_figure, panel, save_figure
from captum_concepts.visualization.report import ReportWriter, report
from captum_concepts.visualization.scale import ColorScale, value_range

__all__ = [
    "ColorScale",
    "Explorer",
    "ReportWriter",
    "as_image",
    "explore",
    "heatmap_figure",
    "overlay",
    "panel",
    "report",
    "save_figure",
    "upsample",
    "value_range",
]
