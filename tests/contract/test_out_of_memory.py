"""A device without memory for a batch: the batch is halved once, a warning says so, the result is the same."""

from __future__ import annotations

import functools
import re
import warnings
import weakref

import pytest
import salf_tiny
import torch
from test_region_embedding_store import TinyEncoder, pictures
from torch import Tensor, nn

from captum_concepts import FeatureActivationMap, SpatialACV
from captum_concepts._memory import Halving, out_of_memory
from captum_concepts.attr.concept_fusion.gradients import vector_products
from captum_concepts.errors import InputWarning
from captum_concepts.metrics import average_drop, deletion
from captum_concepts.store import RegionEmbeddingStore
from captum_concepts.vlm import RegionPrompt

SAID = r"ran out of memory \(CUDA out of memory\).*two halves.*halve batch_size"


class SmallDevice:
    """Raises what CUDA raises where more than ``most`` images come at once, and counts the batches that fit."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.fitted: list[int] = []
        self.failed: list[int] = []

    def __call__(self, _module: nn.Module | None, inputs: tuple[Tensor, ...]) -> None:
        count = len(inputs[0])
        if count > self.most:
            self.failed.append(count)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB left.")
        self.fitted.append(count)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(8, 3, 9, 8, generator=torch.Generator().manual_seed(1))


def fitted(net: nn.Module, images: Tensor, batch_size: int) -> SpatialACV:
    return SpatialACV(net, "0", batch_size=batch_size).fit({"bright": images[:4] + 1}, images[4:])


CALLS = {
    "attribute": lambda acv, x: acv.attribute(x, target=[0, 1, 2, 3, 0, 1, 2, 3]),
    "concept_maps": lambda acv, x: acv.concept_maps(x, probability=True),
    "explain": lambda acv, x: torch.cat([t.flatten() for t in vars(acv.explain(x)).values() if isinstance(t, Tensor)]),
    "tcav": lambda acv, x: acv.tcav(x, target=1)["magnitude"],
}


@pytest.mark.parametrize("call", CALLS)
def test_spatial_acv(images, call):
    net = network()
    acv = fitted(net, images, 4)
    expected = CALLS[call](acv, images)
    device = SmallDevice(2)
    handle = net.register_forward_pre_hook(device)
    with pytest.warns(InputWarning, match=SAID) as said:
        found = CALLS[call](acv, images)
    assert len(said) == 1
    torch.testing.assert_close(found, expected)
    assert (device.failed, device.fitted) == ([4], [2, 2, 2, 2])  # the second batch is not tried whole again
    handle.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(CALLS[call](acv, images), expected)


def test_spatial_acv_fit(images):
    expected = fitted(network(), images, 4).vectors
    net = network()
    device = SmallDevice(3)
    net.register_forward_pre_hook(device)
    with pytest.warns(InputWarning, match=SAID):
        found = fitted(net, images, 4).vectors
    torch.testing.assert_close(found, expected)
    assert device.failed == [4]


def test_half_that_does_not_fit_either_raises_the_devices_own_error(images):
    net = network()
    acv = fitted(net, images, 8)
    net.register_forward_pre_hook(SmallDevice(3))
    with pytest.warns(InputWarning, match=SAID), pytest.raises(torch.OutOfMemoryError, match=r"2\.00 GiB"):
        acv.attribute(images, target=0)
    assert not any(m._forward_hooks for m in net.modules())


def test_one_image_cannot_be_halved(images):
    net = network()
    acv = fitted(net, images, 8)
    net.register_forward_pre_hook(SmallDevice(0))
    with pytest.raises(torch.OutOfMemoryError):  # and no warning, which would be an error here
        acv.attribute(images[:1], target=0)


@pytest.mark.parametrize("metric", [deletion, functools.partial(average_drop, scores="raw")], ids=["deletion", "drop"])
def test_perturbation_metrics(images, metric):
    net, maps = network(), torch.rand(8, 9, 8, generator=torch.Generator().manual_seed(2))
    expected = metric(net, images, maps, target=1, batch_size=6)
    net.register_forward_pre_hook(device := SmallDevice(3))
    with pytest.warns(InputWarning, match=SAID) as said:
        found = metric(net, images, maps, target=1, batch_size=6)
    assert len(said) == len(device.failed) == 1
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_backward_passes_of_many_concepts(images):
    """CE-FAM's, which run at once, run one after another."""

    class Small(torch.autograd.Function):
        generate_vmap_rule = False

        @staticmethod
        def forward(x):
            return x.clone()

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def vmap(info, in_dims, x):
            return x.clone(), in_dims[0]

        @staticmethod
        def backward(ctx, gradient):
            if torch._C._functorch.is_batchedtensor(gradient):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return gradient.clone()

    x = images.clone().requires_grad_()
    cotangents = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    output = Small.apply(x).square().sum((1, 2, 3))
    with pytest.warns(InputWarning, match="out of memory for 3 backward passes at once, so they run one after another"):
        (found,) = vector_products(output, [x], cotangents)
    torch.testing.assert_close(found, cotangents[:, :, None, None, None] * 2 * images)


