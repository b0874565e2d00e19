"""Ctrl-C at any moment of a call: no hook stays active, and the model and torch's modes are as they were.

An interrupt is raised at a random line, call or return of what runs, also inside the ``__exit__`` of a context.
``INTERRUPTS=1000 pytest -s tests/contract/test_interrupts.py`` raises more of them.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch
import tqdm.std
from inputs import IMAGES, Net
from torch import nn
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode_stack

from captum_concepts import (
    SALFCBM,
    ConceptFusionMap,
    ConceptTranslator,
    FeatureActivationMap,
    SpatialACV,
    discover_concepts,
    fit_salf_cbm,
)
from captum_concepts._undo import lock
from captum_concepts.metrics import insertion, parameter_randomization
from captum_concepts.store.channel import Channel, Stop
from captum_concepts.vlm import RegionPrompt

#: Of each call below: about a thousand in all.
INTERRUPTS = int(os.environ.get("INTERRUPTS", "60"))
IMAGES = IMAGES[:3, :, :16, :16]


#: Files of other people with locks that all threads share.
LOCKING = {functools.__file__, threading.__file__, tqdm.std.__file__}
#: An interrupt inside of it leaves a fork of this process waiting for 30 s, after which the child exits.
FILELOCK = str(Path(filelock.__file__).parent)


class Interrupt(KeyboardInterrupt):
    """Ctrl-C."""


class Encoder:
    """Colors, and a vector for each word."""

    logit_scale, logit_bias = 10.0, 0.0

    def encode_image(self, batch: torch.Tensor) -> torch.Tensor:
        """``(N, 3)``."""
        return batch[:, :, : batch.shape[2] // 2].mean((2, 3))

    def encode_text(self, texts: list[str]) -> torch.Tensor:
        """``(T, 3)``."""
        return torch.eye(3)[: len(texts)]


def steps(call: Callable[[], Any], at: int = -1) -> int:
    """Run ``call``, raise at one of its steps, or soon after, and count them.

    Not at a return, whose frame would be missing in the traceback, and not where contextlib handles StopIteration,
    which Python 3.11 would go on to handle for ever: a signal arrives at neither. Nor between the end of a ``with`` and
    the release of its lock, as a line can: other threads would wait for ever for the locks of the standard library.
    """
    count = 0

    def trace(frame: Any, event: str, _arg: Any) -> Any:
        nonlocal count, at
        count += 1
        if count == at and (
            event == "return"
            or isinstance(sys.exc_info()[1], StopIteration)
            or frame.f_code.co_filename in LOCKING
            or any(one.f_code.co_filename.startswith(FILELOCK) for one, _ in traceback.walk_stack(frame))
        ):
            at += 1
        elif count == at:
            sys.settrace(None)
            raise Interrupt
        return trace

    others = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(others)
    return count


def state(model: nn.Module) -> dict[str, Any]:
    """What a call may change and must change back."""
    return {
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "lock": lock._is_owned(),  # other threads would wait for it for ever
        "function modes": _get_current_function_mode_stack(),
        "warnings": list(warnings.filters),
        "training": [module.training for module in model.modules()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "gradient": [parameter.grad for parameter in model.parameters()],
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
        + len(torch_module._global_forward_pre_hooks),
        "values": [value.clone() for value in model.state_dict().values()],
    }


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The names of what is not the same."""
    values = list(zip(before["values"], after["values"], strict=True))
    found = [key for key in before if key != "values" and before[key] != after[key]]
    return found + ["values"] * (not all(torch.equal(one, other) for one, other in values))


