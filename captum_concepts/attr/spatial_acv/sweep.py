"""Comparison of the same concepts at several layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_concepts.activations import Layer
from captum_concepts.errors import InputError


@dataclass(frozen=True)
class LayerSweep:
    """Statistics of L layers and K concepts, from :meth:`SpatialACV.layer_sweep`.

    Args:
        layers: L names, in the order passed.
        concepts: K names.
        accuracies: ``(L, K)`` held-out balanced accuracy, chance 0.5; intervals ``(L, K, 2)`` are its 95 % interval.
        contrasts: ``(L, K)`` held-out relevance contrast, in standard deviations; 0 without separation.
        p_values: ``(L, K)`` Holm-adjusted over the concepts of a layer, or None.
        methods: the L fitted :class:`SpatialACV`.
    """

    layers: list[str]
    concepts: list[str]
    accuracies: Tensor
    intervals: Tensor
    contrasts: Tensor
    p_values: Tensor | None
    methods: list[Any]

    def best(self) -> dict[str, str]:
        """The layer with the highest held-out accuracy, for each concept."""
        rows = self.accuracies.argmax(0).tolist()
        return {name: self.layers[row] for name, row in zip(self.concepts, rows, strict=True)}

    def plot(self) -> Any:
        """A matplotlib figure of accuracy with its interval, and of relevance contrast, over the layers.

        A hollow point marks a concept *not encoded here* (p >= 0.05).
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        at = list(range(len(self.layers)))
        for k, name in enumerate(self.concepts):
            error = (self.intervals[:, k] - self.accuracies[:, k, None]).abs().T.numpy()
            line = left.errorbar(at, self.accuracies[:, k].numpy(), error, capsize=2, lw=1.5, elinewidth=0.7)
            color = line.lines[0].get_color()
            encoded = [True] * len(at) if self.p_values is None else (self.p_values[:, k] < 0.05).tolist()
            right.plot(at, self.contrasts[:, k].numpy(), color=color, lw=1.5, label=name)
            for axes, values in ((left, self.accuracies), (right, self.contrasts)):
                faces = [color if yes else "white" for yes in encoded]
                axes.scatter(at, values[:, k].numpy(), s=28, c=faces, edgecolors=color, zorder=3)
        left.axhline(0.5, color="0.6", ls=":", lw=1)
        left.set(ylabel="held-out balanced accuracy", ylim=(0.4, 1.02))
        right.axhline(0, color="0.6", ls=":", lw=1)
        right.set(ylabel="relevance contrast (standard deviations)")
        for axes in (left, right):
            axes.set_xticks(at, self.layers, rotation=35, ha="right", fontsize=8)
            axes.spines[["top", "right"]].set_visible(False)
        title = None if self.p_values is None else "hollow: not encoded here"
        right.legend(frameon=False, fontsize=8, title=title, title_fontsize=8)
        return figure


def sweep(
    make: Callable[[Layer], Any], layers: Sequence[Layer], fit: Callable[[Any], Any], show_progress: bool
) -> LayerSweep:
    """The comparison of the methods that ``make`` returns for every layer and ``fit`` fits."""
    from tqdm import tqdm

    if isinstance(layers, (str, torch.nn.Module)) or not layers:
        raise InputError(f"layers must be a list of at least one layer, got {layers!r}")
    made = [make(layer) for layer in layers]
    methods = [fit(method) for method in tqdm(made, desc="layers", disable=not show_progress)]
    p_values = [m.p_values_ for m in methods if m.p_values_ is not None]
    return LayerSweep(
        [m.layer_name for m in methods],
        methods[0].concepts,
        torch.stack([m.accuracies_ for m in methods]),
        torch.stack([m.confidence_intervals_ for m in methods]),
        torch.stack([m.contrasts_ for m in methods]),
        torch.stack(p_values) if p_values else None,
        methods,
    )
