"""Concepts without words: what a layer distinguishes, by non-negative factorization of its activations."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_concepts._artifacts import (
    Array,
    flag,
    list_of,
    nothing_or,
    number as json_number,
    open_artifact,
    save_artifact,
    table,
    text,
)
from captum_concepts._captum import LayerAttribution, layer_attribution, output_tensor, select_output, target_indices
from captum_concepts._checks import finite_images, integer, name_positions, take_rows, unique_names
from captum_concepts._undo import unharming
from captum_concepts.activations import check_images, find_model, full_precision, gradients_enabled
from captum_concepts.activations.layers import Layer, Layers
from captum_concepts.attr.batches import joined
from captum_concepts.concepts import embed_texts
from captum_concepts.errors import ArtifactError, InputError, LayerError
from captum_concepts.explanation import ConceptExplanation, Selection
from captum_concepts.images import batches, inputs_for, thumbnails
from captum_concepts.vlm import check_encoder

_FORMAT = "captum_concepts.DiscoveredConcepts/1"
_SWEEPS = 60  # of coordinate descent for the weights of a position, from zero: they have converged by then
UNNAMED = "unnamed"


@unharming
class DiscoveredConcepts(LayerAttribution):
    r"""Concepts that :func:`discover_concepts` found in a layer: where each is, and how much it moves an output.

    The activation of a position is read as a non-negative mixture :math:`A_{ij} \approx \sum_k w_{kij} h_k` of K
    directions. With an output :math:`F_c`,

    .. math::
        M_k(i, j) = w_{kij} \qquad S_{k \to c}(i, j) = w_{kij} \, h_k^T \frac{\partial F_c}{\partial A_{ij}}

    are the concept maps and the contributions per position: to first order what removing the concept there takes from
    the output, exactly so if only linear operations follow the layer.

    Args:
        forward_func: the model, one of its methods, or any callable that returns the outputs to explain.
        layer: the layer, as a module or a dotted name.
        directions: ``(K, C)``, unit length; ``(K, 2 C)`` for a layer with negative activations, whose positive and
            negative parts are factorized side by side.
        concepts: K unique names.
        scales: ``(K,)`` mean weight of each concept over the images of the discovery.
        name_scores: ``(K,)`` how well the name fits (mean of the crops' centered unit embeddings, projected on the
            word's), NaN where unnamed; or None.
        explained: fraction of the activations' energy that the K directions explain.
        layout, prefix_tokens: how the layer is read, as in :class:`~captum_concepts.SpatialACV`.
        batch_size: images per forward pass.

    Reference: deep feature factorization (Collins, Achanta and Suesstrunk, ECCV 2018, arXiv:1806.10206).
    """

    #: ``explain`` of all concepts costs what it costs of a few (``audit_dataset`` asks once).
    explains_all_at_once = True

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: Layer,
        directions: Tensor,
        concepts: Sequence[str],
        *,
        scales: Tensor | None = None,
        name_scores: Tensor | None = None,
        explained: float | None = None,
        layout: str = "auto",
        prefix_tokens: int | None = None,
        batch_size: int = 32,
    ) -> None:
        super().__init__(forward_func, layer)
        if not isinstance(directions, Tensor) or directions.ndim != 2 or not bool((directions >= 0).all()):
            raise InputError("directions must be a non-negative tensor (K, C)")
        self.directions = F.normalize(full_precision(directions.detach()), dim=1)
        self.concepts = unique_names(concepts, "concept", len(directions))
        self.scales = torch.ones(len(directions)) if scales is None else scales
        self.name_scores = name_scores
        self.explained = explained
        self.layout = layout
        self.prefix_tokens = prefix_tokens
        self.batch_size = integer("batch_size", batch_size)

    def __repr__(self) -> str:
        named = sum(not name.startswith(UNNAMED) for name in self.concepts)
        share = "" if self.explained is None else f", {self.explained:.0%} of the activations' energy"
        layer = Layers.resolve(self.forward_func, self.layer).names[0]
        return f"DiscoveredConcepts(layer {layer!r}, {len(self.concepts)} concepts, {named} named{share})"

    def concept_maps(self, inputs: Any, concepts: Any = None) -> Tensor:
        """``(N, K, h, w)``: the weight of each concept at each position, at least 0."""
        columns = name_positions(concepts, self.concepts)
        return self._each(inputs, None, lambda part, _: self._weights(part)[:, columns])

    def scores(self, inputs: Any) -> Tensor:
        """``(N, K)``: mean weight over the image, relative to the images of the discovery (1 is their average)."""
        return self._each(inputs, None, lambda part, _: self._scores(self._weights(part)))

    @layer_attribution
    def attribute(
        self,
        inputs: Any,
        target: Any = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
    ) -> Tensor:
        """``(N, K, h, w)``: the contribution of each concept at each position to the output ``target``.

        Args:
            inputs: images.
            target: the output, in any form Captum accepts; None: the predicted one.
            additional_forward_args: passed to ``forward_func`` after the inputs.
            attribute_to_layer_input: must be False: the directions are those of the layer's output.

        Raises:
            TargetError: a target that does not fit the outputs.
            LayerError: the output does not depend on the layer.
        """
        if attribute_to_layer_input:
            raise InputError("the directions were discovered in the layer's output; use attribute_to_layer_input=False")
        extra = additional_forward_args
        return self._each(inputs, target, lambda part, goal: self._contributions(part, goal, extra)[0])

    def contributions(self, inputs: Any, target: Any = None, concepts: Any = None) -> Tensor:
        """``(N, K)``: :meth:`attribute`, summed over positions; signed, in units of the output."""
        columns = name_positions(concepts, self.concepts)
        return self._each(inputs, target, lambda part, goal: self._contributions(part, goal)[0].sum((2, 3))[:, columns])

    def explain(
        self,
        inputs: Any,
        target: Any = None,
        *,
        concepts: Any = None,
        top_k: int | None = 5,
        rank_by: str = "scores",
        contributions: bool = True,
    ) -> ConceptExplanation:
        """What, where and how much: see :class:`~captum_concepts.explanation.ConceptExplainer`."""
        n = len(check_images(inputs)[0])
        if rank_by == "contributions" and not contributions:
            raise InputError("rank_by='contributions' needs contributions=True")
        weights, shares, outputs = [], [], []
        for start in range(0, n, self.batch_size):
            rows = slice(start, start + self.batch_size)
            part, goal = take_rows(inputs, rows, n), _cut(target, rows, n)
            if contributions:
                share, weight, output = self._contributions(part, goal)
                shares.append(share.sum((2, 3)))
                outputs.append(output)
            else:
                weight = self._weights(part)
            weights.append(weight)
        maps = joined(weights)
        scores, moved = self._scores(maps), torch.cat(shares) if contributions else None
        values = scores if moved is None or rank_by == "scores" else moved
        chosen = Selection.choose(self.concepts, values, concepts=concepts, top_k=top_k, rank_by=rank_by)
        at = torch.arange(n, device=scores.device)[:, None], chosen.index.to(scores.device)
        return ConceptExplanation(
            [self.concepts[k] for k in chosen.columns],
            scores[:, chosen.columns],
            chosen.spread(maps[at]),
            None if moved is None else chosen.spread(moved[at]),
            torch.cat(outputs) if contributions else None,
            layer=Layers.resolve(self.forward_func, self.layer).names[0],
            method=self.get_name(),
            selected=chosen.selected.to(scores.device),
            score_unit="times the average weight",
            contribution_unit="output",
            rank_by=chosen.rank_by,
            pictures=thumbnails(inputs),
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one safetensors file, atomically."""
        info = {
            "concepts": self.concepts,
            "layer": Layers.resolve(self.forward_func, self.layer).names[0],
            "layout": self.layout,
            "prefix_tokens": self.prefix_tokens,
            "explained": self.explained,
            "named": self.name_scores is not None,
        }
        tensors = {"directions": self.directions, "scales": self.scales}
        if self.name_scores is not None:
            tensors["name_scores"] = self.name_scores
        return save_artifact(path, _FORMAT, info, tensors)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], forward_func: Callable[..., Any], layer: Layer | None = None
    ) -> DiscoveredConcepts:
        """Read what :meth:`save` wrote, for the same model.

        Raises:
            FileNotFoundError: there is no such file.
            ArtifactError: damaged, or of a layer that does not exist here.
        """
        schema = table(
            {
                "concepts": list_of(text()),
                "layer": text(longest=1000),
                "layout": text(),
                "prefix_tokens": nothing_or(json_number()),
                "explained": nothing_or(json_number()),
                "named": flag,
            }
        )
        arrays = {
            "directions": Array("float", ("K", None)),
            "scales": Array("float", ("K",)),
            "name_scores": Array("float", ("K",), optional=True),
        }
        opened = open_artifact(
            path, _FORMAT, "saved concepts of a discovery", info=schema, arrays=arrays,
            sizes=lambda info: {"K": len(info["concepts"])},
        )  # fmt: skip
        with opened as (info, tensors):
            try:
                Layers.resolve(forward_func, info["layer"] if layer is None else layer)
            except LayerError as error:
                raise ArtifactError(f"{path} was saved for a layer that does not exist here: {error}") from error
            prefix = info["prefix_tokens"]
            return cls(
                forward_func,
                info["layer"] if layer is None else layer,
                tensors["directions"],
                info["concepts"],
                scales=tensors["scales"],
                name_scores=tensors.get("name_scores"),
                explained=info["explained"],
                layout=info["layout"],
                prefix_tokens=None if prefix is None else int(prefix),
            )

    def _each(self, inputs: Any, target: Any, run: Callable[[Any, Any], Tensor]) -> Tensor:
        n = len(check_images(inputs)[0])
        rows = [slice(start, start + self.batch_size) for start in range(0, n, self.batch_size)]
        parts = [run(take_rows(inputs, part, n), _cut(target, part, n)) for part in rows]
        return joined(parts).detach().contiguous()

    def _layers(self) -> Layers:
        return Layers.resolve(self.forward_func, self.layer, layout=self.layout, prefix_tokens=self.prefix_tokens)

    @torch.no_grad()
    def _weights(self, inputs: Any) -> Tensor:
        return self._factored(self._layers().run(inputs).maps[0])

    def _factored(self, maps: Tensor) -> Tensor:
        """``(N, K, h, w)`` weights of activations ``(N, C, h, w)``."""
        rows = full_precision(maps.detach()).permute(0, 2, 3, 1)
        rows = _nonnegative(rows, self.directions.shape[1])
        weights = nonnegative_weights(rows.reshape(-1, rows.shape[-1]), self.directions.to(rows))
        return weights.reshape(*rows.shape[:3], -1).permute(0, 3, 1, 2).contiguous()

    def _scores(self, weights: Tensor) -> Tensor:
        return weights.mean((2, 3)) / self.scales.to(weights).clamp(min=torch.finfo(weights.dtype).tiny)

    def _contributions(self, inputs: Any, target: Any, extra: Any = None) -> tuple[Tensor, Tensor, Tensor]:
        """Per position, the weights, and the outputs explained."""
        with gradients_enabled():
            seen = self._layers().run(inputs, additional_forward_args=extra, gradient=True)
            output = output_tensor(seen.output)
            goal = output.detach().argmax(1).tolist() if target is None and output.ndim == 2 else target
            gradient = full_precision(seen.gradients(select_output(output, goal))[0].detach())
        weights = self._factored(seen.maps[0])
        directions = self.directions.to(gradient)
        if directions.shape[1] == 2 * gradient.shape[1]:
            directions = directions[:, : gradient.shape[1]] - directions[:, gradient.shape[1] :]
        moved = weights * torch.einsum("nchw,kc->nkhw", gradient, directions)
        count = output.shape[1] if output.ndim == 2 else 1
        chosen = target_indices(0 if goal is None else goal, len(weights), count, what="class").to(weights.device)
        return moved.detach(), weights, chosen


