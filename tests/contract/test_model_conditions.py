"""Every method on one network in every state that users' models are in: the map stays the same, or it is close."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from methods import METHODS, Method
from torch import Tensor, nn

from captum_concepts import SALFCBM, FeatureActivationMap, SpatialACV
from captum_concepts._undo import warnings_filtered
from captum_concepts.activations import Layers, read_layer
from captum_concepts.activations.receptive_field import effective_receptive_field
from captum_concepts.errors import CaptumConceptsError, InputError, InputWarning
from captum_concepts.metrics import average_drop, deletion, evaluate, parameter_randomization
from captum_concepts.models.concept_translator.data import collect_pairs

#: Calls of each method in the test for leaks;
#: ``CALLS=1000 pytest -s tests/contract/test_model_conditions.py -k piles`` is the long run.
CALLS = int(os.environ.get("CALLS", "40"))


class Net(nn.Module):
    """Batch norm, in-place ReLUs, a residual addition in place, a second argument that scales the output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x = self.stem(x)
        y = self.body(x)
        y += x
        return self.fc(self.drop(self.relu(y).mean((2, 3)))) * scale


@pytest.fixture(params=METHODS)
def method(request) -> Method:
    return METHODS[request.param]


def make_net() -> Net:
    torch.manual_seed(0)
    model = Net()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


@pytest.fixture
def net() -> Net:
    return make_net()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(4, 3, 16, 12, generator=torch.Generator().manual_seed(1))


TARGET = [0, 3, 3, 7]


@pytest.mark.parametrize("layer", ["stem", "body"])
@pytest.mark.parametrize("condition", ["train mode", "frozen", "no_grad", "inference_mode", "channels_last", "strided"])
def test_the_same_map(method, net, images, layer, condition):
    explainer = method.build(net, getattr(net, layer), images)
    expected = explainer.attribute(images, target=TARGET)
    assert expected.abs().sum() > 0
    if condition == "train mode":
        net.train()
    elif condition == "frozen":
        net.requires_grad_(False)
    elif condition == "channels_last":
        net, images = net.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
    elif condition == "strided":
        images = images.repeat_interleave(2, dim=3)[..., ::2]
    with torch.set_grad_enabled(condition != "no_grad"), torch.inference_mode(condition == "inference_mode"):
        found = explainer.attribute(images * 1, target=TARGET)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found.is_contiguous()
    assert not found.requires_grad
    assert net.training == (condition == "train mode")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(method, net, images, dtype):
    expected = method.build(net, net.body, images).attribute(images, target=TARGET)
    net, images = net.to(dtype), images.to(dtype)
    found = method.build(net, net.body, images).attribute(images, target=TARGET)
    assert correlation(found, expected) > (0.999999 if dtype == torch.float64 else 0.97)


def test_autocast(method, net, images):
    explainer = method.build(net, net.body, images)
    expected = explainer.attribute(images, target=TARGET)
    with torch.autocast("cpu", torch.bfloat16):
        found = explainer.attribute(images, target=TARGET)
    assert correlation(found, expected) > 0.97


