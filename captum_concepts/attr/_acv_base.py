"""What SpatialACV's maps stand on: one layer, its activations and gradients, and the vectors fitted there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from captum_concepts._captum import LayerAttribution, select_output
from captum_concepts._memory import Halving
from captum_concepts.activations import SpatialActivations, gradients_enabled, resolve_layer, spatial_activations
from captum_concepts.activations.capture import Inputs, Layer
from captum_concepts.activations.spatial import full_precision
from captum_concepts.attr._acv_maps import Chunk, chunks, halves, project, recorded_target
from captum_concepts.attr._acv_state import FittedVectors
from captum_concepts.errors import InputError, LayerError, NotFittedError
from captum_concepts.explanation import ConceptExplanation

Result = TypeVar("Result")


class LayerVectors(LayerAttribution):
    """One layer of one model and, once there are any, the concept vectors in it. Abstract: see ``SpatialACV``."""

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: Layer,
        layout: str,
        prefix_tokens: int | None,
        batch_size: int,
    ) -> None:
        self._layer: Layer | None = None
        self._asked_by_tcav: nn.Module | None = None
        super().__init__(forward_func, layer)
        resolve_layer(forward_func, layer)
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(f"batch_size must be an integer of at least 1, got {batch_size!r}")
        self.layout = layout
        self.prefix_tokens = prefix_tokens
        self.batch_size = batch_size
        self._fitted: FittedVectors | None = None

    @classmethod
    def get_name(cls) -> str:
        """Captum would spell the class's name "Spatial A C V"."""
        return "Spatial ACV"

    @property
    def layer(self) -> Any:
        """The layer; a SpatialACV keeps the one it was made for."""
        return self._layer

    @layer.setter
    def layer(self, value: Any) -> None:
        if self._layer is None:
            self._layer = value
        elif isinstance(value, nn.Module):
            self._asked_by_tcav = value
        else:
            raise InputError("the vectors belong to one layer; make another SpatialACV for another layer")

    @property
    def vectors(self) -> Tensor:
        """``(K, C)`` unit rows, towards the concept."""
        return self._need_fit().vectors

    @property
    def concept_names(self) -> list[str]:
        """The K names."""
        return list(self._need_fit().names)

    @property
    def accuracies_(self) -> Tensor:
        """``(K,)`` held-out balanced accuracy of positions in [0, 1], chance 0.5; held out by image."""
        return self._need_fit().accuracies

    @property
    def confidence_intervals_(self) -> Tensor:
        """``(K, 2)`` 95 % interval of the accuracy (Welch's t over images)."""
        return self._need_fit().intervals

    @property
    def contrasts_(self) -> Tensor:
        """``(K,)`` held-out difference of the mean relevance on concept and negatives, in standard deviations."""
        return self._need_fit().contrasts

    @property
    def p_values_(self) -> Tensor | None:
        """``(K,)`` Holm-adjusted p-values (see ``fit``), or None where ``n_random=0``."""
        return self._need_fit().p_values

    @property
    def significant_(self) -> Tensor | None:
        """``(K,)`` bool, ``p_values_ < 0.05``: False means *not encoded here*. None where ``n_random=0``."""
        return self._need_fit().significant

    @property
    def rows_(self) -> dict[str, dict[str, int]]:
        """For each concept how many images and rows were seen and how many rows the budget kept."""
        return self._need_fit().rows

    def summary(self) -> str:
        """A table of the concepts: accuracy, interval, p-value, rows; a concept may be *not encoded here*."""
        return self._need_fit().summary()

    def _need_fit(self) -> FittedVectors:
        if self._fitted is None:
            raise NotFittedError("there are no concept vectors yet; call fit(concepts, negatives), or SpatialACV.load")
        return self._fitted

    def _ranked(self, explanation: ConceptExplanation, top_k: int) -> list[str]:
        """The ``top_k`` concepts with the highest scores; those not encoded at the layer come last."""
        if top_k < 1:
            raise InputError(f"top_k must be at least 1, got {top_k}")
        order, significant = explanation.top(len(explanation.concepts)).concepts, self.significant_
        if significant is not None:
            encoded = {name for name, yes in zip(self.concept_names, significant.tolist(), strict=True) if yes}
            order.sort(key=lambda name: name not in encoded)
        return order[:top_k]

    def _maps(self, inputs: Inputs, of_input: bool, extra: Any = None) -> Tensor:
        """``(N, C, h, w)`` of the layer, without gradients."""
        return spatial_activations(
            self.forward_func,
            inputs,
            [self.layer],
            additional_forward_args=extra,
            attribute_to_layer_input=of_input,
            layout=self.layout,
            prefix_tokens=self.prefix_tokens,
        ).maps[0]

    def _gradient(
        self, inputs: Inputs, extra: Any, target: Any, *, best: bool = False
    ) -> tuple[SpatialActivations, Tensor]:
        with gradients_enabled():
            seen = spatial_activations(
                self.forward_func,
                inputs,
                [self.layer],
                additional_forward_args=extra,
                gradient=True,
                attribute_to_layer_input=self._need_fit().of_input,
                layout=self.layout,
                prefix_tokens=self.prefix_tokens,
            )
            goal = recorded_target(seen.output, target) if best and target is None else target
            gradient = seen.gradients(select_output(seen.output, goal))[0]
        return seen, gradient.detach()

    def _vectors(self, maps: Tensor) -> Tensor:
        vectors = self._need_fit().vectors
        if vectors.shape[1] != maps.shape[1]:
            raise LayerError(f"the vectors have {vectors.shape[1]} channels, but the layer gives {maps.shape[1]} now")
        return vectors.to(full_precision(maps[:0]))

    def _relevance(self, maps: Tensor, probability: bool) -> Tensor:
        values = project(maps, self._vectors(maps))
        if not probability:
            return values
        fitted = self._need_fit()
        slope, intercept = (t.to(values).view(1, -1, 1, 1) for t in (fitted.slopes, fitted.intercepts))
        return torch.sigmoid(values * slope + intercept)

    def _each(self, inputs: Inputs, extra: Any, target: Any, run: Callable[..., Result]) -> list[Result]:
        """``run(inputs, extra, target)`` of every batch."""
        halving = Halving("batch_size")

        def unpacked(part: Chunk) -> Result:
            return run(*part)

        parts = chunks(inputs, extra, target, self.batch_size)
        return [result for part in parts for result in halving(unpacked, part, halves)]
