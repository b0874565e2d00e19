"""Two gloo processes make the model of one: embeddings to the bit, bottleneck and head to 1e-5."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from salf_tiny import fit, images_and_labels, state
from several import ending_at_once

from captum_concepts.errors import CaptumConceptsError
from captum_concepts.store.lock import FolderLock

CASES = {
    "cached": {"bottleneck": {"init": "random"}},
    "validation data, on the fly": {"val": True, "cache_features": False, "bottleneck": {"max_epochs": 4}},
    "path": {"lam": None, "nonzeros_per_class": 2, "bottleneck": {"max_epochs": 4}},
    "backbone": {"train_backbone": True, "bottleneck": {"max_epochs": 3, "backbone_lr": 1e-3}},
}


def run(folder: Path) -> None:
    """All cases; each process writes what it got."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    for name, options in CASES.items():
        options = dict(options)
        val = images_and_labels(41, seed=1) if options.pop("val", False) else None
        model = fit(folder / name, val_data=val, feature_dtype=torch.float32, head_tol=1e-6, **options)
        found = {**state(model), "backbone": model.backbone[0].weight.detach().clone()}
        with torch.no_grad():
            found["logits"] = model(images_and_labels()[0])
        found["history"] = torch.tensor(model.metadata["history"]["val_similarity"])
        save_file(found, folder / f"{name}-{rank}.safetensors")


@ending_at_once
def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        run(Path(folder))
        run(Path(folder))  # from the results
        # What one process refuses stops both: the other would wait for ever.
        x, y = images_and_labels()
        if rank == 1:
            x = x.clone()
            x[40] = float("nan")
        with pytest.raises(CaptumConceptsError, match="NaN"):
            fit(Path(folder) / "nan", (x, y))
        with pytest.raises(CaptumConceptsError, match="has label 3"):
            fit(Path(folder) / "label", (x, y + rank))
        if rank == 0:
            (Path(folder) / "held").mkdir()
        lock = FolderLock(Path(folder) / "held") if rank == 0 else nullcontext()
        with lock, pytest.raises(CaptumConceptsError, match="being written"):
            fit(Path(folder) / "held")
    finally:
        dist.destroy_process_group()


def test_two_processes_make_the_model_of_one(tmp_path):
    (tmp_path / "two").mkdir()
    (tmp_path / "one").mkdir()
    mp.spawn(worker, args=(str(tmp_path / "two"),), nprocs=2)
    run(tmp_path / "one")
    for name in CASES:
        one = load_file(tmp_path / "one" / f"{name}-0.safetensors")
        first, second = (load_file(tmp_path / "two" / f"{name}-{rank}.safetensors") for rank in (0, 1))
        for key, value in one.items():
            assert torch.equal(first[key], second[key]), (name, key)
            # After a few epochs from random weights two concepts are nearly collinear: what they share between them is
            # hardly determined, what they say together is.
            flat = name == "cached" and key == "head.weight"
            difference = (first[key] - value).abs().max() / value.abs().max()
            assert difference < (1e-4 if flat else 1e-5), (name, key, difference)
        for folder in ("regions-train", *(["regions-val"] if "val" in CASES[name] else [])):
            shards = sorted((tmp_path / "one" / name / folder).glob("shard-*"))
            assert shards
            for shard in shards:
                assert shard.read_bytes() == (tmp_path / "two" / name / folder / shard.name).read_bytes()