def test_autocast_is_for_the_model_alone(method, net, images, monkeypatch):
    """The model runs under the caller's autocast; what is computed from its activations is not rounded to it."""
    explainer = method.build(net, net.body, images)
    with torch.autocast("cpu", torch.bfloat16):
        around = explainer.attribute(images, target=TARGET)
        assert torch.is_autocast_enabled("cpu")
        with pytest.raises(CaptumConceptsError):
            explainer.attribute(images, target=99)
        assert torch.is_autocast_enabled("cpu")
    plain = net.forward

    def forward(*args: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return plain(*args)

    monkeypatch.setattr(net, "forward", forward)
    inside = explainer.attribute(images, target=TARGET)
    assert around.dtype == inside.dtype == torch.float32
    if not isinstance(explainer, SALFCBM):  # which is the model itself, head and bottleneck included
        torch.testing.assert_close(around, inside, rtol=0, atol=0)


def test_autocast_of_code_that_is_called_back(net, images):
    """The user's functions run under the user's autocast, and explainers that they call make it their own again."""
    heard: list[tuple[torch.dtype, bool]] = []
    fam = FeatureActivationMap(net, net.body, torch.eye(10))

    def explain(inputs: Tensor, target: Any = None) -> Tensor:
        heard.append(((inputs.flatten(1) @ torch.ones(inputs[0].numel(), 1)).dtype, torch.is_autocast_enabled("cpu")))
        with torch.autocast("cpu", enabled=False):
            return fam.attribute(inputs, target=1)

    plain = explain(images)
    heard.clear()
    with torch.autocast("cpu", torch.bfloat16):
        parameter_randomization(explain, net, images)
        score = torch.ones(4, 16, 12, dtype=torch.bool)
        table = evaluate({"own": explain}, [{"inputs": images, "masks": score}], ["epg"])
        found = explain(images)
    assert set(heard) == {(torch.bfloat16, True)}
    torch.testing.assert_close(found, plain, rtol=0, atol=0)
    assert "own" in str(table)


def test_weights_that_change_under_autocast(net, images):
    """Autocast keeps copies of weights in half precision, which must not outlive a change of the weights."""
    fam = FeatureActivationMap(net, net.body, torch.eye(10))
    plain = parameter_randomization(fam, net, images)
    with torch.autocast("cpu", torch.bfloat16):
        net(images)
        under = parameter_randomization(fam, net, images)
        again = net(images)
    assert under.passed == plain.passed
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(again, net(images))


def test_filters_of_warnings_that_overlap():
    """Of two calls in two threads each takes its own filter away, in whatever order they end."""
    before = list(warnings.filters)
    first, second = warnings_filtered("ignore", InputWarning), warnings_filtered("error", InputWarning)
    first.__enter__()
    second.__enter__()
    with pytest.raises(InputWarning):
        warnings.warn("the later one decides", InputWarning, stacklevel=1)
    first.__exit__(None, None, None)
    with pytest.raises(InputWarning):
        warnings.warn("and is still there", InputWarning, stacklevel=1)
    with warnings.catch_warnings():  # has a list of its own
        second.__exit__(None, None, None)
        assert [entry for entry in warnings.filters if "captum_concepts" in str(entry[1])] == []
    assert warnings.filters == before


@pytest.mark.parametrize("wrapper", [nn.DataParallel, lambda net: torch.compile(net, backend="eager")])
def test_wrapped_models(method, net, images, wrapper):
    expected = method.build(net, net.body, images).attribute(images, target=TARGET)
    wrapped = wrapper(net)
    wrapped(images)
    found = method.build(wrapped, net.body, images).attribute(images, target=TARGET)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert hooks(net) == 0
    torch.compiler.reset()


def test_pickling_is_safe(method, net, images):
    """A worker process gets the same explainer; nothing of the caller's process is shared or lost."""
    explainer = method.build(net, net.body, images)
    expected = explainer.attribute(images, target=TARGET)
    other = pickle.loads(pickle.dumps(explainer))
    torch.testing.assert_close(other.attribute(images, target=TARGET), expected)
    assert other.forward_func is not net


@pytest.mark.parametrize("where", ["stem", "body", "fc"])
def test_weights_that_are_nan_do_not_pass_unsaid(method, net, images, where):
    explainer = method.build(net, net.body, images)
    with torch.no_grad():
        next(getattr(net, where).parameters()).flatten()[0] = torch.nan
    said = "the model's output" if where == "fc" else "layer 'body'"
    with pytest.warns(InputWarning, match=f"{said} contains NaN or infinite values although the inputs do not"):
        explainer.attribute(images, target=0)


def test_deepcopy_explains_its_own_copy(method, net, images):
    explainer = method.build(net, net.body, images)
    expected = explainer.attribute(images, target=TARGET)
    other = copy.deepcopy(explainer)
    assert other.forward_func is not net
    with torch.no_grad():
        net.body[0].weight.zero_()
    torch.testing.assert_close(other.attribute(images, target=TARGET), expected)


def test_additional_forward_args(method, net, images):
    explainer = method.build(net, net.body, images)
    expected = explainer.attribute(images, target=TARGET)
    found = explainer.attribute(images, target=TARGET, additional_forward_args=(2.0,))
    assert found.shape == expected.shape
    assert correlation(found, expected) > 0.99


def test_results_repeat_bit_by_bit_and_do_not_depend_on_the_batch(method, net, images):
    explainer = method.build(net, net.body, images)
    first = explainer.attribute(images, target=TARGET)
    assert torch.equal(first, explainer.attribute(images, target=TARGET))
    alone = torch.cat([explainer.attribute(images[i : i + 1], target=TARGET[i]) for i in range(4)])
    torch.testing.assert_close(alone, first, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (7, 5), (64, 64), (33, 128)])
