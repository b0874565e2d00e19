"""How well maps find regions and how much they move scores: pure functions and streaming metrics."""

from __future__ import annotations

from captum_concepts.metrics.energy import epg, pointing_game
from captum_concepts.metrics.region import hit_rate, nra, region_auc, specificity

__all__ = ["epg", "hit_rate", "nra", "pointing_game", "region_auc", "specificity"]
