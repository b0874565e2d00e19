"""Export of a SALFCBM as a ``torch.export`` program that predicts and explains without this package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from captum_concepts._artifacts import write_atomically
from captum_concepts.activations import evaluation_mode, full_precision
from captum_concepts.errors import InputError
from captum_concepts.models.salf_cbm.reading import input_channels

if TYPE_CHECKING:
    from captum_concepts.models.salf_cbm.salf_cbm import SALFCBM

_NAMES = "captum_concepts.json"


class _Explained(nn.Module):
    def __init__(self, model: SALFCBM) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, target: Tensor) -> dict[str, Tensor]:
        model = self.model
        maps = model.bottleneck(model.features(images))
        pooled = full_precision(maps).mean((2, 3))
        activations = (pooled - full_precision(model.concept_mean)) / full_precision(model.concept_std)
        logits = model.head(activations.to(model.concept_mean.dtype))
        chosen = torch.where(target < 0, logits.argmax(1), target)
        contributions = full_precision(model.head.weight)[chosen] * activations
        return {"logits": logits, "concept_maps": maps, "activations": activations, "contributions": contributions}


def export_program(model: SALFCBM, path: Path, size: tuple[int, int] | None) -> Path:
    """Write the program to ``path``; see ``SALFCBM.export``.

    Raises:
        InputError: the image size is unknown, the head is not linear, or the backbone cannot be exported.
    """
    size = size or model.input_size or (None if model._reading is None else model._reading.image_size)
    if size is None:
        raise InputError(
            "pass size=(height, width) of the images, which is unknown because the model was constructed with "
            "feature_dim="
        )
    if not isinstance(model.head, nn.Linear):
        raise InputError(f"contributions require a linear head, but head is a {type(model.head).__name__}")
    like = model.concept_mean
    images = torch.zeros(2, input_channels(model.backbone), *size, dtype=like.dtype, device=like.device)
    target = torch.full((2,), -1, device=like.device)
    batch = torch.export.Dim("batch")
    try:
        with torch.no_grad(), evaluation_mode(model):
            program = torch.export.export(
                _Explained(model), (images, target), dynamic_shapes={"images": {0: batch}, "target": {0: batch}},
                strict=False,
            )  # fmt: skip
    except Exception as error:  # tracing may raise anything
        raise InputError(
            f"torch.export cannot trace the backbone {type(model.backbone).__name__} with a variable batch size: "
            f"{type(error).__name__}: {str(error)[:300]}"
        ) from error
    names = {
        "concepts": model.concepts,
        "class_names": model.class_names,
        "grid": list(model.grid),
        "image_size": list(size),
        "preprocessing": None if model.preprocessing is None else str(model.preprocessing),
    }
    import io

    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={_NAMES: json.dumps(names)})
    return write_atomically(path, buffer.getvalue())