def test_grids_of_any_size(method, net, images, size):
    explainer = method.build(net, net.body, images)
    big = torch.rand(1, 3, 2 * size[0], 2 * size[1], generator=torch.Generator().manual_seed(2))
    found = explainer.attribute(big, target=1)
    assert found.shape[-2:] == size
    assert found.isfinite().all()


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(sorted(METHODS)), st.integers(1, 64), st.integers(1, 64), st.booleans(), st.integers(1, 3))
def test_grids_of_every_size_whole_and_in_parts(name, height, width, odd, count):
    """The grid of the layer is the grid of the map, and a batch gives what its images give alone."""
    net = make_net()
    explainer = METHODS[name].build(net, net.body, torch.rand(4, 3, 16, 12))
    generator = torch.Generator().manual_seed(height * 64 + width)
    images = torch.rand(count, 3, 2 * height - odd, 2 * width - odd, generator=generator)
    found = explainer.attribute(images, target=1)
    assert found.shape[-2:] == (height, width)
    alone = torch.cat([explainer.attribute(one[None], target=1) for one in images])
    torch.testing.assert_close(found, alone, rtol=1e-3, atol=1e-5)


def test_two_explainers_in_two_threads(method, net, images):
    """Right, or refused in the package's own words: never another thread's map."""
    explainers = [method.build(net, layer, images) for layer in (net.body, net.stem)]
    expected = [explainer.attribute(images, target=TARGET) for explainer in explainers]
    filters = list(warnings.filters)
    wrong: list[str] = []

    def work(number: int) -> None:
        for _ in range(20):
            try:
                found = explainers[number].attribute(images, target=TARGET)
            except CaptumConceptsError:
                continue
            if not torch.allclose(found, expected[number], rtol=1e-4, atol=1e-6):
                wrong.append(f"thread {number}")

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert hooks(net) == 0
    assert warnings.filters == filters


FAILURES = ["never", "bad target", "in the layer"]


@pytest.mark.parametrize("fails", FAILURES)
def test_nothing_piles_up(method, net, images, fails):
    """After many calls, 3 of 10 of which end in an exception: tensors, hooks, files, threads and memory are flat."""
    explainer = method.build(net, net.body, images)
    check_flat(explainer.get_name(), net.body[1], fails, lambda target: explainer.attribute(images, target=target))
    assert hooks(net) == 0


@pytest.mark.parametrize("fails", FAILURES)
def test_nothing_piles_up_in_a_bottleneck_model(net, images, fails):
    model = SALFCBM(net, "body", ["a", "b", "c"], 4, grid=(2, 2)).eval()
    check_flat("SALFCBM", net.body[1], fails, lambda target: model.explain(images, target=target))
    assert hooks(model) == 0


