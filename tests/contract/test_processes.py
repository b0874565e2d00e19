"""Whatever resumes: what two processes left when one of them was killed, one goes on with, and the other way round.

The survivor of two says so and ends; what is on disk in the end has the bytes of an undisturbed run.
"""

from __future__ import annotations

import functools
import os
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from several import FORKS
from tiny import DENSE, NET, Colors, network, spatial_acv
from torch import Tensor
from torch.utils.data import Dataset

from captum_concepts import ConceptFusionMap, audit_dataset, fit_salf_cbm
from captum_concepts.audit import rows
from captum_concepts.errors import CaptumConceptsError
from captum_concepts.models.concept_translator import data as pairs
from captum_concepts.models.salf_cbm.fit import bottleneck
from captum_concepts.store import RegionEmbeddingStore, shards

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the killed processes are forks")


class Pictures(Dataset):
    """Images and their classes."""

    def __init__(self, count: int) -> None:
        self.images = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(count))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.images[i], i % 3


def stored(folder: Path) -> bytes:
    RegionEmbeddingStore.build(folder, Pictures(40), Colors(), DENSE, batch_size=3, shard_rows=7)
    return b""


def extended(folder: Path) -> bytes:
    RegionEmbeddingStore.build(folder, Pictures(8).images, Colors(), DENSE, batch_size=3, shard_rows=7)
    RegionEmbeddingStore.extend_at(folder, Pictures(40), Colors(), batch_size=3)
    return b""


def salf(folder: Path) -> bytes:
    model = fit_salf_cbm(
        network(), "0", Pictures(100), Colors(), ["red", "blue"], 3, store_path=folder, grid=2, prompt=DENSE, lam=0.01,
        bottleneck={"max_epochs": 4}, presence_cutoff=-1.0, interpretability_cutoff=None, validation_fraction=0.3,
        prompt_batch_size=3,
    )  # fmt: skip
    return save({name: value.contiguous() for name, value in model.state_dict().items()})


def audited(folder: Path) -> bytes:
    audit_dataset(spatial_acv(), Pictures(600).images, n_bootstrap=20, batch_size=60, store_path=folder)
    return b""


def fused(folder: Path) -> bytes:
    fitted = ConceptFusionMap(NET, ["0"], batch_size=7).fit(
        Pictures(40), Colors(), ["a", "b"], training={"epochs": 2}, crops=1, cache_dir=folder
    )
    return save(dict(fitted.translator.state_dict()))


@dataclass(frozen=True)
class Resumed:
    """What resumes in a folder: its call, what writes the next part of it, and before which part a process is killed
    (alone, and as the second of two)."""

    run: Callable[[Path], bytes]
    writer: str
    part: tuple[int, int]


WRITERS = {
    "shard": (shards, "write_shard"),
    "part": (rows, "save_artifact"),
    "epoch": (bottleneck._State, "finish_epoch"),
}
RESUMED = {
    "store": Resumed(stored, "shard", (4, 2)),
    "extension": Resumed(extended, "shard", (5, 3)),
    "fit-salf, presence": Resumed(salf, "shard", (4, 2)),
    "fit-salf, regions": Resumed(salf, "shard", (8, 4)),
    "fit-salf, features": Resumed(salf, "shard", (12, 6)),
    "fit-salf, bottleneck": Resumed(salf, "epoch", (3, 3)),
    "fit-salf, activations": Resumed(salf, "shard", (16, 8)),
    "audit": Resumed(audited, "part", (2, 1)),
    "translator": Resumed(fused, "shard", (4, 2)),
}
#: What is summed over several processes is rounded otherwise, so these have other last digits than of one.
SUMMED = "(bottleneck|activations|head).*"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Callable[[Any], tuple[Path, bytes]]:
    """The folder and the result of a run of one process, by its call."""

    @functools.cache
    def made(run: Callable[[Path], bytes]) -> tuple[Path, bytes]:
        folder = tmp_path_factory.mktemp("undisturbed") / "folder"
        ((code, result),) = processes(run, folder, 1)
        assert code == 0, result
        return folder, result

    return made


