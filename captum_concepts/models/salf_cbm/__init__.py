"""The SALF-CBM model ("Show and Tell"); :mod:`captum_concepts.models.salf_cbm.fit` trains it."""

from captum_concepts.models.salf_cbm.presence import Reliability
from captum_concepts.models.salf_cbm.salf_cbm import SALFCBM, Segmentation

__all__ = ["SALFCBM", "Reliability", "Segmentation"]