def check_flat(name: str, layer: nn.Module, fails: str, call: Callable[[int], object]) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("planted")

    def calls(count: int) -> None:
        for i in range(count):
            if fails == "never" or i % 10 >= 3:
                call(1)
            elif fails == "bad target":
                with pytest.raises(InputError):
                    call(99)
            else:
                handle = layer.register_forward_hook(fail)
                with pytest.raises(RuntimeError, match="planted"):
                    call(1)
                handle.remove()

    def held() -> dict[str, int]:
        gc.collect()
        files = len(list(Path("/proc/self/fd").iterdir())) if sys.platform == "linux" else 0
        tensors = sum(issubclass(type(one), Tensor) for one in gc.get_objects())
        return {"tensors": tensors, "hooks": hooks(layer), "files": files, "threads": threading.active_count()}

    calls(max(10, CALLS // 10))
    before, memory = held(), resident()
    calls(CALLS)
    after, grown = held(), resident() - memory
    print(f"{name}, {CALLS} calls, fails {fails}: memory {grown / 2**20:+.1f} MiB, {after}")
    assert all(after[kind] <= before[kind] for kind in after), (before, after)
    assert grown < 32 << 20


def test_an_explainer_lets_its_model_go(method, images):
    net = make_net()
    explainer = method.build(net, net.body, images)
    explainer.attribute(images, target=TARGET)
    alive = weakref.ref(net)
    del explainer, net
    gc.collect()
    assert alive() is None


def resident() -> int:
    """Bytes of this process in memory; 0 where the system does not say."""
    if sys.platform != "linux":
        return 0
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.double().flatten(), b.double().flatten()]))[0, 1])


class Normalizing(nn.Module):
    """Normalizes images itself, in place or not. With the same seed, the weights are the same."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.conv, self.last, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.Linear(6, 10)

    def forward(self, images: Tensor) -> Tensor:
        images = images.sub_(0.5).div_(0.25) if self.in_place else (images - 0.5) / 0.25
        return self.head(self.last(self.conv(images).relu()).tanh().square().mean((2, 3)))

    def encode_image(self, images: Tensor) -> Tensor:
        return self(images)


def in_place_and_not(results: Callable[[Normalizing, Tensor], list[Tensor]]) -> None:
    """``results`` of both models are the same, and the images stay as they were."""
    images = torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    kept, found = images.clone(), [results(Normalizing(in_place), images) for in_place in (True, False)]
    assert torch.equal(images, kept)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


def test_a_model_that_changes_its_images_in_place(method):
    in_place_and_not(lambda net, x: [method.build(net, net.last, x).attribute(x, target=TARGET)])


@pytest.mark.parametrize("refine", [False, ["conv"]])
def test_a_model_that_changes_its_images_in_place_in_several_passes(refine):
    """A second pass (``evidence``, refined maps, another layer of a sweep) saw them normalized twice."""

    def results(net: Normalizing, x: Tensor) -> list[Tensor]:
        acv = SpatialACV(net, "last", refine=refine).fit({"p": x[:2]}, x[2:])
        fam = FeatureActivationMap(net, "last", torch.eye(10), refine=refine)
        found = [acv.vectors, acv.concept_maps(x), acv.scores(x), acv.evidence(x).effects, acv.contributions(x)]
        return [*found, fam.scores(x), fam.concept_maps(x)]

    in_place_and_not(results)


@pytest.mark.parametrize("layer", ["last", ""])
def test_a_layer_of_a_model_that_changes_its_images_in_place(layer):
    in_place_and_not(lambda net, x: [read_layer(net, layer, x)])


def test_a_model_that_changes_its_images_in_place_elsewhere():
    """In metrics, receptive fields, a bottleneck of its features, and as the encoder."""

    def results(net: Normalizing, x: Tensor) -> list[Tensor]:
        maps = x.mean(1)
        salf = SALFCBM(net, "last", ["a", "b"], num_classes=3, feature_dim=6)
        with torch.no_grad():
            for parameter in (*salf.bottleneck.parameters(), *salf.head.parameters()):
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).reshape(parameter.shape))
        seen = salf.explain(x)
        field = effective_receptive_field(net, "last", x[:1], (3, 3))
        pairs = collect_pairs(Layers.resolve(net, ["last"]), net, x).rows(range(4))
        drops = (
            average_drop(net, x, maps, target=TARGET, scores="raw"),
            deletion(net, x, maps, target=TARGET, n_steps=3),
        )
        return [seen.maps, seen.scores, torch.tensor(field), *drops, *pairs]

    in_place_and_not(results)
