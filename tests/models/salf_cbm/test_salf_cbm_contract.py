"""SALFCBM keeps the contract of concept explainers, on convolutions, tokens and a bottleneck of two layers."""

from __future__ import annotations

import pytest
import torch
from salf_networks import CONCEPTS, ConvNet, Tokens, awake, pictures, standardised

from captum_concepts.errors import InputWarning
from captum_concepts.models.salf_cbm import SALFCBM
from captum_concepts.testing import ExplainerTestCase


class TestConvolutions(ExplainerTestCase):
    rank_by = "contributions"

    def make_model(self):
        torch.manual_seed(0)
        return awake(ConvNet())

    def make_explainer(self, model):
        torch.manual_seed(1)
        return standardised(SALFCBM(model, "body", CONCEPTS, 3, class_names=["cat", "car", "bird"]))

    def make_images(self):
        return pictures(5)


def test_scores_that_are_not_finite_are_said():
    torch.manual_seed(0)
    salf = standardised(SALFCBM(awake(ConvNet()), "body", CONCEPTS, 3))
    salf.bottleneck.weight.data *= 1e10  # so that they overflow, whatever the weights
    with pytest.warns(InputWarning, match="concept activations contain NaN or infinite values"):
        salf.scores(pictures(2) * 1e38)


class TestUnfrozen(TestConvolutions):
    def make_explainer(self, model):
        torch.manual_seed(1)
        return standardised(SALFCBM(model, "body", CONCEPTS, 3, freeze_backbone=False))


class TestTwoLayers(TestConvolutions):
    def make_explainer(self, model):
        torch.manual_seed(1)
        return standardised(SALFCBM(model, "body", CONCEPTS, 3, hidden=6, batch_size=2))


class TestTokens(ExplainerTestCase):
    rank_by = "contributions"

    def make_model(self):
        torch.manual_seed(0)
        return Tokens().eval()

    def make_explainer(self, model):
        torch.manual_seed(1)
        return standardised(SALFCBM(model, "block", CONCEPTS, 3, (4, 4), cls_token=True, input_size=(16, 16)))

    def make_images(self):
        return pictures(4, 16, 16)
