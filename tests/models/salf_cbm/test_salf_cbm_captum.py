"""Captum's attributions, and this package's, run on a SALFCBM as on any classifier."""

from __future__ import annotations

import pytest
import torch
from captum.attr import (
    IntegratedGradients,
    LayerActivation,
    LayerGradCam,
    LayerIntegratedGradients,
    NeuronGradient,
    NoiseTunnel,
    Saliency,
)
from salf_networks import conv_model, pictures, slow_maps

from captum_concepts import FeatureActivationMap, SpatialACV


@pytest.fixture
def model():
    return conv_model()


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def test_integrated_gradients_of_a_class_are_complete(model):
    x = pictures()
    attributions, delta = IntegratedGradients(model).attribute(x, target=1, n_steps=200, return_convergence_delta=True)
    assert attributions.shape == x.shape
    torch.testing.assert_close(
        attributions.sum((1, 2, 3)), model(x)[:, 1] - model(torch.zeros_like(x))[:, 1], atol=0.05, rtol=0.05
    )
    assert delta.abs().max() < 0.05


def test_grad_cam_at_the_bottleneck_is_the_weighted_sum_of_the_concept_maps(model):
    x = pictures()
    found = LayerGradCam(model, model.bottleneck).attribute(x, target=2)
    weight = model.head.weight[2] / (model.concept_std * 49)  # d logit / d map, the same at each position
    expected = (weight[None, :, None, None] * slow_maps(model, x)).sum(1, keepdim=True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_the_bottleneck_gives_its_maps_to_captum(model):
    x = pictures()
    torch.testing.assert_close(LayerActivation(model, model.bottleneck).attribute(x), slow_maps(model, x))


def test_a_concept_is_explained_through_the_bottleneck(model):
    x = pictures().requires_grad_()
    found = NeuronGradient(model, model.bottleneck).attribute(x, neuron_selector=(3, 2, 4))
    expected = torch.autograd.grad(model.bottleneck(model.features(x))[:, 3, 2, 4].sum(), x)[0]
    torch.testing.assert_close(found, expected)
    wheels = Saliency(lambda images: model.concept_activations(images)).attribute(x, target=3)
    assert wheels.shape == x.shape


def test_layer_attributions_in_the_backbone(model):
    x = pictures()
    by_gradients = LayerIntegratedGradients(model, model.backbone.body).attribute(x, target=0, n_steps=20)
    assert by_gradients.shape == (4, 8, 8, 6)
    assert by_gradients.abs().sum() > 0
    assert LayerGradCam(model, model.backbone.stem).attribute(x, target=0).shape == (4, 1, 16, 12)
    assert hooks(model) == 0


def test_noise_tunnel(model):
    torch.manual_seed(0)
    found = NoiseTunnel(LayerGradCam(model, model.bottleneck)).attribute(
        pictures(2), nt_samples=4, stdevs=0.01, target=1
    )
    assert found.shape == (2, 1, 7, 7)
    assert found.isfinite().all()


def test_spatial_concept_activation_vectors(model):
    sacv = SpatialACV(model, "backbone.stem.1").fit({"bright": pictures(6) + 1}, pictures(6, seed=3))
    assert sacv.attribute(pictures(2), target=1).shape == (2, 1, 16, 12)
    assert hooks(model) == 0


def test_feature_activation_map_of_logits_and_of_concepts(model):
    x = pictures()
    fam = FeatureActivationMap(model, "bottleneck", torch.eye(3), similarity="dot")
    assert fam.attribute(x, target=1).shape == (4, 1, 7, 7)
    by_concepts = FeatureActivationMap(model.concept_activations, "backbone.body", torch.eye(5), similarity="dot")
    assert by_concepts.attribute(x, target=4).shape == (4, 1, 8, 6)
    assert hooks(model) == 0
