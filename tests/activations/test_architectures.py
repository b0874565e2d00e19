"""The page on architectures says what happens: every network is run again, by every method."""

from __future__ import annotations

import pytest
from architectures import METHODS, NETWORKS, PAGE, line, misplaced, outcome

ROWS = [row for row in PAGE.read_text().splitlines() if row.startswith("| ")][1:]


def test_the_page_has_every_network_and_most_work():
    assert len(ROWS) == len(NETWORKS) >= 25
    assert sum(row.count("| works") for row in ROWS) >= 0.95 * len(ROWS) * len(METHODS)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_bright_corner_is_found_in_its_cell(name):
    """Exchanged axes or a wrong order of tokens would put it elsewhere; kernels of convolutions overlap by a cell."""
    assert misplaced(name) <= 1


@pytest.mark.parametrize("name", NETWORKS)
def test_as_the_page_says(name):
    assert line(outcome(name)) in ROWS
