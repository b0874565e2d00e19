"""A small image-text model with a vision transformer: the kind of CLIP's ViT towers, beside the bundled one's ResNet.

Its image tower starts from the bundled classifier ``vit``, its text tower from the bundled ``clip``, and both are
trained like the latter, on the same scenes: ``python -m benchmarks.data.vit_encoder`` (a quarter of an hour on a core)
writes the weights beside this file again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import timm.models
import torch
from timm.models.vision_transformer import VisionTransformer

from captum_concepts import demo
from captum_concepts._artifacts import write_atomically
from captum_concepts.datasets import CaptionedScenes
from captum_concepts.demo.evaluation import circle_reaction
from captum_concepts.demo.networks import SIZE, ConvStem
from captum_concepts.demo.prompting import Scenes
from captum_concepts.demo.tokenizer import WordTokenizer
from captum_concepts.demo.train import RUNS, TEST_SEED, TRAIN_SEED, clip_loss, fit, write_tensors
from captum_concepts.vlm import OpenCLIPEncoder

FOLDER = Path(__file__).parent / "clip_vit"
RUN = {**RUNS["clip"], "steps": 1200, "lr": 1e-3}


@timm.models.register_model
def captum_concepts_vit(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """:class:`~captum_concepts.demo.networks.SmallViT` whose class token is read, as CLIP's is."""
    del pretrained  # open_clip loads the weights of both towers together
    model = VisionTransformer(
        img_size=SIZE,
        patch_size=8,
        embed_dim=128,
        depth=4,
        num_heads=4,
        num_classes=int(options.get("num_classes", 0)),
        global_pool="token",
        embed_layer=ConvStem,
    )
    model.default_cfg = {"input_size": (3, SIZE, SIZE)}  # type: ignore[assignment]
    return model


def vit_encoder(*, load_weights: bool = True) -> OpenCLIPEncoder:
    """The encoder, frozen; ``load_weights=False``: as its training starts."""
    config = json.loads((FOLDER / "open_clip_config.json").read_text())
    tokenizer = WordTokenizer(config["vocabulary"], config["model_cfg"]["text_cfg"]["context_length"])
    encoder = OpenCLIPEncoder.from_pretrained(f"local-dir:{FOLDER}", tokenizer=tokenizer, load_weights=load_weights)
    if not load_weights:
        blocks = {k: v for k, v in demo.load("vit").state_dict().items() if not k.startswith(("head", "fc_norm"))}
        text = {k: v for k, v in demo.load("clip").model.state_dict().items() if not k.startswith("visual.")}
        encoder.model.visual.trunk.load_state_dict(blocks, strict=False)
        encoder.model.load_state_dict(text, strict=False)
    return encoder


def main() -> None:
    """Train, judge and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=RUN["steps"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    run = {**RUN, "steps": args.steps}
    data = CaptionedScenes(run["scenes"], seed=TRAIN_SEED + args.seed, size=SIZE)
    torch.manual_seed(args.seed)
    encoder = vit_encoder(load_weights=False)
    checkpoint = FOLDER / "checkpoint.safetensors"
    loss = clip_loss(encoder, data, Scenes.render(data))
    log = fit(encoder.model, loss, run, checkpoint, args.seed, save_every=200)
    state = {k: v.half() if v.is_floating_point() else v for k, v in encoder.model.state_dict().items()}
    encoder.model.load_state_dict(state)  # judged as it is kept
    held_out = circle_reaction(encoder, CaptionedScenes(1000, seed=TEST_SEED, size=SIZE))
    write_tensors({k: v.contiguous() for k, v in state.items()}, FOLDER / "open_clip_model.safetensors")
    record = {"seed": args.seed, "run": run, "held_out": held_out, "log": log}
    write_atomically(FOLDER / "record.json", json.dumps(record, indent=1) + "\n")
    checkpoint.unlink(missing_ok=True)
    print(json.dumps(held_out), flush=True)


if __name__ == "__main__":
    main()