@unharming
def discover_concepts(
    forward_func: Callable[..., Any],
    layer: Layer,
    images: Any,
    *,
    n_concepts: int,
    encoder: Any = None,
    words: Sequence[str] | None = None,
    max_rows: int = 40_000,
    crop: float = 0.4,
    seed: int = 0,
    layout: str = "auto",
    prefix_tokens: int | None = None,
    transform: Callable[[Any], Tensor] | None = None,
    encoder_transform: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 32,
    show_progress: bool = False,
) -> DiscoveredConcepts:
    r"""Find the concepts that a layer distinguishes, without any words, and name them if there are words.

    The activations of a sample of positions of all images are factorized, :math:`A \approx W H` with non-negative W and
    H, minimizing the squared error. Each row of H is a concept. Memory is ``max_rows`` rows, whatever the number of
    images.

    With ``encoder`` and ``words``, each concept is named by the word whose embedding is nearest to the mean embedding
    of its strongest image crops, both centered. A concept whose nearest word is no nearer than for random crops (95 %
    of 200 draws) is called ``"unnamed"``.

    Args:
        forward_func, layer, layout, prefix_tokens: see :class:`DiscoveredConcepts`.
        images: whatever holds images, see ``images.inputs_for``.
        n_concepts: K.
        encoder: an :class:`~captum_concepts.vlm.ImageTextEncoder`; needs ``words``.
        words: the words to choose names from.
        max_rows: positions in the sample, an equal number from each image.
        crop: side of the crops for naming, as a fraction of the image's, in (0, 1].
        seed: of the sample and of the factorization's start.
        transform: from a file or PIL image to the model's input, in place of its own preprocessing.
        encoder_transform: from the model's input to the encoder's images; None passes them as they are.
        batch_size: images per forward pass.
        show_progress: show bars.

    Raises:
        InputError: fewer positions than concepts, an encoder without words or the reverse, an option out of range.
        LayerError, LayoutError: the layer is unknown, does not run, or has no grid.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        ...     torch.nn.Flatten(), torch.nn.Linear(6, 2))
        >>> images = torch.rand(8, 3, 12, 12, generator=torch.Generator().manual_seed(0))
        >>> found = discover_concepts(net, "1", images, n_concepts=3)
        >>> found.concept_maps(images).shape, found.contributions(images, target=1).shape
        (torch.Size([8, 3, 10, 10]), torch.Size([8, 3]))
    """
    integer("n_concepts", n_concepts)
    integer("max_rows", max_rows)
    if (encoder is None) != (words is None):
        raise InputError("naming needs both encoder= and words=")
    if encoder is not None:
        check_encoder(encoder, words=True)
    if not 0 < crop <= 1:
        raise InputError(f"crop must be a fraction of the image's side in (0, 1], got {crop!r}")
    layers = Layers.resolve(forward_func, layer, layout=layout, prefix_tokens=prefix_tokens)
    source = inputs_for(find_model(forward_func) or forward_func, images, transform=transform)
    generator = torch.Generator().manual_seed(seed)
    rows = _sampled_rows(layers, source, max_rows, batch_size, generator, show_progress)
    if len(rows) < n_concepts:
        raise InputError(f"{len(rows)} positions for {n_concepts} concepts; pass more images or fewer concepts")
    directions, explained = factorize(rows, n_concepts, generator)
    names = [f"{UNNAMED} {k + 1}" for k in range(n_concepts)]
    made = DiscoveredConcepts(
        forward_func, layer, directions, names, explained=explained, layout=layout, prefix_tokens=prefix_tokens,
        batch_size=batch_size,
    )  # fmt: skip
    made.scales = nonnegative_weights(rows, made.directions.to(rows)).mean(0).cpu()
    if encoder is not None and words is not None:
        chosen = unique_names(words, "word")
        crops, owner = _strongest_crops(made, source, crop, batch_size)
        made.concepts, made.name_scores = _names(
            encoder, encoder_transform, chosen, crops, owner, n_concepts, generator
        )
    return made


