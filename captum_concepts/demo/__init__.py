"""Bundled demo: tiny trained models and data, without network access or downloads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from captum_concepts.demo.networks import SIZE, SmallResNet, SmallViT
from captum_concepts.demo.tokenizer import WordTokenizer
from captum_concepts.errors import InputError, did_you_mean
from captum_concepts.vlm import OpenCLIPEncoder

WEIGHTS = Path(__file__).parent / "weights"
_CLASSIFIERS: dict[str, type[nn.Module]] = {
    "classifier": SmallResNet,
    "classifier-spurious": SmallResNet,
    "vit": SmallViT,
}
NAMES = (*_CLASSIFIERS, "clip")
_NUM_CLASSES = 6
#: ``pretrained_cfg`` of the bundled models, which normalize their inputs themselves.
_PREPROCESSING = {
    "input_size": (3, SIZE, SIZE), "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "crop_pct": 1.0,
    "interpolation": "bicubic",
}  # fmt: skip


def build(name: str) -> Any:
    """The model ``name`` with random weights, as at the start of training."""
    _check(name)
    return _clip(load_weights=False) if name == "clip" else _CLASSIFIERS[name](_NUM_CLASSES)


def load(name: str) -> Any:
    """A bundled model, trained on :class:`captum_concepts.datasets.CaptionedScenes` of 64 px.

    - ``"classifier"``: a ResNet-10 (timm) with 8 x 8 positions in ``layer2`` to ``layer4``.
    - ``"classifier-spurious"``: the same network trained on scenes whose ground reveals the class (``spurious=0.9``);
      it relies on the ground, and is wrong where the ground misleads.
    - ``"vit"``: a vision transformer (timm), patches of 8 px, 8 x 8 positions in ``blocks.0`` to ``blocks.3``.
    - ``"clip"``: a vision-language model (open_clip) as an :class:`~captum_concepts.vlm.OpenCLIPEncoder`. Its
      vocabulary is the 21 concepts and the words of phrases such as "a photo of ... on ..."; other words raise. A red
      circle drawn around an object makes it describe that object.

    All take RGB in [0, 1], shape ``(N, 3, 64, 64)``, and normalize it themselves; the classifiers return logits over
    ``CaptionedScenes.classes``. They are frozen, in evaluation mode and on the CPU. :func:`record` contains their
    held-out accuracies.

    Raises:
        InputError: an unknown name.

    Example:
        >>> from captum_concepts import demo
        >>> from captum_concepts.datasets import CaptionedScenes
        >>> scenes = CaptionedScenes(8, seed=0, size=64)
        >>> demo.load("classifier")(scenes.stack().image).shape
        torch.Size([8, 6])
    """
    _check(name)
    if name == "clip":
        return _clip(load_weights=True)
    model = _CLASSIFIERS[name](_NUM_CLASSES)
    model.load_state_dict(load_file(WEIGHTS / f"{name}.safetensors"))
    model.pretrained_cfg = _PREPROCESSING  # type: ignore[assignment]
    return model.requires_grad_(False).eval()


def record(name: str) -> dict[str, Any]:
    """Training record of a bundled model, with seed, scenes, log, and results on held-out scenes."""
    _check(name)
    found: dict[str, Any] = json.loads((WEIGHTS / f"{name}.json").read_text())
    return found


def _check(name: str) -> None:
    if name not in NAMES:
        raise InputError(f"there is no bundled model {name!r}; known: {', '.join(NAMES)}.{did_you_mean(name, NAMES)}")


def _clip(load_weights: bool) -> OpenCLIPEncoder:
    config = json.loads((WEIGHTS / "open_clip_config.json").read_text())
    tokenizer = WordTokenizer(config["vocabulary"], config["model_cfg"]["text_cfg"]["context_length"])
    return OpenCLIPEncoder.from_pretrained(f"local-dir:{WEIGHTS}", tokenizer=tokenizer, load_weights=load_weights)
