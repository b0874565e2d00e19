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
from captum_concepts._checks import finite_images, integer, name_positions, number, take_rows, unique_names
from captum_concepts._undo import unharming
from captum_concepts.activations import check_images, find_model, full_precision, gradients_enabled
from captum_concepts.activations.layers import Layer, Layers
from captum_concepts.attr.batches import joined, placed
from captum_concepts.concepts import embed_texts
from captum_concepts.errors import ArtifactError, InputError, LayerError
from captum_concepts.explanation import ConceptExplanation, Selection
from captum_concepts.images import batches, inputs_for, thumbnails
from captum_concepts.vlm import check_encoder

_FORMAT = "captum_concepts.DiscoveredConcepts/1"
_SWEEPS = 100  # of coordinate descent for the weights of a position, at most
_TOLERANCE = 1e-6  # of the largest weight, by which no weight changes any more
#: Penalty on the sum of a position's weights, as a share of its activation's length: few concepts at each position.
SPARSITY = 0.3
_NAMED_BY = 1000  # images that are shown to the encoder, at most
UNNAMED = "unnamed"


@unharming
class DiscoveredConcepts(LayerAttribution):
    r"""Concepts that :func:`discover_concepts` found in a layer: where each is, and how much it moves an output.

    The activation of a position is read as a non-negative mixture :math:`A_{ij} \approx \sum_k w_{kij} h_k` of K
    directions, few of which have a weight: the sum of the weights is penalized while they are chosen. With an output
    :math:`F_c`,

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
        channel_scales: ``(C,)`` or ``(2 C,)`` unit of each channel in which errors count; None: 1.
        sparsity: penalty on the sum of a position's weights, as a share of its activation's length in these units.
        scales: ``(K,)`` mean share of each concept over the images of the discovery.
        name_scores: ``(K,)`` how well the name fits (correlation of the concept's score with the encoder's similarity
            over the images), NaN where unnamed; or None.
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
        channel_scales: Tensor | None = None,
        sparsity: float = 0.0,
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
        self.directions = full_precision(directions.detach())
        lengths = self.directions.norm(dim=1, keepdim=True)
        if bool(((lengths - 1).abs() > 1e-6).any()):  # saved ones stay as they are, to the bit
            self.directions = F.normalize(self.directions, dim=1)
        self.concepts = unique_names(concepts, "concept", len(directions))
        self.channel_scales = torch.ones(directions.shape[1]) if channel_scales is None else channel_scales
        if tuple(self.channel_scales.shape) != (directions.shape[1],) or not bool((self.channel_scales > 0).all()):
            raise InputError(f"channel_scales must be {directions.shape[1]} positive numbers")
        self.sparsity = number("sparsity", sparsity, lambda share: 0 <= share < 1, "in [0, 1)")
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
        return self._each(inputs, None, lambda part, _: self._weights(part)[0][:, columns])

    def scores(self, inputs: Any) -> Tensor:
        """``(N, K)``: mean share of the positions' activations, relative to the discovery's images (1: as there)."""
        return self._each(inputs, None, lambda part, _: self._weights(part)[1])

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
        weights, found, moves, outputs = [], [], [], []
        for start in range(0, n, self.batch_size):
            rows = slice(start, start + self.batch_size)
            part, goal = take_rows(inputs, rows, n), _cut(target, rows, n)
            if contributions:
                move, weight, score, output = self._contributions(part, goal)
                moves.append(move.sum((2, 3)))
                outputs.append(output)
            else:
                weight, score = self._weights(part)
            weights.append(weight)
            found.append(score)
        maps, scores = joined(weights), torch.cat(found)
        moved = torch.cat(moves) if contributions else None
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
            score_unit="times the average share",
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
            "sparsity": self.sparsity,
            "explained": self.explained,
            "named": self.name_scores is not None,
        }
        tensors = {"directions": self.directions, "scales": self.scales, "channel_scales": self.channel_scales}
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
                "sparsity": json_number(),
                "explained": nothing_or(json_number()),
                "named": flag,
            }
        )
        arrays = {
            "directions": Array("float", ("K", "C")),
            "channel_scales": Array("float", ("C",)),
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
                channel_scales=tensors["channel_scales"],
                sparsity=info["sparsity"],
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
    def _weights(self, inputs: Any) -> tuple[Tensor, Tensor]:
        return self._factored(self._layers().run(inputs).maps[0])

    def _factored(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """``(N, K, h, w)`` weights of activations ``(N, C, h, w)``, and ``(N, K)`` scores."""
        rows = full_precision(maps.detach()).permute(0, 2, 3, 1)
        rows = _nonnegative(rows, self.directions.shape[1])
        weights, shares = self._of_rows(rows.reshape(-1, rows.shape[-1]))
        scores = shares.reshape(len(maps), -1, len(self.directions)).mean(1)
        least = torch.finfo(scores.dtype).tiny
        weights = weights.reshape(*rows.shape[:3], -1).permute(0, 3, 1, 2).contiguous()
        return weights, scores / self.scales.to(scores).clamp(min=least)

    def _of_rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """``(R, K)`` weights of the directions, and the same as shares of each row's length, in the channels' units."""
        units = self.channel_scales.to(rows)
        scaled, directions = rows / units, self.directions.to(rows) / units
        lengths = directions.norm(dim=1).clamp(min=1e-12)
        weights = nonnegative_weights(scaled, directions / lengths[:, None], sparsity=self.sparsity)
        return weights / lengths, weights / scaled.norm(dim=1, keepdim=True).clamp(min=1e-12)

    def _contributions(self, inputs: Any, target: Any, extra: Any = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Per position, the weights, the scores, and the outputs explained."""
        with gradients_enabled():
            seen = self._layers().run(inputs, additional_forward_args=extra, gradient=True)
            output = output_tensor(seen.output)
            goal = output.detach().argmax(1).tolist() if target is None and output.ndim == 2 else target
            gradient = full_precision(seen.gradients(select_output(output, goal))[0].detach())
        weights, scores = self._factored(seen.maps[0])
        directions = self.directions.to(gradient)
        if directions.shape[1] == 2 * gradient.shape[1]:
            directions = directions[:, : gradient.shape[1]] - directions[:, gradient.shape[1] :]
        moved = weights * torch.einsum("nchw,kc->nkhw", gradient, directions)
        count = output.shape[1] if output.ndim == 2 else 1
        chosen = target_indices(0 if goal is None else goal, len(weights), count, what="class").to(weights.device)
        return moved.detach(), weights, scores, chosen


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
    sparsity: float = SPARSITY,
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
    H, minimizing the squared error and :math:`\lambda \sum W`. Each row of H is a concept. Before, each channel is
    divided by its standard deviation and each position by its length: what is weak or rare counts as much as what is
    strong. Memory is ``max_rows`` rows, whatever the number of images.

    With ``encoder`` and ``words``, each concept is named by the word whose similarity to the images, as the encoder
    sees them, correlates most with the concept's score over the images (at most 1,000 of them). If that correlation is
    no higher than the highest of any word for shuffled images (95 % of 200 draws), it is called ``"unnamed"``.

    Args:
        forward_func, layer, layout, prefix_tokens: see :class:`DiscoveredConcepts`.
        images: whatever holds images, see ``images.inputs_for``.
        n_concepts: K.
        encoder: an :class:`~captum_concepts.vlm.ImageTextEncoder`; needs ``words``.
        words: the words to choose names from.
        max_rows: positions in the sample, an equal number from each image.
        sparsity: :math:`\lambda`, in [0, 1): more of it leaves fewer concepts at a position.
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
    number("sparsity", sparsity, lambda share: 0 <= share < 1, "in [0, 1)")
    layers = Layers.resolve(forward_func, layer, layout=layout, prefix_tokens=prefix_tokens)
    source = inputs_for(find_model(forward_func) or forward_func, images, transform=transform)
    generator = torch.Generator().manual_seed(seed)
    rows = _sampled_rows(layers, source, max_rows, batch_size, generator, show_progress)
    if len(rows) < n_concepts:
        raise InputError(f"{len(rows)} positions for {n_concepts} concepts; pass more images or fewer concepts")
    units = rows.std(0, correction=0)
    units = units + 1e-3 * units.square().mean().sqrt() + 1e-12
    directions, _ = factorize(F.normalize(rows / units, dim=1), n_concepts, generator, sparsity=sparsity)
    names = [f"{UNNAMED} {k + 1}" for k in range(n_concepts)]
    made = DiscoveredConcepts(
        forward_func, layer, directions * units, names, channel_scales=units, sparsity=sparsity, layout=layout,
        prefix_tokens=prefix_tokens, batch_size=batch_size,
    )  # fmt: skip
    weights, shares = made._of_rows(rows)
    rest = (rows - weights @ made.directions.to(rows)).square().sum()
    made.explained = float(1 - rest / rows.square().sum().clamp(min=1e-30))
    made.scales = shares.mean(0).cpu()
    if encoder is not None and words is not None:
        chosen = unique_names(words, "word")
        part = source.select(range(0, len(source), -(-len(source) // _NAMED_BY)))
        made.concepts, made.name_scores = _names(
            made, encoder, encoder_transform, chosen, part, batch_size, generator, show_progress
        )
    return made


def nonnegative_weights(
    rows: Tensor, directions: Tensor, start: Tensor | None = None, *, sparsity: float = 0.0
) -> Tensor:
    """``(R, K)`` non-negative W that minimizes |rows - W directions|^2, row by row, by coordinate descent.

    With ``sparsity``, ``2 sparsity |row| sum(W)`` is added to choose which weights are not zero; these then minimize
    the squared error alone.

    >>> nonnegative_weights(torch.tensor([[2.0, 3.0]]), torch.eye(2))
    tensor([[2., 3.]])
    >>> nonnegative_weights(torch.tensor([[0.2, 3.0]]), torch.eye(2), sparsity=0.3)
    tensor([[0., 3.]])
    """
    gram, cross = directions @ directions.T, rows @ directions.T
    weights = torch.zeros_like(cross) if start is None else start.clone()
    if sparsity:
        weights = _descended(weights, gram, cross - sparsity * rows.norm(dim=1, keepdim=True), _SWEEPS)
    return _descended(weights, gram, cross, _SWEEPS, weights > 0 if sparsity else None)


def _descended(weights: Tensor, gram: Tensor, cross: Tensor, sweeps: int, free: Tensor | None = None) -> Tensor:
    """By coordinate descent until no weight changes; those that are not ``free`` stay at zero."""
    for sweep in range(sweeps):
        before = weights.clone() if sweep % 4 == 3 else None
        for k in range(len(gram)):
            step = (cross[:, k] - weights @ gram[:, k]) / gram[k, k].clamp(min=1e-12)
            column = (weights[:, k] + step).clamp(min=0)
            weights[:, k] = column if free is None else column * free[:, k]
        if before is not None and bool((weights - before).abs().max() <= _TOLERANCE * weights.max()):
            break
    return weights


def factorize(
    rows: Tensor, n_concepts: int, generator: torch.Generator, iterations: int = 60, *, sparsity: float = 0.0
) -> tuple[Tensor, float]:
    """``(K, C)`` unit directions of a non-negative factorization, and the explained fraction of the energy.

    Alternating coordinate descent (HALS) from rows that lie far apart; ``sparsity`` as in :func:`nonnegative_weights`.
    """
    rows = rows.double()
    penalty = sparsity * rows.norm(dim=1, keepdim=True)
    directions = rows[_far_apart(rows, n_concepts, generator)].clone()
    directions = F.normalize(directions + 1e-8, dim=1)
    weights = rows.new_zeros(len(rows), n_concepts)
    for _ in range(iterations):
        weights = _descended(weights, directions @ directions.T, rows @ directions.T - penalty, 1)
        gram, cross = weights.T @ weights, weights.T @ rows
        for k in range(n_concepts):
            step = (cross[k] - gram[k] @ directions) / gram[k, k].clamp(min=1e-12)
            directions[k] = (directions[k] + step).clamp(min=0)
        norms = directions.norm(dim=1).clamp(min=1e-12)
        directions, weights = directions / norms[:, None], weights * norms
    weights = nonnegative_weights(rows, directions, weights, sparsity=sparsity)
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
    found = []
    read = batches(source, batch_size)
    for batch in tqdm(read, desc="activations", total=-(-count // batch_size), disable=not show_progress):
        seen = layers.run(placed(batch.images, layers.model)).maps[0]
        maps = full_precision(seen).permute(0, 2, 3, 1).flatten(1, 2).cpu()
        finite_images(maps, batch.names, f"the activation of layer {layers.names[0]!r}")
        for image in maps:
            order = torch.randperm(len(image), generator=generator)[:each]
            found.append(image[order])
    rows = torch.cat(found)[:max_rows] if count <= max_rows else torch.cat(found)
    return _nonnegative(rows, rows.shape[1] * (2 if bool((rows < 0).any()) else 1))


@torch.no_grad()
def _names(
    made: DiscoveredConcepts,
    encoder: Any,
    transform: Callable[[Tensor], Tensor] | None,
    words: list[str],
    source: Any,
    batch_size: int,
    generator: torch.Generator,
    show_progress: bool,
) -> tuple[list[str], Tensor]:
    """The word that goes with each concept, and how well; unique names."""
    from tqdm import tqdm

    model = find_model(made.forward_func)
    scores, embedded = [], []
    read = batches(source, batch_size)
    for batch in tqdm(read, desc="names", total=-(-len(source) // batch_size), disable=not show_progress):
        images = placed(batch.images, model)
        scores.append(made._weights(images)[1].cpu())
        shown = batch.images.to(images.device)  # the encoder has a dtype of its own
        shown = shown if transform is None else transform(shown)
        embedded.append(encoder.encode_image(shown).detach().float().cpu())
    similarity = F.normalize(torch.cat(embedded), dim=1) @ F.normalize(embed_texts(encoder, words), dim=1).T
    found, taught = (_standardized(table) for table in (torch.cat(scores), similarity))
    correlation = found.T @ taught
    shuffled = [found[torch.randperm(len(found), generator=generator)].T @ taught for _ in range(200)]
    least = torch.stack([draw.amax(1) for draw in shuffled]).quantile(0.95, dim=0)
    names: list[str] = []
    best, at = correlation.max(1)
    named = best > least
    for k, word in enumerate(at.tolist()):
        base = words[word] if named[k] else UNNAMED
        name, number_of = (f"{base} 1" if base == UNNAMED else base), 1
        while name in names:
            number_of += 1
            name = f"{base} {number_of}"
        names.append(name)
    return names, best.where(named, torch.nan)


def _standardized(table: Tensor) -> Tensor:
    """Columns of mean 0 and length 1; constant ones are 0."""
    centered = table.double() - table.double().mean(0)
    return (centered / centered.norm(dim=0).clamp(min=1e-12)).float()


def _cut(target: Any, rows: slice, n: int) -> Any:
    several = isinstance(target, list) or (isinstance(target, Tensor) and target.ndim > 0 and target.numel() > 1)
    return target[rows] if several and len(target) == n else target
