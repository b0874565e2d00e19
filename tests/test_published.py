"""The papers' own settings are settings that exist, and every one of them is told of on its page."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from captum_concepts import (
    SALFCBM,
    ConceptFusionMap,
    FeatureActivationMap,
    SpatialACV,
    fit_salf_cbm,
    metrics,
    published,
)
from captum_concepts.vlm import RegionPrompt

#: What each dictionary is for.
FOR = {
    "FEATURE_ACTIVATION_MAP": [FeatureActivationMap.__init__],
    "SPATIAL_ACV_FIT": [SpatialACV.fit],
    "CONCEPT_FUSION_MAP": [ConceptFusionMap.__init__],
    "CONCEPT_FUSION_FIT": [ConceptFusionMap.fit],
    "REGION_PROMPT": [RegionPrompt.__init__],
    "FIT_SALF_CBM": [fit_salf_cbm],
    "EXPLAIN_REGION": [SALFCBM.explain_region],
    "INTERVENE": [SALFCBM.intervene],
    "ZERO_SHOT_SEGMENTATION": [SALFCBM.zero_shot_segmentation],
    "NRA": [metrics.nra],
    "INSERTION": [metrics.insertion],
    "DELETION": [metrics.deletion],
    "AVERAGE_DROP": [metrics.average_drop],
    "SEGMENTATION": [metrics.iou, metrics.pixel_accuracy, metrics.mean_iou],
}
NAMES = [name for name in vars(published) if name.isupper() and name != "SALF_CBM_DATA"]


@pytest.mark.parametrize("name", NAMES)
def test_settings_exist(name: str):
    for function in FOR[name]:
        assert set(getattr(published, name)) <= set(inspect.signature(inspect.unwrap(function)).parameters), function


def test_settings_by_data_set_exist():
    for row in published.SALF_CBM_DATA.values():
        assert set(row) <= set(inspect.signature(fit_salf_cbm).parameters)


def test_every_name_is_on_its_page():
    page = (Path(__file__).parents[1] / "docs" / "published.md").read_text(encoding="utf-8")
    assert [name for name in [*NAMES, "SALF_CBM_DATA"] if f"published.{name}" not in page] == []


def test_the_table_of_defaults_is_the_record():
    import json

    from benchmarks.run.papers import defaults

    record = json.loads((Path(__file__).parents[1] / "benchmarks" / "results" / "defaults.json").read_text())
    assert set(record["parts"]) <= set(defaults.PARTS)
    found = defaults.MARK.search(defaults.PAGE.read_text(encoding="utf-8"))
    assert found
    assert found[0] == defaults.markdown(record)
