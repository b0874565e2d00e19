"""Figures and pages of explanations; matplotlib is imported only when something is drawn."""

from captum_concepts.visualization.explorer import Explorer, explore
from captum_concepts.visualization.figures import legend, most_activating, sankey
from captum_concepts.visualization.inputs import strongest_images
from captum_concepts.visualization.notebook import show
from captum_concepts.visualization.overlay import as_image, overlay, upsample
from captum_concepts.visualization.panels import heatmap_figure, panel, panel_image, save_figure
from captum_concepts.visualization.report import ReportWriter, report
from captum_concepts.visualization.scale import ColorScale, value_range
from captum_concepts.visualization.user_study import UserStudy, score_user_study, user_study

__all__ = [
    "ColorScale",
    "Explorer",
    "ReportWriter",
    "UserStudy",
    "as_image",
    "explore",
    "heatmap_figure",
    "legend",
    "most_activating",
    "overlay",
    "panel",
    "panel_image",
    "report",
    "sankey",
    "save_figure",
    "score_user_study",
    "show",
    "strongest_images",
    "upsample",
    "user_study",
    "value_range",
]