def process(run: Callable[[Path], bytes], folder: Path, rank: int, size: int, killed: Any, said: Path) -> None:
    """A process, of a group unless it is alone; killed in the n-th call of something."""
    torch.set_num_threads(1)
    pairs._SHARD_ROWS, bottleneck.CHECKPOINT_SECONDS = 14, 0  # many steps of a small problem
    if killed is not None:
        (owner, name), last = WRITERS[killed[0]], killed[1]
        function, calls = getattr(owner, name), []

        def counted(*arguments: Any) -> Any:
            calls.append(1)
            if len(calls) == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)

        setattr(owner, name, counted)
    if size > 1:
        meet = f"file://{said.with_suffix('')}-meet"
        torch.distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=size)
    try:
        result = run(folder)
    except CaptumConceptsError as error:
        said.with_name(f"{said.name}-{rank}").write_text(str(error))
        os._exit(2)
    said.with_name(f"{said.name}-{rank}").write_bytes(result)
    os._exit(0)  # see several.ending_at_once


def processes(run: Callable[[Path], bytes], folder: Path, size: int, killed: Any = None) -> list[tuple[int, bytes]]:
    """Exit codes, and what was said or made, of ``size`` processes; the last is the one that is killed."""
    said = folder.with_name(f"{folder.name}-{size}-{killed is None}")
    started = [
        FORKS.Process(target=process, args=(run, folder, r, size, killed if r == size - 1 else None, said))
        for r in range(size)
    ]
    for one in started:
        one.start()
    for one in started:
        one.join(60)
        assert one.exitcode is not None, "still waiting for the one that was killed"
    files = [said.with_name(f"{said.name}-{rank}") for rank in range(size)]
    return [(one.exitcode, file.read_bytes() if file.exists() else b"") for one, file in zip(started, files)]  # noqa: B905


def contents(folder: Path, leave_out: str = "nothing") -> dict[str, bytes]:
    """Of every file; but for what a killed process leaves of its lock, which blocks nobody."""
    files = {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}
    return {
        name: file.read_bytes()
        for name, file in files.items()
        if file.name != ".lock" and not re.fullmatch(leave_out, name)
    }


@pytest.mark.parametrize("name", RESUMED)
def test_one_process_goes_on_with_what_two_left(undisturbed, tmp_path, name):
    case = RESUMED[name]
    whole, expected = undisturbed(case.run)
    (survived, said), (killed, _) = processes(case.run, tmp_path / "folder", 2, (case.writer, case.part[1]))
    assert killed == -signal.SIGKILL
    assert survived == 2
    assert b"another of the 2 processes, which ended without an error message" in said
    assert b"completed work is kept" in said
    assert contents(tmp_path / "folder")
    ((code, made),) = processes(case.run, tmp_path / "folder", 1)
    assert code == 0, made
    if name in ("fit-salf, bottleneck", "fit-salf, activations"):  # begun by two
        assert contents(tmp_path / "folder", SUMMED) == contents(whole, SUMMED)
        assert close(made, expected)
    else:
        assert made == expected
        assert contents(tmp_path / "folder") == contents(whole)


@pytest.mark.parametrize("name", RESUMED)
def test_two_processes_go_on_with_what_one_left(undisturbed, tmp_path, name):
    case = RESUMED[name]
    whole, expected = undisturbed(case.run)
    ((killed, _),) = processes(case.run, tmp_path / "folder", 1, (case.writer, case.part[0]))
    assert killed == -signal.SIGKILL
    assert contents(tmp_path / "folder")
    first, second = processes(case.run, tmp_path / "folder", 2)
    assert first == second
    assert first[0] == 0, first
    assert contents(tmp_path / "folder", SUMMED) == contents(whole, SUMMED)
    assert close(first[1], expected)


def close(made: bytes, expected: bytes) -> bool:
    """Weights that agree as those of two processes and of one do."""
    first, second = (load(one) if one else {} for one in (made, expected))
    return all(torch.allclose(value, second[name], rtol=1e-4, atol=1e-4) for name, value in first.items())
