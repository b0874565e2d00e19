"""At which layers does a network know a concept? Every layer fitted and compared, in one call and one figure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from captum_concepts.activations import layer_name, resolve_layer
from captum_concepts.activations.capture import Layer
from captum_concepts.attr.spatial_acv import SpatialACV
from captum_concepts.errors import InputError


@dataclass(frozen=True)
class LayerSweep:
    """What :func:`layer_sweep` found, for L layers and K concepts.

    Args:
        layers: L names, in the order given.
        concept_names: K names.
        accuracies: ``(L, K)`` held-out balanced accuracy, chance 0.5; intervals ``(L, K, 2)`` its 95 % interval.
        contrasts: ``(L, K)`` held-out relevance contrast, in standard deviations; 0 where nothing is seen.
        p_values: ``(L, K)`` Holm-adjusted over the concepts of a layer, or None.
        methods: the L fitted :class:`SpatialACV`.
    """

    layers: list[str]
    concept_names: list[str]
    accuracies: Tensor
    intervals: Tensor
    contrasts: Tensor
    p_values: Tensor | None
    methods: list[SpatialACV]

    def best(self) -> dict[str, str]:
        """The layer with the highest held-out accuracy, for each concept."""
        rows = self.accuracies.argmax(0).tolist()
        return {name: self.layers[row] for name, row in zip(self.concept_names, rows, strict=True)}

    def plot(self) -> Any:
        """A matplotlib figure: accuracy with its interval, and relevance contrast, over the layers.

        A hollow point is a concept *not encoded here* (p >= 0.05).
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        at = list(range(len(self.layers)))
        for k, name in enumerate(self.concept_names):
            error = (self.intervals[:, k] - self.accuracies[:, k, None]).abs().T.numpy()
            line = left.errorbar(at, self.accuracies[:, k].numpy(), error, capsize=2, lw=1.5, elinewidth=0.7)
            colour = line.lines[0].get_color()
            encoded = [True] * len(at) if self.p_values is None else (self.p_values[:, k] < 0.05).tolist()
            right.plot(at, self.contrasts[:, k].numpy(), color=colour, lw=1.5, label=name)
            for axes, values in ((left, self.accuracies), (right, self.contrasts)):
                faces = [colour if yes else "white" for yes in encoded]
                axes.scatter(at, values[:, k].numpy(), s=28, c=faces, edgecolors=colour, zorder=3)
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


def layer_sweep(
    forward_func: Callable[..., Any],
    layers: Sequence[Layer],
    concepts: Any,
    negatives: Any = None,
    *,
    classifier: Any = None,
    layout: str = "auto",
    prefix_tokens: int | None = None,
    batch_size: int = 32,
    show_progress: bool = False,
    **options: Any,
) -> LayerSweep:
    """Fit the concepts at every layer and compare (paper, Fig. 2B: deep layers know stripes, early ones do not).

    Accuracy and contrast are held out by image and free of scale, so layers of any width and range compare.

    Args:
        forward_func: the model.
        layers: modules or dotted names, usually from the image to the output.
        concepts, negatives: as in :meth:`SpatialACV.fit`.
        classifier, layout, prefix_tokens, batch_size: as in :class:`SpatialACV`.
        show_progress: show a bar over the layers.
        **options: of :meth:`SpatialACV.fit`: ``n_random``, ``seed``, ``lam``, ``folds``, ``max_rows``, ...

    Returns:
        The comparison, with the fitted methods and a ``plot()``.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 3))
        >>> dark = torch.rand(4, 3, 12, 12) * 0.1
        >>> sweep = layer_sweep(net, ["0", "2"], {"dark": dark}, torch.rand(4, 3, 12, 12))
        >>> sweep.layers, sweep.accuracies.shape
        (['0', '2'], torch.Size([2, 1]))
    """
    if isinstance(layers, (str, torch.nn.Module)) or not layers:
        raise InputError(f"layers must be a list of at least one layer, got {layers!r}")
    methods = []
    for layer in tqdm(layers, desc="layers", disable=not show_progress):
        method = SpatialACV(
            forward_func,
            layer,
            classifier=classifier,
            layout=layout,
            prefix_tokens=prefix_tokens,
            batch_size=batch_size,
        )
        methods.append(method.fit(concepts, negatives, **options))
    p_values = [m.p_values_ for m in methods if m.p_values_ is not None]
    return LayerSweep(
        [layer_name(forward_func, resolve_layer(forward_func, layer)) for layer in layers],
        methods[0].concept_names,
        torch.stack([m.accuracies_ for m in methods]),
        torch.stack([m.confidence_intervals_ for m in methods]),
        torch.stack([m.contrasts_ for m in methods]),
        torch.stack(p_values) if p_values else None,
        methods,
    )
