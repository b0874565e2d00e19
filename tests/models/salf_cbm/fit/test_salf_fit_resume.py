"""A fit that is killed goes on and ends with the same bits; results of other settings and damaged ones are not used."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import salf_tiny
import torch
from safetensors.torch import load_file, save_file
from salf_tiny import Colours, backbone, fit, images_and_labels, state

from captum_concepts.errors import ArtifactError, InputError
from captum_concepts.models.salf_cbm.fit import bottleneck
from captum_concepts.store.lock import FolderLock


class Stopped(BaseException):
    """Like KeyboardInterrupt: nobody catches it."""


def logged(caplog) -> list[str]:
    found = [record.getMessage() for record in caplog.records if record.name == "captum_concepts"]
    caplog.clear()
    return found


def equal(first, second) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_second_call_computes_nothing(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "captum_concepts")
    first = fit(tmp_path)
    assert not any("taken from" in line for line in logged(caplog))
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    monkeypatch.setattr(bottleneck._State, "step", None)
    second = fit(tmp_path)
    assert equal(state(first), state(second))
    assert first.metadata == second.metadata
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == files
    assert sum("taken from an earlier run" in line for line in logged(caplog)) == 5


@pytest.mark.parametrize("options", [{}, {"cache_features": False}, {"train_backbone": True}], ids=str)
def test_results_of_the_same_weights_with_other_settings_are_refused(tmp_path, options):
    fit(tmp_path, **options)
    other = backbone()
    other[0].padding_mode, other[0].padding, other[0].dilation = "reflect", (1, 1), (2, 2)
    with pytest.raises(ArtifactError, match="other settings"):
        fit(tmp_path, network=other, **options)
    other = backbone()
    other[1] = torch.nn.Hardtanh()
    with pytest.raises(ArtifactError, match="other settings"):
        fit(tmp_path, network=other, **options)
    fit(tmp_path, **options)


def test_a_frozen_backbone_cannot_be_trained(tmp_path):
    with pytest.raises(InputError, match=r"requires_grad_\(True\) first"):
        fit(tmp_path, network=backbone().requires_grad_(False), train_backbone=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("live", [False, True])
def test_interrupted_in_any_epoch(tmp_path, monkeypatch, live):
    options = {"train_backbone": live, "bottleneck": {"init": "random", "max_epochs": 6, "backbone_lr": 1e-3}}
    whole = fit(tmp_path / "whole", **options)
    monkeypatch.setattr(bottleneck, "CHECKPOINT_SECONDS", 0)
    finish = bottleneck._State.finish_epoch
    started: list[int] = []

    def interrupt(self, epoch, *rest):
        started.append(epoch)
        if len(started) % 2 == 0:  # each run goes on by one epoch
            raise Stopped
        finish(self, epoch, *rest)

    monkeypatch.setattr(bottleneck._State, "finish_epoch", interrupt)
    for _ in range(5):
        with pytest.raises(Stopped):
            fit(tmp_path / "broken", **options)
    assert list((tmp_path / "broken").glob("bottleneck.progress-*"))
    monkeypatch.setattr(bottleneck._State, "finish_epoch", finish)
    resumed = fit(tmp_path / "broken", **options)
    assert started == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]
    assert equal(state(whole), state(resumed))
    assert equal(whole.backbone.state_dict(), resumed.backbone.state_dict())
    assert whole.metadata == resumed.metadata
    assert not list((tmp_path / "broken").glob("bottleneck.progress-*"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the killed processes are forks")
def test_kill_9_at_random_moments(tmp_path, monkeypatch):
    kills = int(os.environ.get("CAPTUM_CONCEPTS_KILLS", "4"))
    monkeypatch.setattr(bottleneck, "CHECKPOINT_SECONDS", 0)
    settings = {"bottleneck": {"max_epochs": 20, "patience": 20}}
    start = time.perf_counter()
    whole = state(fit(tmp_path / "whole", **settings))
    usual, rng, killed = time.perf_counter() - start, random.Random(0), 0
    while killed < kills:
        pid = os.fork()
        if pid == 0:  # the copy: nothing of pytest may run in it after the fit
            try:
                fit(tmp_path / "killed", **settings)
            finally:
                os._exit(0)
        time.sleep(rng.random() * usual * 0.7)
        os.kill(pid, signal.SIGKILL)
        if os.WIFSIGNALED(os.waitpid(pid, 0)[1]):
            killed += 1
        else:  # it was done already: another one, killed sooner
            shutil.rmtree(tmp_path / "killed")
            usual /= 2
    assert equal(whole, state(fit(tmp_path / "killed", **settings)))
    assert equal(whole, state(fit(tmp_path / "killed", **settings)))


def test_kill_9_of_another_program(tmp_path):
    """The same from the outside, between steps: whichever files are there when it is killed."""
    script = str(Path(salf_tiny.__file__))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[4])}
    command = [sys.executable, script, str(tmp_path / "killed")]
    program = subprocess.Popen(command, env=environment)
    while program.poll() is None and not list((tmp_path / "killed").glob("presence-*")):
        time.sleep(0.01)
    program.kill()
    program.wait()
    whole = state(fit(tmp_path / "whole"))
    assert equal(whole, state(fit(tmp_path / "killed")))


def test_other_settings_are_computed_beside_and_said(tmp_path, caplog):
    caplog.set_level(logging.INFO, "captum_concepts")
    first = fit(tmp_path)
    logged(caplog)
    other = fit(tmp_path, lam=0.05)
    lines = logged(caplog)
    assert any(line.startswith("head: computing anew, because head is") and "0.05" in line for line in lines)
    assert any(line == "bottleneck: taken from an earlier run" for line in lines)
    assert (other.head.weight != 0).sum() < (first.head.weight != 0).sum()
    again = fit(tmp_path)  # and back
    assert not any("computing" in line for line in logged(caplog))
    assert equal(state(first), state(again))


@pytest.mark.parametrize(
    ("change", "anew"),
    [
        ({"bottleneck": {"lr": 2e-3}}, {"bottleneck", "head"}),
        ({"seed": 1}, {"bottleneck", "head"}),
        ({"words": ["red", "green", "blue"]}, {"presence", "bottleneck", "head"}),
        ({"network": backbone(1)}, {"features-train", "bottleneck", "head"}),
        ({"feature_dtype": torch.float32}, {"features-train", "bottleneck", "head"}),
        ({"model_transform": torch.sqrt}, {"features-train", "bottleneck", "head"}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_a_change_computes_anew(tmp_path, caplog, change, anew):
    fit(tmp_path)
    caplog.set_level(logging.INFO, "captum_concepts")
    logged(caplog)
    fit(tmp_path, **change)
    found = {line.split(":")[0] for line in logged(caplog) if "computing" in line}
    assert found - {"activations-train"} == anew


def test_labels_change_the_head_alone(tmp_path, caplog):
    x, y = images_and_labels()
    fit(tmp_path, (x, y))
    caplog.set_level(logging.INFO, "captum_concepts")
    logged(caplog)
    fit(tmp_path, (x, y.roll(1)))
    assert {line.split(":")[0] for line in logged(caplog) if "computing" in line} == {"head"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": salf_tiny.RegionPrompt("crop", (2, 2), 5)}, "radius is 4"),
        ({"data": images_and_labels(seed=1)}, "computed from other data: image 0 has different pixels"),
        ({"data": images_and_labels(97)}, "has 96 images, but the data has 97"),
    ],
)
def test_regions_of_something_else_are_refused(tmp_path, change, message):
    fit(tmp_path)
    with pytest.raises(ArtifactError, match=message):
        fit(tmp_path, **change)


def test_damaged_results_are_computed_again(tmp_path, caplog):
    first = state(fit(tmp_path))
    caplog.set_level(logging.INFO, "captum_concepts")
    (head,) = tmp_path.glob("head-*")
    head.write_bytes(head.read_bytes()[:-3])
    (bottleneck,) = tmp_path.glob("bottleneck-*")
    content = bytearray(bottleneck.read_bytes())
    content[-20] ^= 1
    bottleneck.write_bytes(content)
    (presence,) = tmp_path.glob("presence-*")
    save_file(load_file(presence), presence)  # without the header that says what it is
    assert equal(first, state(fit(tmp_path)))
    lines = logged(caplog)
    for step in ("head", "bottleneck", "presence"):
        assert any(line.startswith(step) and "is not used" in line for line in lines), step


def test_a_damaged_cache_is_computed_again(tmp_path):
    expected = state(fit(tmp_path, seed=1))
    fit(tmp_path)
    (shard,) = tmp_path.glob("features-train-*/shard-00000.safetensors")
    content = bytearray(shard.read_bytes())
    whole = bytes(content)
    content[-20] ^= 1
    shard.write_bytes(content)
    assert equal(expected, state(fit(tmp_path, seed=1)))
    assert shard.read_bytes() == whole


def test_two_fits_in_one_folder_at_once(tmp_path):
    with FolderLock(tmp_path), pytest.raises(ArtifactError, match="being written"):
        fit(tmp_path)


def test_full_disk_in_the_middle(tmp_path, monkeypatch):
    whole = state(fit(tmp_path / "whole"))
    save = bottleneck.fit_bottleneck

    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("captum_concepts.models.salf_cbm.fit.pipeline.fit_bottleneck", full)
    with pytest.raises(OSError, match="No space"):
        fit(tmp_path / "full")
    monkeypatch.setattr("captum_concepts.models.salf_cbm.fit.pipeline.fit_bottleneck", save)
    assert equal(whole, state(fit(tmp_path / "full")))
    assert not list(tmp_path.rglob("*.partial"))


def test_metadata_survives_the_way_through_json(tmp_path):
    model = fit(tmp_path, encoder=Colours())
    assert json.loads(json.dumps(fit(tmp_path).metadata)) == json.loads(json.dumps(model.metadata))
