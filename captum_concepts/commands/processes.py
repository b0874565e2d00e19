"""The group of processes that torchrun starts, and this process's role in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from captum_concepts.store.processes import lost_peers_named


@contextmanager
def processes(device: str) -> Iterator[str]:
    """Join torchrun's process group, if there is one, and yield the device of this process."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or torch.distributed.is_initialized():
        yield device
        return
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield device
        with lost_peers_named():  # if one fails, torchrun stops the others, so all wait until all are done
            torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
