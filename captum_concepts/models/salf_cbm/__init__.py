"""SALF-CBM ("Show and Tell"): the model here, its training in :mod:`captum_concepts.models.salf_cbm.fit`."""

from captum_concepts.models.salf_cbm.presence import Reliability
from captum_concepts.models.salf_cbm.salf_cbm import SALFCBM, Segmentation

__all__ = ["SALFCBM", "Reliability", "Segmentation"]
