"""Processes that hold disjoint rows reach the answer of one process that holds all of them."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from several import ending_at_once
from solver_reference import problem

from captum_concepts.errors import InputError
from captum_concepts.solvers import elastic_net_path, fit_elastic_net, lambda_max


def rows():
    x, y = problem(n=301, d=12, k=4, seed=70)
    return torch.as_tensor(x), torch.as_tensor(y), torch.linspace(0.5, 2, 301, dtype=torch.float64)


def solve(x, y, s, group):
    sparse = fit_elastic_net(
        x, y, 0.01, sample_weight=s, num_classes=4, standardize=True, process_group=group, tol=1e-7
    )
    ridge = fit_elastic_net(x, y, 0.01, sample_weight=s, num_classes=4, alpha=0.0, process_group=group, tol=1e-7)
    path = elastic_net_path(x, y, nonzeros_per_class=5, n_lams=5, num_classes=4, process_group=group, tol=1e-6)
    return {
        "weight": sparse.weight,
        "bias": sparse.bias,
        "ridge": ridge.weight,
        "mean": sparse.feature_mean,
        "std": sparse.feature_std,
        "path": path.selected.weight,
        "numbers": torch.tensor([sparse.objective, ridge.objective, lambda_max(x, y, process_group=group)]),
    }


@ending_at_once
def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        x, y, s = rows()
        part = slice(None, 100) if rank == 0 else slice(100, None)  # unequal shares
        x, y, s = x[part].clone(), y[part], s[part]
        save_file(solve(x, y, s, True), f"{folder}/{rank}.safetensors")
        # Bad rows of one process must stop both: a process that went on alone would wait for ever.
        if rank == 1:
            x[3, 3] = float("nan")
        with pytest.raises(InputError, match="NaN"):
            fit_elastic_net(x, y, 0.1, num_classes=4, process_group=True)
        with pytest.raises(InputError, match="got labels from 0 to 7"):
            fit_elastic_net(x, y + 4 * rank, 0.1, num_classes=4, process_group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def test_two_processes_agree_with_one_and_refuse_together(tmp_path):
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2)
    one = solve(*rows(), None)
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    for name, value in one.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, atol=1e-5, rtol=1e-5, msg=name)
