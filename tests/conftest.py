"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A gate repeats itself: the same examples each time, however busy the machine. Elsewhere new ones are tried.
settings.register_profile("ci", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
if os.environ.get("CI"):
    settings.load_profile("ci")

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images and real pretrained weights beside the checkout; skips where it is absent."""
    if not (SHARED_DATA / "README.md").is_file():
        pytest.skip(f"real data and models are not at {SHARED_DATA}")
    return SHARED_DATA
