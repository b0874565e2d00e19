"""Training of a SALF-CBM with :func:`fit_salf_cbm`, its plan, and its steps, which can also be called alone."""

from captum_concepts.models.salf_cbm.fit.bottleneck import BottleneckFit, fit_bottleneck
from captum_concepts.models.salf_cbm.fit.data import LabeledImages, labeled_images
from captum_concepts.models.salf_cbm.fit.features import CachedFeatures, LiveFeatures, cache_features
from captum_concepts.models.salf_cbm.fit.filters import (
    WHOLE,
    concept_presence,
    interpretable_concepts,
    present_concepts,
)
from captum_concepts.models.salf_cbm.fit.head import (
    Activations,
    HeadFit,
    compute_activations,
    fit_head,
    refit_head,
    relax_head,
)
from captum_concepts.models.salf_cbm.fit.objective import Samples
from captum_concepts.models.salf_cbm.fit.pipeline import fit_salf_cbm
from captum_concepts.models.salf_cbm.fit.plan import FitPlan, plan_salf_cbm
from captum_concepts.models.salf_cbm.fit.settings import BottleneckSettings

__all__ = [
    "WHOLE",
    "Activations",
    "BottleneckFit",
    "BottleneckSettings",
    "CachedFeatures",
    "FitPlan",
    "HeadFit",
    "LabeledImages",
    "LiveFeatures",
    "Samples",
    "cache_features",
    "compute_activations",
    "concept_presence",
    "fit_bottleneck",
    "fit_head",
    "fit_salf_cbm",
    "interpretable_concepts",
    "labeled_images",
    "plan_salf_cbm",
    "present_concepts",
    "refit_head",
    "relax_head",
]
