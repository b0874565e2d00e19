"""`import captum_concepts` stays cheap, and every public name can be reached from it."""

from __future__ import annotations

import subprocess
import sys

import pytest

import captum_concepts
import captum_concepts.models
import captum_concepts.store


def loaded_after(code: str) -> set[str]:
    """Packages of others, and modules of this one."""
    own = "m.startswith('captum_concepts.')"
    script = f"{code}\nimport sys\nprint('\\n'.join(m for m in sys.modules if '.' not in m or {own}))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_the_bare_import_loads_no_heavy_package():
    heavy = {"torch", "captum", "open_clip", "matplotlib", "torchvision", "timm", "torchmetrics", "PIL"}
    assert loaded_after("import captum_concepts") & heavy == set()


def test_a_method_does_not_load_what_it_does_not_need():
    loaded = loaded_after("from captum_concepts import FeatureActivationMap")
    assert "captum" in loaded
    assert loaded & {"open_clip", "timm", "torchmetrics"} == set()
    assert loaded & {"captum_concepts.store.build", "captum_concepts.models.salf_cbm"} == set()


def test_the_translator_does_not_load_the_bottleneck():
    loaded = loaded_after("from captum_concepts import ConceptFusionMap\nfrom captum_concepts.models import Training")
    assert "captum_concepts.models.concept_translator" in loaded
    assert "captum_concepts.models.salf_cbm" not in loaded


@pytest.mark.parametrize("package", [captum_concepts.models, captum_concepts.store])
def test_every_name_of_a_lazy_package_resolves(package):
    assert all(getattr(package, name) is not None for name in package.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Shards'"):
        package.Shards


@pytest.mark.parametrize("name", captum_concepts.__all__)
def test_every_public_name_resolves(name):
    assert getattr(captum_concepts, name) is not None
    assert name in dir(captum_concepts)


def test_unknown_names_raise():
    with pytest.raises(AttributeError, match="no attribute 'FeatureActivationMaps'"):
        captum_concepts.FeatureActivationMaps