def nonnegative_weights(rows: Tensor, directions: Tensor, start: Tensor | None = None) -> Tensor:
    """``(R, K)`` non-negative W that minimizes |rows - W directions|^2, row by row, by coordinate descent.

    >>> nonnegative_weights(torch.tensor([[2.0, 3.0]]), torch.eye(2))
    tensor([[2., 3.]])
    """
    gram, cross = directions @ directions.T, rows @ directions.T
    weights = torch.zeros_like(cross) if start is None else start.clone()
    for _ in range(_SWEEPS):
        for k in range(len(directions)):
            step = (cross[:, k] - weights @ gram[:, k]) / gram[k, k].clamp(min=1e-12)
            weights[:, k] = (weights[:, k] + step).clamp(min=0)
    return weights


def factorize(rows: Tensor, n_concepts: int, generator: torch.Generator, iterations: int = 60) -> tuple[Tensor, float]:
    """``(K, C)`` unit directions of a non-negative factorization, and the explained fraction of the energy.

    Alternating coordinate descent (HALS) from rows that lie far apart.
    """
    rows = rows.double()
    directions = rows[_far_apart(rows, n_concepts, generator)].clone()
    directions = F.normalize(directions + 1e-8, dim=1)
    weights = rows.new_zeros(len(rows), n_concepts)
    for _ in range(iterations):
        gram, cross = directions @ directions.T, rows @ directions.T
        for k in range(n_concepts):
            step = (cross[:, k] - weights @ gram[:, k]) / gram[k, k].clamp(min=1e-12)
            weights[:, k] = (weights[:, k] + step).clamp(min=0)
        gram, cross = weights.T @ weights, weights.T @ rows
        for k in range(n_concepts):
            step = (cross[k] - gram[k] @ directions) / gram[k, k].clamp(min=1e-12)
            directions[k] = (directions[k] + step).clamp(min=0)
        norms = directions.norm(dim=1).clamp(min=1e-12)
        directions, weights = directions / norms[:, None], weights * norms
    weights = nonnegative_weights(rows, directions, weights)
    residual = (rows - weights @ directions).square().sum()
    return directions.float(), float(1 - residual / rows.square().sum().clamp(min=1e-30))


