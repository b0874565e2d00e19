"""Options that several commands share, as :mod:`captum_concepts.commands.command_line` names them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from captum_concepts._checks import integer
from captum_concepts.commands.models import LoadedModel, load_model, to_device
from captum_concepts.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Options for the model, its weights and device, and for the training of CE-FAM."""

    model: str
    weights: str | None = None
    size: int | None = None
    resize: str | None = None
    num_classes: int | None = None
    batch_size: int = 8
    device: str = "cpu"
    layer: str | None = None
    words: Any = None
    encoder: str | None = None
    encoder_weights: str | None = None
    train: str | None = None
    layers: str | None = None

    def load(self) -> LoadedModel:
        """The model, on its device.

        Raises:
            InputError: an unknown model, weights that do not match it, an unavailable device, or a batch size below 1.
        """
        integer("--batch-size", self.batch_size, 1)
        loaded = load_model(
            self.model, weights=self.weights, size=self.size, resize=self.resize, num_classes=self.num_classes
        )
        to_device(loaded.model, self.device)
        return loaded

    def refuse(self, names: Sequence[str], why: str) -> None:
        """Check that none of these options is given, because they would be ignored.

        Raises:
            InputError: one of these options is given.
        """
        defaults = {field.name: field.default for field in fields(self)}
        given = [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) != defaults[name]]
        if given:
            raise InputError(f"{', '.join(given)} would have no effect: {why}")


@dataclass(frozen=True, kw_only=True)
class ExplainerSettings(ModelSettings):
    """Options for the explained model and the method."""

    references: str | None = None
    similarity: str = "cosine"
    classes: str | None = None
    explainer: str | None = None
