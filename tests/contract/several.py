"""Processes for tests that need more than one: forked from one without threads, and ended before gloo can abort."""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
from collections.abc import Callable
from typing import Any

#: Forks of a process that has only imported the package: one of pytest's own, with its threads, can wait for ever.
FORKS = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
if hasattr(os, "fork"):
    FORKS.set_forkserver_preload(
        ["torch", "captum_concepts.attr", "captum_concepts.audit", "captum_concepts.models.salf_cbm.fit"]
    )


def ending_at_once(worker: Callable[..., Any]) -> Callable[..., None]:
    """What a process runs, which then leaves without taking Python down.

    Threads of gloo may still hold tensors by then, and abort: https://github.com/pytorch/pytorch/issues/190489.
    """

    @functools.wraps(worker)
    def run(*arguments: Any) -> None:
        worker(*arguments)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

    return run
