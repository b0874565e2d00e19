"""ConceptTranslator: architecture, folding, widths."""

from __future__ import annotations

import pytest
import torch

from captum_concepts.errors import InputError
from captum_concepts.models import ConceptTranslator


def test_it_is_the_published_network():
    torch.manual_seed(0)
    t = ConceptTranslator([3, 5], 4, hidden=(7, 6))
    z = [torch.randn(2, 3), torch.randn(2, 5)]
    (w1, b1), (w2, b2), (w3, b3) = ((m.weight, m.bias) for m in t.network if isinstance(m, torch.nn.Linear))
    expected = torch.tanh(torch.tanh(torch.cat(z, 1) @ w1.T + b1) @ w2.T + b2) @ w3.T + b3
    torch.testing.assert_close(t(z), expected)
    torch.testing.assert_close(t(torch.cat(z, 1)), expected)
    torch.testing.assert_close(t.after_first(t.first(t.concatenate(z))), expected)


@pytest.mark.parametrize(("widest", "hidden"), [(1024, (1024, 1024)), (1025, (2048, 1024))])
def test_default_hidden_widths(widest, hidden):
    assert ConceptTranslator([64, widest], 8).hidden == hidden


def test_folding_keeps_the_function():
    torch.manual_seed(0)
    t = ConceptTranslator([6], 4, hidden=(5, 5))
    z, mean, std = torch.randn(9, 6) * 3 + 2, torch.randn(6), torch.rand(6) + 0.1
    before = t((z - mean) / std)
    t.fold_standardization(mean, std)
    torch.testing.assert_close(t(z), before)


@pytest.mark.parametrize(
    ("args", "words"),
    [(([], 4), "at least one"), (([3, 0], 4), "positive"), (([3], 0), "positive"), ((3, 4), "sequence")],
)
def test_bad_widths(args, words):
    with pytest.raises(InputError, match=words):
        ConceptTranslator(*args)


def test_bad_hidden_and_bad_inputs():
    with pytest.raises(InputError, match="two positive"):
        ConceptTranslator([3], 4, hidden=(5,))
    t = ConceptTranslator([3, 5], 4, hidden=(7, 6))
    for bad in ([torch.rand(2, 5), torch.rand(2, 3)], [torch.rand(2, 3)], torch.rand(2, 9)):
        with pytest.raises(InputError, match=r"\[3, 5\]"):
            t(bad)
