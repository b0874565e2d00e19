"""Fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images and real pretrained weights beside the checkout; skips where it is absent."""
    if not (SHARED_DATA / "README.md").is_file():
        pytest.skip(f"real data and models are not at {SHARED_DATA}")
    return SHARED_DATA
