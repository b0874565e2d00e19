"""Results of the steps of a fit, stored atomically under a digest of what they were computed from."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from captum_concepts._artifacts import (
    Array,
    Check,
    anything,
    check_expanded,
    mapping_of,
    open_artifact,
    save_artifact,
    table,
    text,
)
from captum_concepts.errors import ArtifactError
from captum_concepts.store import all_or_none, fingerprint_tensor, world

logger = logging.getLogger("captum_concepts")
_KIND = "captum_concepts.salf-step/1"
_INFO = {"step": text(), "made_from": mapping_of(anything), "sums": mapping_of(text())}


class StepResult(NamedTuple):
    """The result of a step: tensors, and notes that JSON can represent."""

    tensors: dict[str, Tensor]
    notes: dict[str, Any]


class StepFolder:
    """A folder of step results, one file each, named by the step and a digest of what it was computed from.

    A result is reused only if everything it depends on is the same. After a change of settings it is recomputed next to
    the old result, which is kept. The reason is logged (logger ``captum_concepts``, level INFO). Under
    ``torch.distributed`` the first process reads and writes, and the others receive its values.

    Args:
        path: the folder, created if missing.
        read_only: write nothing.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path, self.read_only = path, read_only
        check_expanded(path)
        if world()[0] == 0 and not read_only:
            path.mkdir(parents=True, exist_ok=True)

    def file(self, step: str, made_from: Mapping[str, Any]) -> Path:
        """The path of the result of ``step``, whether or not it exists."""
        return self.path / f"{step}-{digest(made_from)}.safetensors"

    def run(
        self,
        step: str,
        made_from: Mapping[str, Any],
        compute: Callable[[], StepResult],
        *,
        arrays: Mapping[str, Array],
        notes: Check,
    ) -> StepResult:
        """The stored result, checked against ``arrays`` and ``notes``, or else that of ``compute``, which is stored."""
        found = self.load(step, made_from, arrays=arrays, notes=notes)
        if found is not None:
            say(f"{step}: taken from an earlier run")
            return found
        say(f"{step}: computing{self._why(step, made_from)}")
        result = compute()
        self.save(step, made_from, result)
        return result

    def load(
        self, step: str, made_from: Mapping[str, Any], *, arrays: Mapping[str, Array], notes: Check
    ) -> StepResult | None:
        """The stored result; None if there is none or its file is damaged (which is logged)."""
        found: StepResult | None = None
        if world()[0] == 0:
            found = self._read(step, made_from, arrays, notes)
        if world()[1] > 1:
            box: list[Any] = [found]
            torch.distributed.broadcast_object_list(box, src=0)
            found = box[0]
        return found

    def save(self, step: str, made_from: Mapping[str, Any], result: StepResult) -> None:
        """Write a result atomically; all processes fail if the first one cannot."""
        all_or_none(lambda: self._write(step, made_from, result))

    def _write(self, step: str, made_from: Mapping[str, Any], result: StepResult) -> None:
        if world()[0] == 0 and not self.read_only:
            sums = {name: fingerprint_tensor(value) for name, value in result.tensors.items()}
            info = {"step": step, "made_from": made_from, "notes": result.notes, "sums": sums}
            save_artifact(self.file(step, made_from), _KIND, info, result.tensors)

    def remove(self, step: str, made_from: Mapping[str, Any]) -> None:
        """Delete a result that is no longer needed."""
        if world()[0] == 0 and not self.read_only:
            self.file(step, made_from).unlink(missing_ok=True)

    def _read(
        self, step: str, made_from: Mapping[str, Any], arrays: Mapping[str, Array], notes: Check
    ) -> StepResult | None:
        path = self.file(step, made_from)
        if not path.is_file():
            return None
        schema = table({**_INFO, "notes": notes})
        try:
            with open_artifact(path, _KIND, f"the result of step {step!r}", info=schema, arrays=arrays) as (
                info,
                tensors,
            ):
                if info["made_from"] != json.loads(json.dumps(made_from)):
                    raise ArtifactError("it does not match these inputs and settings")
                damaged = [name for name, value in tensors.items() if fingerprint_tensor(value) != info["sums"][name]]
                if damaged or set(tensors) != set(info["sums"]):
                    raise ArtifactError(f"its values are damaged ({', '.join(damaged) or 'tensors are missing'})")
                return StepResult(dict(tensors), info["notes"])
        except ArtifactError as error:
            say(f"{step}: {path.name} is not used: {error}")
            return None

    def _why(self, step: str, made_from: Mapping[str, Any]) -> str:
        """The difference from the latest other result of this step, for the log."""
        others = [p for p in self.path.glob(f"{step}-*.safetensors") if p != self.file(step, made_from)]
        if not others or world()[0] != 0:
            return ""
        latest = max(others, key=lambda p: p.stat().st_mtime)
        try:
            with open_artifact(latest, _KIND, "a step", info=table({**_INFO, "notes": anything})) as (info, _):
                before = info["made_from"]
        except (ArtifactError, FileNotFoundError):
            return ""
        now = json.loads(json.dumps(made_from))
        changed = [f"{k} is {_short(now[k])}, not {_short(before.get(k))}" for k in now if before.get(k) != now[k]]
        return f" anew, because {'; '.join(changed)}" if changed else ""


def digest(made_from: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits of a hash of the JSON form."""
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:12]


def say(message: str) -> None:
    """Log ``message`` once, not once per process."""
    if world()[0] == 0:
        logger.info(message)


def all_reduce(values: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if world()[1] > 1:
        torch.distributed.all_reduce(values)
    return values


def first_decides(value: bool) -> bool:
    """The first process's value where processes might differ (clocks, free disk)."""
    if world()[1] > 1:
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        value = box[0]
    return value


def share_of(count: int) -> range:
    """This process's contiguous part of ``count`` items."""
    rank, size = world()
    return range(rank * count // size, (rank + 1) * count // size)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@contextmanager
def progress(total: int, what: str, unit: str, show: bool, start: int = 0) -> Iterator[Callable[[int], Any]]:
    """A progress bar of the first process, as a function that takes steps; nothing unless ``show``."""
    if not show or world()[0] != 0:
        yield lambda _: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=what, unit=unit, initial=start) as bar:
        yield bar.update
