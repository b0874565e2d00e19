"""The former location of :mod:`captum_concepts.models.salf_cbm.fit`."""

from captum_concepts.models.salf_cbm.fit import *  # noqa: F403