def test_prototypes(images):
    labels = [0, 1] * 4
    expected = FeatureActivationMap(network(), "0", batch_size=8).fit(images, labels).references
    net = network()
    net.register_forward_pre_hook(SmallDevice(4))
    with pytest.warns(InputWarning, match=SAID):
        found = FeatureActivationMap(net, "0", batch_size=8).fit(images, labels).references
    torch.testing.assert_close(found, expected)


def test_region_embeddings(tmp_path):
    prompt, data = RegionPrompt("circle", (2, 3), 4, width=2), pictures(9)
    expected = RegionEmbeddingStore.build(tmp_path / "a", data, TinyEncoder(), prompt, batch_size=8)

    class Small(TinyEncoder):
        device = SmallDevice(5)

        def encode_image(self, images):
            self.device(None, (images,))
            return super().encode_image(images)

    encoder = Small()
    with pytest.warns(InputWarning, match=SAID):
        store = RegionEmbeddingStore.build(tmp_path / "b", data, encoder, prompt, batch_size=8)
    torch.testing.assert_close(store.embeddings(slice(None)), expected.embeddings(slice(None)), atol=1e-3, rtol=0)
    assert encoder.device.failed == [8]
    assert set(encoder.device.fitted) <= {1, 2, 3, 4}


def test_salf_cbm_features(tmp_path):
    plain = salf_tiny.state(salf_tiny.fit(tmp_path / "a"))
    net = salf_tiny.backbone()
    net[0].register_forward_pre_hook(device := SmallDevice(16))
    with pytest.warns(InputWarning, match=SAID):
        found = salf_tiny.state(salf_tiny.fit(tmp_path / "b", network=net))
    assert set(device.failed) == {32}
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("said", ["MPS backend out of memory (MPS allocated: 1 GB)", "CUDA error: out of memory"])
def test_other_libraries_say_it_in_a_plain_runtime_error(said):
    sizes = []

    def run(part: Tensor) -> int:
        sizes.append(len(part))
        if len(part) > 2:
            raise RuntimeError(said)
        return len(part)

    with pytest.warns(InputWarning, match=re.escape(said.split("\n")[0])):
        assert Halving("batch_size")(run, torch.zeros(3), lambda part: part.chunk(2)) == [2, 1]
    assert sizes == [3, 2, 1]


def test_other_errors_are_not_held_up():
    assert not out_of_memory(RuntimeError("shapes cannot be multiplied"))

    def run(part: Tensor) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        Halving("batch_size")(run, torch.zeros(2), lambda part: part.chunk(2))


def test_tensors_of_the_failed_attempt_are_let_go_before_the_next():
    held: list[weakref.ref] = []

    def run(part: Tensor) -> int:
        if len(part) == 4:
            big = torch.zeros(1000)
            held.append(weakref.ref(big))
            raise torch.OutOfMemoryError("CUDA out of memory")
        assert held[0]() is None
        return len(part)

    with pytest.warns(InputWarning, match="out of memory"):
        assert Halving("batch_size")(run, torch.zeros(4), lambda part: part.chunk(2)) == [2, 2]