def output(model: nn.Module) -> torch.Tensor:
    """What the model returns in evaluation mode, set without the package."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return model(IMAGES).detach()
    finally:
        for module, mode in modes:
            module.training = mode


def network() -> nn.Module:
    """With BatchNorm and Dropout, in training mode, partly frozen."""
    model = Net()
    model.last.append(nn.Dropout(0.5))
    model.first.requires_grad_(False)
    return model.train()


def translator() -> ConceptTranslator:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ConceptTranslator([4, 6], 3, hidden=(8, 8))


def bottleneck() -> SALFCBM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SALFCBM(network(), "last", ["a", "b"], 2, (2, 2))
        nn.init.normal_(model.head.weight)
    return model.train()


def fam(net: nn.Module) -> FeatureActivationMap:
    return FeatureActivationMap(net, "last", torch.eye(2))


def sacv(net: nn.Module) -> SpatialACV:
    return SpatialACV(net, "last").fit({"a": IMAGES[:2] + 1, "b": IMAGES[1:]})


def unknown(net: nn.Module) -> FeatureActivationMap:
    """Of a plain function, behind which the model is not known."""
    return FeatureActivationMap(lambda x: net(x), net.last, torch.eye(2), similarity="dot")


def cefam(net: nn.Module) -> ConceptFusionMap:
    return ConceptFusionMap(net, ["first", "last"], translator(), ["a", "b"], torch.eye(3)[:2], logit_scale=5.0)


def train(net: nn.Module) -> Any:
    options = {"training": {"epochs": 1}, "crops": 0}
    return ConceptFusionMap(net, ["first", "last"]).fit(IMAGES, Encoder(), ["a", "b"], **options)


#: What makes a call of a network, by name.
CALLS: dict[str, Callable[[nn.Module], Callable[[], Any]]] = {
    "FeatureActivationMap.attribute": lambda net: (e := fam(net)) and (lambda: e.attribute(IMAGES, target=1)),
    "FeatureActivationMap.attribute, a function": lambda net: (
        (e := unknown(net)) and (lambda: e.attribute(IMAGES, target=1))
    ),
    "FeatureActivationMap.explain": lambda net: (e := fam(net)) and (lambda: e.explain(IMAGES)),
    "FeatureActivationMap.fit": lambda net: lambda: FeatureActivationMap(net, "last").fit(IMAGES, [0, 1, 0]),
    "SpatialACV.attribute": lambda net: (e := sacv(net)) and (lambda: e.attribute(IMAGES, target=1)),
    "SpatialACV.explain": lambda net: (e := sacv(net)) and (lambda: e.explain(IMAGES, target=1)),
    "SpatialACV.fit": lambda net: lambda: sacv(net),
    "ConceptFusionMap.attribute": lambda net: (e := cefam(net)) and (lambda: e.attribute(IMAGES, target=1)),
    "ConceptFusionMap.explain": lambda net: (e := cefam(net)) and (lambda: e.explain(IMAGES, target=1)),
    "ConceptFusionMap.fit": lambda net: lambda: train(net),
    "SALFCBM.explain": lambda model: lambda: model.explain(IMAGES),
    "SALFCBM.explain_region": lambda model: lambda: model.explain_region(IMAGES, boxes=(0, 0, 8, 8)),
    "SALFCBM.scores": lambda model: lambda: model.scores(IMAGES),
    "DiscoveredConcepts.attribute": lambda net: (
        (e := discover_concepts(net, "last", IMAGES, n_concepts=2)) and (lambda: e.attribute(IMAGES, target=1))
    ),
    "DiscoveredConcepts.explain": lambda net: (
        (e := discover_concepts(net, "last", IMAGES, n_concepts=2)) and (lambda: e.explain(IMAGES, target=1))
    ),
    "discover_concepts": lambda net: lambda: discover_concepts(net, "last", IMAGES, n_concepts=2),
    "insertion": lambda net: lambda: insertion(net, IMAGES, torch.rand(3, 4, 4), target=1, n_steps=2),
    "parameter_randomization": lambda net: (
        lambda: parameter_randomization(fam(net), net, IMAGES, target=1, layers=["last.0"])
    ),
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("name", CALLS)
def test_an_interrupt_leaves_nothing(name: str):
    model = bottleneck() if name.startswith("SALFCBM") else network()
    call = CALLS[name](model)
    total = check_interrupts(model, call, random.Random(name), INTERRUPTS)
    print(f"{name}: {INTERRUPTS} of {total} steps")


def check_interrupts(model: nn.Module, call: Callable[[], Any], rng: random.Random, count: int) -> int:
    call()
    total, before, expected = steps(call), state(model), output(model)
    for _ in range(count):
        at, place = rng.randint(1, total), ""
        try:
            steps(call, at)
        except (Interrupt, RuntimeError) as error:  # what it holds on to lives longer than the call, as in a notebook
            # An interrupt may find a lock of Python's own half released, and "release unlocked lock" is what comes out.
            if not isinstance(error, Interrupt) and not isinstance(error.__context__, Interrupt):
                raise
            place = "".join(traceback.format_tb(error.__traceback__)[-3:])
            assert not differences(before, state(model)), f"step {at}: {differences(before, state(model))}\n{place}"
        assert torch.equal(output(model), expected), f"step {at}\n{place}"
        assert not differences(before, state(model)), f"step {at}: {differences(before, state(model))}\n{place}"
    return total


def test_a_channel_that_was_interrupted_gives_and_takes():
    def use(channel: Channel) -> None:
        channel.put(1)
        channel.get()

    for at in range(1, steps(lambda: use(Channel(2, Stop()))) + 1):
        channel = Channel(2, Stop())
        with contextlib.suppress(Interrupt):
            steps(functools.partial(use, channel), at)
        other = threading.Thread(target=use, args=(channel,), daemon=True)
        other.start()
        other.join(30)
        assert not other.is_alive(), f"step {at}"


def test_a_fit_of_a_bottleneck_that_is_interrupted(tmp_path):
    net, encoder, rng = network(), Encoder(), random.Random(0)
    folders = iter(range(10**6))

    def call() -> Any:
        data = torch.utils.data.TensorDataset(IMAGES.repeat(6, 1, 1, 1), torch.tensor([0, 1, 0] * 6))
        cutoffs = {"presence_cutoff": None, "interpretability_cutoff": None, "validation_fraction": 0.4}
        prompt, path = RegionPrompt("crop", 2), tmp_path / str(next(folders))
        options = {"prompt": prompt, "grid": 2, "bottleneck": {"max_epochs": 1}, "lam": 0.1, **cutoffs}
        return fit_salf_cbm(net, "last", data, encoder, ["a", "b"], 2, store_path=path, **options)

    check_interrupts(net, call, rng, INTERRUPTS // 5)
