"""Train the bundled models again: ``python -m captum_concepts.demo.train [NAME ...] --output DIR``.

Each model is trained on scenes of one seed and judged on scenes of another. Every `--save-every` steps a checkpoint is
written atomically; the same command goes on from it. Batch b of a run depends on (seed, b) alone, so a run that was
interrupted ends with the weights of one that was not.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from captum_concepts._artifacts import write_atomically
from captum_concepts.datasets import CaptionedScenes
from captum_concepts.demo import WEIGHTS, build
from captum_concepts.demo.evaluation import accuracy, circle_reaction, ground_reliance
from captum_concepts.demo.networks import SIZE
from captum_concepts.demo.prompting import Scenes, describe, mark, truth
from captum_concepts.vlm import OpenCLIPEncoder

TRAIN_SEED, TEST_SEED = 20_001, 30_001
RUNS: dict[str, dict[str, Any]] = {
    "clip": {"scenes": 24_000, "steps": 2000, "batch": 128, "lr": 1.5e-3},
    "classifier": {"scenes": 20_000, "steps": 1500, "batch": 64, "lr": 2e-3},
    "classifier-spurious": {"scenes": 20_000, "steps": 1500, "batch": 64, "lr": 2e-3, "spurious": 0.9},
    "vit": {"scenes": 20_000, "steps": 1800, "batch": 64, "lr": 1e-3},
}


def clip_loss(encoder: OpenCLIPEncoder, data: CaptionedScenes, scenes: Scenes) -> Callable[[int, int], Tensor]:
    """Symmetric contrastive loss over all true pairs of the batch, plus the cross-entropy of single concepts, over all
    concepts and within each kind."""
    model, tokenizer = encoder.model, encoder.tokenizer
    kinds = [[data.concepts.index(word) for word in words] for words in data.concept_groups.values()]
    kinds.append(list(range(len(data.concepts))))

    def loss(seed: int, batch: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randint(len(scenes.images), (batch,), generator=generator)
        images, named = mark(scenes, rows, generator)
        things = scenes.things[rows]
        texts, asks = describe(things, named, data.concepts, data.concept_groups, random.Random(seed))
        true = truth(things, named, asks).float()
        with torch.autocast("cpu", torch.bfloat16):
            image = model.encode_image(encoder.transform(images).contiguous(memory_format=torch.channels_last))
            text = model.encode_text(tokenizer(texts + data.concepts))
        image, text = F.normalize(image.float(), dim=1), F.normalize(text.float(), dim=1)
        logits = model.logit_scale.clamp(max=math.log(100)).exp() * image @ text.T
        pairs, words = logits[:, :batch], logits[:, batch:]
        by_image = F.cross_entropy(pairs, true / true.sum(1, keepdim=True))
        by_text = F.cross_entropy(pairs.T, true.T / true.T.sum(1, keepdim=True))
        present = (things & named[..., None]).sum(1).float()  # (n, T): how often each concept may be named
        by_word = []
        for kind in kinds:
            said = present[:, kind].sum(1) > 0
            if not said.any():
                continue
            target = present[said][:, kind]
            by_word.append(F.cross_entropy(words[said][:, kind], target / target.sum(1, keepdim=True)))
        return (by_image + by_text) / 2 + torch.stack(by_word).mean()

    return loss


def classifier_loss(model: nn.Module, scenes: Scenes) -> Callable[[int, int], Tensor]:
    """Cross-entropy loss with small shifts, flips and changes of brightness."""

    def loss(seed: int, batch: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randint(len(scenes.images), (batch,), generator=generator)
        images = scenes.images[rows].float() / 255
        flip = torch.rand(batch, 1, 1, 1, generator=generator) < 0.5
        images = torch.where(flip, images.flip(3), images)
        images = (images * (0.9 + 0.2 * torch.rand(batch, 1, 1, 1, generator=generator))).clamp(0, 1)
        dy, dx = torch.randint(-4, 5, (2,), generator=generator).tolist()
        images = F.pad(images, [4] * 4, mode="replicate")[..., 4 + dy : 4 + dy + SIZE, 4 + dx : 4 + dx + SIZE]
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images.contiguous(memory_format=torch.channels_last))
        return F.cross_entropy(logits.float(), scenes.labels[rows], label_smoothing=0.05)

    return loss


def fit(
    model: nn.Module,
    loss: Callable[[int, int], Tensor],
    run: dict[str, Any],
    checkpoint: Path,
    seed: int,
    save_every: int,
) -> list[dict[str, float]]:
    """Train with AdamW, warm-up and a cosine schedule to zero; return the training log."""
    model.requires_grad_(True).train()
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}],
        lr=run["lr"],
        betas=(0.9, 0.98),
    )
    steps, warm = run["steps"], 60
    start, log = _resume(model, optimizer, checkpoint, run, seed)
    total, count, began = 0.0, 0, time.perf_counter()
    for step in range(start, steps):
        lr = run["lr"] * min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        value = loss(seed * 1_000_003 + step, run["batch"])
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total, count = total + float(value.detach()), count + 1
        if (step + 1) % 50 == 0 or step + 1 == steps:
            log.append({"step": step + 1, "loss": round(total / count, 4)})
            pace = (time.perf_counter() - began) / (step + 1 - start)
            print(f"  step {step + 1}/{steps}  loss {total / count:.4f}  {pace * 1000:.0f} ms a step", flush=True)
            total, count = 0.0, 0
        if (step + 1) % save_every == 0:
            _save(model, optimizer, checkpoint, step + 1, log, run, seed)
    model.requires_grad_(False).eval()
    return log


def _optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names: dict[Any, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"optimizer.{key}.{names[parameter]}": torch.as_tensor(value).contiguous()
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def _save(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    path: Path,
    step: int,
    log: list[Any],
    run: dict[str, Any],
    seed: int,
) -> None:
    tensors = {f"model.{k}": v.contiguous() for k, v in model.state_dict().items()} | _optimizer_state(model, optimizer)
    write_tensors(tensors, path, {"step": str(step), "log": json.dumps(log), "run": json.dumps(run), "seed": str(seed)})


def _resume(
    model: nn.Module, optimizer: torch.optim.Optimizer, path: Path, run: dict[str, Any], seed: int
) -> tuple[int, list[dict[str, float]]]:
    if not path.is_file():
        return 0, []
    with safe_open(path, "pt") as file:
        about = file.metadata()
        if json.loads(about["run"]) != run or int(about["seed"]) != seed:
            print(f"  {path} belongs to another run or seed; starting anew")
            return 0, []
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
    for name, parameter in model.named_parameters():
        keys = {key: f"optimizer.{key}.{name}" for key in ("step", "exp_avg", "exp_avg_sq")}
        if keys["step"] in tensors:
            optimizer.state[parameter] = {key: tensors[full] for key, full in keys.items()}
    print(f"  going on from step {about['step']} of {path}")
    return int(about["step"]), json.loads(about["log"])


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically."""
    write_atomically(path, save(tensors, metadata={"format": "pt", **(metadata or {})}))