def _far_apart(rows: Tensor, count: int, generator: torch.Generator) -> list[int]:
    """Rows of different directions: each next one is drawn in proportion to its squared distance from those before."""
    unit = F.normalize(rows, dim=1)
    energy = rows.square().sum(1)
    chosen = [int(torch.multinomial(energy.float() + 1e-12, 1, generator=generator))]
    distance = 1 - unit @ unit[chosen[0]]
    for _ in range(count - 1):
        weight = (distance.clamp(min=0).square() * energy).float() + 1e-12
        chosen.append(int(torch.multinomial(weight, 1, generator=generator)))
        distance = torch.minimum(distance, 1 - unit @ unit[chosen[-1]])
    return chosen


def _nonnegative(rows: Tensor, width: int) -> Tensor:
    """Activations as they are factorized: as they are, or their positive and negative parts."""
    if width == rows.shape[-1]:
        return rows.clamp(min=0)
    if width == 2 * rows.shape[-1]:
        return torch.cat([rows.clamp(min=0), (-rows).clamp(min=0)], -1)
    raise LayerError(f"the directions have {width} entries, but the layer has {rows.shape[-1]} channels now")


@torch.no_grad()
def _sampled_rows(
    layers: Layers, source: Any, max_rows: int, batch_size: int, generator: torch.Generator, show_progress: bool
) -> Tensor:
    """``(R, C)`` activations of positions, ``(R, 2 C)`` where any is negative."""
    from tqdm import tqdm

    count = len(source)
    each = max(1, max_rows // max(count, 1))
    device = next(layers.model.parameters(), torch.zeros(())).device if layers.model is not None else None
    found = []
    read = batches(source, batch_size, device=device)
    for batch in tqdm(read, desc="activations", total=-(-count // batch_size), disable=not show_progress):
        maps = full_precision(layers.run(batch.images).maps[0]).permute(0, 2, 3, 1).flatten(1, 2).cpu()
        finite_images(maps, batch.names, f"the activation of layer {layers.names[0]!r}")
        for image in maps:
            order = torch.randperm(len(image), generator=generator)[:each]
            found.append(image[order])
    rows = torch.cat(found)[:max_rows] if count <= max_rows else torch.cat(found)
    return _nonnegative(rows, rows.shape[1] * (2 if bool((rows < 0).any()) else 1))


def _strongest_crops(
    made: DiscoveredConcepts, source: Any, crop: float, batch_size: int, per_concept: int = 16
) -> tuple[Tensor, Tensor]:
    """Crops around the strongest position in the strongest images of each concept, and whose they are."""
    device = next(getattr(find_model(made.forward_func), "parameters", lambda: iter(()))(), torch.zeros(())).device
    best: list[tuple[Tensor, Tensor]] = []
    for batch in batches(source, batch_size, device=device):
        maps = made._weights(batch.images)
        peak = maps.flatten(2).max(2)
        y, x = peak.indices // maps.shape[3], peak.indices % maps.shape[3]
        center = torch.stack([(y + 0.5) / maps.shape[2], (x + 0.5) / maps.shape[3]], -1)
        best.append((peak.values.cpu(), center.cpu()))
    values, centers = torch.cat([b[0] for b in best]), torch.cat([b[1] for b in best])
    crops, owner = [], []
    for k in range(values.shape[1]):
        for i in values[:, k].argsort(descending=True)[:per_concept].tolist():
            image = source[i]
            height, width = image.shape[-2:]
            side_y, side_x = max(1, round(crop * height)), max(1, round(crop * width))
            top = min(max(0, round(float(centers[i, k, 0]) * height - side_y / 2)), height - side_y)
            left = min(max(0, round(float(centers[i, k, 1]) * width - side_x / 2)), width - side_x)
            part = image[None, :, top : top + side_y, left : left + side_x]
            crops.append(F.interpolate(part, (height, width), mode="bilinear", align_corners=False)[0])
            owner.append(k)
    return torch.stack(crops), torch.tensor(owner)


@torch.no_grad()
def _names(
    encoder: Any,
    transform: Callable[[Tensor], Tensor] | None,
    words: list[str],
    crops: Tensor,
    owner: Tensor,
    count: int,
    generator: torch.Generator,
) -> tuple[list[str], Tensor]:
    """The nearest word of each concept, and the projection of its mean centered embedding on it; unique names."""
    parts = [part if transform is None else transform(part) for part in crops.split(16)]
    embedded = F.normalize(torch.cat([encoder.encode_image(part).detach().float().cpu() for part in parts]), dim=1)
    text_rows = embed_texts(encoder, words)
    if len(words) > 1:
        text_rows = text_rows - text_rows.mean(0)
    text_rows = F.normalize(text_rows, dim=1)
    embedded = embedded - embedded.mean(0)

    def nearest(rows: Tensor) -> Tensor:
        return rows.mean(0) @ text_rows.T  # not normalized: crops that have nothing in common cancel out

    per = int((owner == 0).sum())
    null = [
        float(nearest(embedded[torch.randperm(len(embedded), generator=generator)[:per]]).max()) for _ in range(200)
    ]
    least = float(torch.tensor(null).quantile(0.95))
    names: list[str] = []
    scores = torch.full((count,), torch.nan)
    for k in range(count):
        fit = nearest(embedded[owner == k])
        at = int(fit.argmax())
        if float(fit[at]) > least:
            base, scores[k] = words[at], fit[at]
        else:
            base = UNNAMED
        name, number = (f"{base} 1" if base == UNNAMED else base), 1
        while name in names:
            number += 1
            name = f"{base} {number}"
        names.append(name)
    return names, scores


def _cut(target: Any, rows: slice, n: int) -> Any:
    several = isinstance(target, list) or (isinstance(target, Tensor) and target.ndim > 0 and target.numel() > 1)
    return target[rows] if several and len(target) == n else target
