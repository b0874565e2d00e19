"""Loading processes that die or fail: the error says so, nothing hangs, and what was finished is kept."""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
from collections.abc import Iterator

import pytest
import torch
from test_region_embedding_store import TinyEncoder, build, contents, pictures
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, get_worker_info

from captum_concepts import FeatureActivationMap, SpatialACV
from captum_concepts.metrics import evaluate


class Dying(Dataset):
    """Loads well in the main process; in a loading process it ends, or fails, at item ``at``."""

    def __init__(self, images: Tensor, at: int, how: str) -> None:
        self.images, self.at, self.how = images, at, how

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index >= self.at and get_worker_info() is not None:
            if self.how == "killed":
                os._exit(1)
            raise OSError(5, "Input/output error")
        return self.images[index], index % 2


#: What torch says; where the process dies while an item is on its way, the pipe breaks first.
SAID = {
    "killed": ((RuntimeError, EOFError, ConnectionError), "worker.* exited unexpectedly|^$|[Cc]onnection|ancdata"),
    "error": (OSError, "Input/output error"),
}


@pytest.fixture(params=SAID)
def how(request) -> str:
    return request.param


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    """Loading processes end with the exception, whose traceback is what holds torch's iterator."""
    yield
    gc.collect()
    assert not multiprocessing.active_children()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def test_a_store_keeps_what_is_finished_and_goes_on(tmp_path, how):
    images = pictures(19)
    build(tmp_path / "whole", images)
    error, message = SAID[how]
    with pytest.raises(error, match=message):
        build(tmp_path / "store", Dying(images, 9, how), num_workers=1)
    assert not {"load", "write"} & {thread.name for thread in threading.enumerate()}
    encoder = TinyEncoder()
    build(tmp_path / "store", images, encoder)
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")
    assert encoder.calls < 17  # 19 images of 6 places by 7, of which the first spans are there


CALLS = {
    "SpatialACV.fit": lambda loader, net: SpatialACV(net, "1").fit({"a": loader}, torch.rand(6, 3, 20, 24)),
    "prototypes": lambda loader, net: FeatureActivationMap(net, "0").fit(loader),
    "evaluate": lambda loader, net: evaluate(
        lambda x: x[:, :1], ((x[:, None], x > 0.5) for images, _ in loader for x in images[:, :1]), ["nra"]
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_users_loader(how, call):
    loader = DataLoader(Dying(pictures(12), 0, how), batch_size=4, num_workers=1)
    net, (error, message) = network().train(), SAID[how]
    with pytest.raises(error, match=message):
        CALLS[call](loader, net)
    assert net.training
    assert not any(m._forward_hooks for m in net.modules())