def train(name: str, output: Path, *, seed: int = 0, save_every: int = 250, **changes: Any) -> dict[str, Any]:
    """Train, evaluate and save one model; return the content of its JSON."""
    run = {**RUNS[name], **changes}
    output.mkdir(parents=True, exist_ok=True)
    data = CaptionedScenes(run["scenes"], seed=TRAIN_SEED + seed, size=SIZE, spurious=run.get("spurious", 0.0))
    scenes = Scenes.render(data)
    torch.manual_seed(seed)
    model = build(name).to(memory_format=torch.channels_last)  # makes convolutions about a third faster
    checkpoint = output / f"{name}.checkpoint.safetensors"
    began = time.perf_counter()
    if name == "clip":
        log = fit(model.model, clip_loss(model, data, scenes), run, checkpoint, seed, save_every)
        state = {k: v.half() if v.is_floating_point() else v for k, v in model.model.state_dict().items()}
        model.model.load_state_dict(state)  # evaluated as shipped
        held_out: dict[str, Any] = circle_reaction(model, CaptionedScenes(1000, seed=TEST_SEED, size=SIZE))
        file = "open_clip_model.safetensors"
    else:
        log = fit(model, classifier_loss(model, scenes), run, checkpoint, seed, save_every)
        state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
        model.load_state_dict(state)
        test = CaptionedScenes(2000, seed=TEST_SEED, size=SIZE)
        held_out = {"accuracy": accuracy(model, test), "ground_reliance": ground_reliance(model, test)}
        if "spurious" in run:
            planted = CaptionedScenes(2000, seed=TEST_SEED, size=SIZE, spurious=run["spurious"])
            held_out["accuracy_with_spurious_grounds"] = accuracy(model, planted)
        file = f"{name}.safetensors"
    write_tensors({k: v.contiguous() for k, v in state.items()}, output / file)
    record = {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seed": seed,
        "train_scenes": {
            "n": run["scenes"],
            "seed": TRAIN_SEED + seed,
            "size": SIZE,
            "spurious": run.get("spurious", 0.0),
        },
        "test_seed": TEST_SEED,
        "run": run,
        "held_out": held_out,
        "seconds": round(time.perf_counter() - began),
        "torch": torch.__version__,
        "log": log,
    }
    write_atomically(output / f"{name}.json", json.dumps(record, indent=1) + "\n")
    checkpoint.unlink(missing_ok=True)
    print(f"{name}: {json.dumps(held_out)}", flush=True)
    return record


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m captum_concepts.demo.train", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"models to train, of {list(RUNS)}; default: all")
    parser.add_argument("--output", type=Path, default=WEIGHTS, help="folder for weights and records")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="instead of the number in RUNS")
    parser.add_argument("--save-every", type=int, default=250, help="steps between two checkpoints")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in RUNS]
    if unknown:
        parser.error(f"unknown model {unknown[0]!r}; known: {', '.join(RUNS)}")
    for name in options.names or RUNS:
        print(name, flush=True)
        changes = {} if options.steps is None else {"steps": options.steps}
        train(name, options.output, seed=options.seed, save_every=options.save_every, **changes)


if __name__ == "__main__":
    main()
