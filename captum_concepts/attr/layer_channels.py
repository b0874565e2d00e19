"""A layer's channels as concepts, with or without names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from captum_concepts._checks import integer, name_positions
from captum_concepts.activations import Layers, full_precision
from captum_concepts.activations.layers import Layer
from captum_concepts.attr.batches import as_inputs, first_example, image_names, in_parts
from captum_concepts.errors import InputError
from captum_concepts.explanation import ConceptExplanation, Selection

METHOD = "LayerChannels"


class LayerChannels:
    """The channels of a layer as a :class:`~captum_concepts.explanation.ConceptExplainer`.

    A channel's score is the mean of its map over the positions, as in network dissection. It is the baseline of user
    studies: ``visualization.most_activating`` shows what each channel responds to.

    Args:
        forward_func: the model, one of its methods, or any callable.
        layer: a module or a dotted name.
        example: images for ``forward_func``; one of them is run to count the channels.
        labels: text labels by channel number, for example from CLIP-Dissect. A labeled channel is named
            ``"beak (channel 17)"``, others ``"channel 17"``.
        layout, prefix_tokens: how the layer is read, as in :class:`~captum_concepts.SpatialACV`.
        batch_size: images per forward pass.

    Attributes:
        concepts: the names.
        labels: ``{name: label}``.

    Raises:
        LayerError, LayoutError: the layer is unknown or has no grid.
        InputError: a label belongs to a channel that does not exist.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU())
        >>> channels = LayerChannels(net, "1", torch.rand(1, 3, 8, 8), labels={2: "beak"})
        >>> channels.concepts[1:3], channels.scores(torch.rand(5, 3, 8, 8)).shape
        (['channel 1', 'beak (channel 2)'], torch.Size([5, 4]))
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: Layer,
        example: Any,
        *,
        labels: Mapping[int, str] | None = None,
        layout: str = "auto",
        prefix_tokens: int | None = None,
        batch_size: int = 32,
    ) -> None:
        self.forward_func = forward_func
        self.layer = layer
        self.layout = layout
        self.prefix_tokens = prefix_tokens
        self.batch_size = integer("batch_size", batch_size)
        self._layers = Layers.resolve(forward_func, [layer], layout=layout, prefix_tokens=prefix_tokens)
        first = first_example(as_inputs(example, self._layers.model), self._layers.model)
        count = self._read(first).shape[1]
        words = dict(labels or {})
        unknown = [key for key in words if isinstance(key, bool) or not isinstance(key, int) or not 0 <= key < count]
        if unknown:
            raise InputError(f"labels must map channel indices, 0 to {count - 1}, to names; got {unknown[:5]!r}")
        self.concepts = [f"{words[k]} (channel {k})" if k in words else f"channel {k}" for k in range(count)]
        self.labels = {self.concepts[k]: word for k, word in words.items()}

    def scores(self, inputs: Any) -> Tensor:
        """``(N, C)`` mean of each channel over the positions."""
        return torch.cat([maps.mean((2, 3)) for maps in self._each(as_inputs(inputs, self._layers.model))])

    def concept_maps(self, inputs: Any, concepts: Any = None) -> Tensor:
        """``(N, T, h, w)`` activations of ``concepts`` (names or indices; None selects all)."""
        columns = name_positions(concepts, self.concepts)
        return torch.cat([maps[:, columns] for maps in self._each(as_inputs(inputs, self._layers.model))])

    def explain(
        self,
        inputs: Any,
        target: Any = None,  # noqa: ARG002
        *,
        concepts: Any = None,
        top_k: int | None = 5,
        rank_by: str = "scores",
        contributions: bool = True,  # noqa: ARG002
    ) -> ConceptExplanation:
        """The channels that respond most, with their maps. Channels have no contributions."""
        if rank_by == "contributions":
            raise InputError("channels have no contributions; use rank_by='scores'")
        opened = as_inputs(inputs, self._layers.model)
        maps = torch.cat(list(self._each(opened)))
        scores = maps.mean((2, 3))
        chosen = Selection.choose(self.concepts, scores, concepts=concepts, top_k=top_k)
        at = torch.arange(len(maps), device=maps.device)[:, None], chosen.index.to(maps.device)
        return ConceptExplanation(
            [self.concepts[k] for k in chosen.columns],
            scores[:, chosen.columns],
            chosen.spread(maps[at]),
            layer=self._layers.names[0],
            method=METHOD,
            selected=chosen.selected.to(maps.device),
            image_names=image_names(opened),
            score_unit="mean activation",
        )

    def _each(self, inputs: Any) -> Any:
        return (self._read(part) for _, part in in_parts(inputs, self.batch_size, self._layers.model))

    def _read(self, images: Any) -> Tensor:
        with torch.no_grad():
            return full_precision(self._layers.run(images).maps[0].detach())
