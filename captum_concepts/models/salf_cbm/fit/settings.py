"""Settings of the bottleneck's training."""

from __future__ import annotations

import math
from dataclasses import dataclass

from captum_concepts.errors import InputError
from captum_concepts.models.salf_cbm.fit.data import FEWEST


@dataclass(frozen=True)
class BottleneckSettings:
    """The settings of :func:`fit_bottleneck`.

    Args:
        init: ``"least_squares"``, the ridge fit of P by the features (its strength chosen on the validation images),
            or ``"random"``, as published.
        lr: Adam's learning rate, on features of unit variance. None: 0.1 / sqrt(D) for D features, because the initial
            weights decrease with D in that way and a step should change them by a small fraction. Without progress it
            is multiplied by 0.3, at most twice, and training continues from the best weights.
        batch_size: images per step, over which the similarity is computed. An epoch is split into equal batches.
        max_epochs: maximum number of epochs; 0 keeps the initial weights.
        patience: epochs (and at least 50 steps) without a higher validation similarity after which the learning rate is
            lowered or, the third time, training ends.
        backbone_lr: learning rate of the backbone, if it is also trained.
        seed: of the initialization, the order and the choice of images.
    """

    init: str = "least_squares"
    lr: float | None = None
    batch_size: int = 512
    max_epochs: int = 100
    patience: int = 5
    backbone_lr: float = 1e-5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.init not in ("least_squares", "random"):
            raise InputError(f"init must be 'least_squares' or 'random', got {self.init!r}")
        for name, allowed in (("lr", "a positive number or None"), ("backbone_lr", "a positive number")):
            value = getattr(self, name)
            if value is None and name == "lr":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise InputError(f"{name} must be {allowed}, got {value!r}")
        for name, least in (("batch_size", FEWEST), ("max_epochs", 0), ("patience", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{name} must be a whole number of at least {least}, got {value!r}")
