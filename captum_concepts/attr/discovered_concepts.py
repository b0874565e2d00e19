"""Unsupervised concepts of a layer, from a sparse dictionary of its equalized activations."""

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
from captum_concepts._checks import (
    finite_images,
    integer,
    name_positions,
    number,
    one_target_each,
    take_rows,
    unique_names,
)
from captum_concepts._undo import unharming
from captum_concepts.activations import check_images, evaluation_mode, find_model, full_precision, gradients_enabled
from captum_concepts.activations.layers import Layer, Layers
from captum_concepts.attr.batches import joined, placed
from captum_concepts.attr.origin import origin
from captum_concepts.concepts import embed_texts
from captum_concepts.errors import ArtifactError, InputError, LayerError
from captum_concepts.explanation import ConceptExplanation, Selection
from captum_concepts.images import batches, inputs_for, thumbnails
from captum_concepts.store.build import module_of
from captum_concepts.vlm import check_encoder

_FORMAT = "captum_concepts.DiscoveredConcepts/2"
_LEAST = 0.01  # fraction of the largest variance; weaker principal components are not raised to the others' level
#: Penalty per weight, in standard deviations of an equalized component; it keeps few concepts at each position.
SPARSITY = 0.75
_SEEN = 1000  # maximum number of images that scale the scores and name the concepts
UNNAMED = "unnamed"


@unharming
class DiscoveredConcepts(LayerAttribution):
    r"""Maps, scores and contributions of the concepts that :func:`discover_concepts` found in a layer.

    A concept is a direction :math:`h_k` in the layer's channels. With the mean :math:`m` and the unit :math:`u` (about
    the standard deviation) of each channel over the discovery images, :math:`x_{ij} = (A_{ij} - m) / u`,
    :math:`g_k` the direction :math:`h_k / u` at unit length, and an output :math:`F_c`,

    .. math::
        M_k(i, j) = \max\Bigl(\frac{g_k^T x_{ij}}{\lVert x_{ij} \rVert}, 0\Bigr) \qquad
        S_{k \to c}(i, j) = \max(g_k^T x_{ij}, 0) \; (u \, g_k)^T \frac{\partial F_c}{\partial A_{ij}}

    are the concept maps and the contributions per position. A contribution is, to first order, the decrease in the
    output if the component of the activation along the direction is removed. It is exact if only linear operations
    follow the layer. Directions need not be orthogonal, so contributions of several concepts overlap.

    Args:
        forward_func: the model, one of its methods, or any callable that returns the outputs to explain.
        layer: the layer, as a module or a dotted name.
        directions: ``(K, C)``, scaled to unit length.
        concepts: K unique names.
        center: ``(C,)`` mean activation; None: 0.
        channel_scales: ``(C,)`` unit of each channel; None: 1.
        scales: ``(K,)`` mean of each concept's squared similarity over the discovery images; None: 1.
        name_scores: ``(K,)`` fit of each name (correlation of the concept's score with the encoder's similarity over
            the images), NaN where unnamed; or None.
        explained: fraction of the activations' variance in the span of the directions.
        layout, prefix_tokens: how the layer is read, as in :class:`~captum_concepts.SpatialACV`.
        batch_size: images per forward pass.

    Reference: the factorization of a layer follows deep feature factorization (Collins, Achanta and Suesstrunk, ECCV
    2018, arXiv:1806.10206), with signed directions.
    """

    #: Explaining all concepts costs as much as explaining a few (``audit_dataset`` calls ``explain`` once).
    explains_all_at_once = True

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: Layer,
        directions: Tensor,
        concepts: Sequence[str],
        *,
        center: Tensor | None = None,
        channel_scales: Tensor | None = None,
        scales: Tensor | None = None,
        name_scores: Tensor | None = None,
        explained: float | None = None,
        layout: str = "auto",
        prefix_tokens: int | None = None,
        batch_size: int = 32,
    ) -> None:
        super().__init__(forward_func, layer)
        if not isinstance(directions, Tensor) or directions.ndim != 2 or not bool(directions.isfinite().all()):
            raise InputError("directions must be a tensor (K, C) of finite numbers")
        self.directions = full_precision(directions.detach())
        lengths = self.directions.norm(dim=1, keepdim=True)
        if bool(((lengths - 1).abs() > 1e-6).any()):  # saved directions stay bit-identical
            self.directions = F.normalize(self.directions, dim=1)
        self.concepts = unique_names(concepts, "concept", len(directions))
        width = directions.shape[1]
        self.center = torch.zeros(width) if center is None else center
        if tuple(self.center.shape) != (width,):
            raise InputError(f"center must be a tensor of {width} numbers")
        self.channel_scales = torch.ones(width) if channel_scales is None else channel_scales
        if tuple(self.channel_scales.shape) != (width,) or not bool((self.channel_scales > 0).all()):
            raise InputError(f"channel_scales must be {width} positive numbers")
        self.scales = torch.ones(len(directions)) if scales is None else scales
        self.name_scores = name_scores
        self.explained = explained
        self.layout = layout
        self.prefix_tokens = prefix_tokens
        self.batch_size = integer("batch_size", batch_size)

    def __repr__(self) -> str:
        named = sum(not name.startswith(UNNAMED) for name in self.concepts)
        share = "" if self.explained is None else f", {self.explained:.0%} of the activations' variance"
        layer = Layers.resolve(self.forward_func, self.layer).names[0]
        return f"DiscoveredConcepts(layer {layer!r}, {len(self.concepts)} concepts, {named} named{share})"

    def concept_maps(self, inputs: Any, concepts: Any = None) -> Tensor:
        """``(N, K, h, w)`` similarity of each position to each concept, from 0 to 1."""
        columns = name_positions(concepts, self.concepts)
        return self._each(inputs, None, lambda part, _: self._similar(part)[0][:, columns])

    def scores(self, inputs: Any) -> Tensor:
        """``(N, K)`` fraction of the positions' variation along each concept, relative to the discovery images.

        The fraction is the mean squared similarity over positions; 1 is its average over the discovery images.
        """
        return self._each(inputs, None, lambda part, _: self._similar(part)[1])

    @layer_attribution
    def attribute(
        self,
        inputs: Any,
        target: Any = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
    ) -> Tensor:
        """``(N, K, h, w)`` contributions of each concept at each position to the output ``target``.

        Args:
            inputs: images.
            target: the output, in any form Captum accepts; None selects the predicted one.
            additional_forward_args: passed to ``forward_func`` after the inputs.
            attribute_to_layer_input: must be False, because the directions are those of the layer's output.

        Raises:
            TargetError: the target does not match the outputs.
            LayerError: the output does not depend on the layer.
        """
        if attribute_to_layer_input:
            raise InputError("the directions were discovered in the layer's output; use attribute_to_layer_input=False")
        extra = additional_forward_args
        return self._each(inputs, target, lambda part, goal: self._contributions(part, goal, extra)[0])

    def contributions(self, inputs: Any, target: Any = None, concepts: Any = None) -> Tensor:
        """``(N, K)`` signed contributions, :meth:`attribute` summed over positions, in units of the output."""
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
        """Scores, maps and contributions; see :class:`~captum_concepts.explanation.ConceptExplainer`."""
        n = len(check_images(inputs)[0])
        if rank_by == "contributions" and not contributions:
            raise InputError("rank_by='contributions' requires contributions=True")
        similar, found, moves, outputs = [], [], [], []
        for start in range(0, n, self.batch_size):
            rows = slice(start, start + self.batch_size)
            part, goal = take_rows(inputs, rows, n), _cut(target, rows, n)
            if contributions:
                move, place, score, output = self._contributions(part, goal)
                moves.append(move.sum((2, 3)))
                outputs.append(output)
            else:
                place, score = self._similar(part)
            similar.append(place)
            found.append(score)
        maps, scores = joined(similar), torch.cat(found)
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
            **origin(Layers.resolve(self.forward_func, self.layer)),
            "layout": self.layout,
            "prefix_tokens": self.prefix_tokens,
            "explained": self.explained,
            "named": self.name_scores is not None,
        }
        tensors = {
            "directions": self.directions, "scales": self.scales, "center": self.center,
            "channel_scales": self.channel_scales,
        }  # fmt: skip
        if self.name_scores is not None:
            tensors["name_scores"] = self.name_scores
        return save_artifact(path, _FORMAT, info, tensors)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], forward_func: Callable[..., Any], layer: Layer | None = None
    ) -> DiscoveredConcepts:
        """Load a file that :meth:`save` wrote, for the same model.

        Raises:
            FileNotFoundError: there is no such file.
            ArtifactError: the file is damaged, of another model, or its layer does not exist in this model.
        """
        schema = table(
            {
                "concepts": list_of(text()),
                "layer": text(longest=1000),
                "layout": text(),
                "prefix_tokens": nothing_or(json_number()),
                "explained": nothing_or(json_number()),
                "named": flag,
            },
            {"model": text()},
        )
        arrays = {
            "directions": Array("float", ("K", "C")),
            "center": Array("float", ("C",)),
            "channel_scales": Array("float", ("C",)),
            "scales": Array("float", ("K",)),
            "name_scores": Array("float", ("K",), optional=True),
        }
        Layers.resolve(forward_func, [])  # before the file is read and blamed
        opened = open_artifact(
            path, _FORMAT, "saved concepts of a discovery", info=schema, arrays=arrays,
            sizes=lambda info: {"K": len(info["concepts"])},
        )  # fmt: skip
        with opened as (info, tensors):
            try:
                layers = Layers.resolve(forward_func, info["layer"] if layer is None else layer)
            except LayerError as error:
                raise ArtifactError(f"{path} was saved for a layer that does not exist here: {error}") from error
            if info.get("model") not in (None, origin(layers)["model"]):  # earlier versions did not write it
                raise ArtifactError(
                    f"{path} was saved for another model: class, parameters or dtype of this one differ; discover "
                    "concepts again in it"
                )
            prefix = info["prefix_tokens"]
            return cls(
                forward_func,
                info["layer"] if layer is None else layer,
                tensors["directions"],
                info["concepts"],
                center=tensors["center"],
                channel_scales=tensors["channel_scales"],
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
    def _similar(self, inputs: Any) -> tuple[Tensor, Tensor]:
        return self._read(self._layers().run(inputs).maps[0])[:2]

    def _unit_directions(self) -> Tensor:
        """``(K, C)`` directions in the channels' units."""
        return F.normalize(self.directions / self.channel_scales.to(self.directions), dim=1)

    def _read(self, maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Concept maps, ``(N, K)`` scores and components along the directions, of activations ``(N, C, h, w)``."""
        rows = full_precision(maps.detach())
        if rows.shape[1] != self.directions.shape[1]:
            raise LayerError(f"the directions have {self.directions.shape[1]} entries, but the layer now has "
                             f"{rows.shape[1]} channels")  # fmt: skip
        center, units = self.center.to(rows), self.channel_scales.to(rows)
        rows = (rows - center[:, None, None]) / units[:, None, None]
        along = torch.einsum("nchw,kc->nkhw", rows, self._unit_directions().to(rows)).clamp(min=0).contiguous()
        least = 1e-5 * float((center / units).norm()) + 1e-12  # rounding differences have no similarity
        similar = along / rows.norm(dim=1, keepdim=True).clamp(min=least)
        scales = self.scales.to(similar).clamp(min=torch.finfo(similar.dtype).tiny)
        return similar, similar.square().mean((2, 3)) / scales, along

    def _contributions(self, inputs: Any, target: Any, extra: Any = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Contributions and concept maps per position, scores, and the explained outputs."""
        with gradients_enabled():
            seen = self._layers().run(inputs, additional_forward_args=extra, gradient=True)
            output = output_tensor(seen.output)
            goal = output.detach().argmax(1).tolist() if target is None and output.ndim == 2 else target
            gradient = full_precision(seen.gradients(select_output(output, goal))[0].detach())
        similar, scores, along = self._read(seen.maps[0])
        removed = self._unit_directions().to(gradient) * self.channel_scales.to(gradient)
        moved = along * torch.einsum("nchw,kc->nkhw", gradient, removed)
        count = output.shape[1] if output.ndim == 2 else 1
        chosen = target_indices(0 if goal is None else goal, len(along), count, what="class").to(along.device)
        return moved.detach(), similar, scores, chosen


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
    r"""Discover the concepts that a layer distinguishes, and name them if ``words`` are passed.

    Positions are sampled from all images. Each channel is divided by its standard deviation, and the ``n_concepts``
    leading principal components are scaled to equal variance, so weak features count as much as strong ones. For these
    z, a dictionary of ``n_concepts`` signed directions d with nonnegative weights w minimizes
    :math:`\tfrac12 \lVert z - \sum_k w_k d_k \rVert^2 + \lambda \sum_k w_k`, which leaves few concepts per position.
    The concepts are the directions that best reconstruct the activations from these weights.

    With ``encoder`` and ``words``, each concept is named by the word whose similarity to the images, according to the
    encoder, correlates most with the concept's score over at most 1,000 images. It is called ``"unnamed"`` if this
    correlation does not exceed the 95th percentile, over 200 shuffles of the images, of the highest of any word.

    Args:
        forward_func, layer, layout, prefix_tokens: see :class:`DiscoveredConcepts`.
        images: any source of images, see ``images.inputs_for``.
        n_concepts: number K of concepts.
        encoder: an :class:`~captum_concepts.vlm.ImageTextEncoder`; needs ``words``.
        words: the words to choose names from.
        max_rows: number of positions to sample, the same number from each image and at least one.
        sparsity: :math:`\lambda`, in [0, 1), in standard deviations; higher values leave fewer concepts per position.
        seed: seed of the sample and of the factorization's initialization.
        transform: converts a file or PIL image to the model's input, instead of the model's own preprocessing.
        encoder_transform: converts the model's input to the encoder's; None passes it unchanged.
        batch_size: images per forward pass.
        show_progress: show progress bars.

    Raises:
        InputError: there are too few positions, only one of ``encoder`` and ``words``, or an option is out of range.
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
    integer("seed", seed, None)
    if (encoder is None) != (words is None):
        raise InputError("naming requires both encoder= and words=; pass both")
    if encoder is not None:
        check_encoder(encoder, words=True)
    number("sparsity", sparsity, lambda share: 0 <= share < 1, "in [0, 1)")
    layers = Layers.resolve(forward_func, layer, layout=layout, prefix_tokens=prefix_tokens)
    source = inputs_for(find_model(forward_func) or forward_func, images, transform=transform)
    generator = torch.Generator().manual_seed(seed)
    rows = _sampled_rows(layers, source, max_rows, batch_size, generator, show_progress)
    if len(rows) < n_concepts:
        raise InputError(f"{len(rows)} positions for {n_concepts} concepts; pass more images or fewer concepts")
    center, units = rows.mean(0), rows.std(0, correction=0)
    units = units + 1e-3 * units.square().mean().sqrt() + 1e-12
    directions, explained = factorize((rows - center) / units, n_concepts, generator, sparsity=sparsity)
    made = DiscoveredConcepts(
        forward_func, layer, directions * units, [f"{UNNAMED} {k + 1}" for k in range(n_concepts)], center=center,
        channel_scales=units, explained=explained, layout=layout, prefix_tokens=prefix_tokens, batch_size=batch_size,
    )  # fmt: skip
    part = source.select(range(0, len(source), -(-len(source) // _SEEN)))
    scores, embedded = _shown(made, encoder, encoder_transform, part, batch_size, show_progress)
    made.scales = scores.mean(0)
    if words is not None:
        taught = F.normalize(embed_texts(encoder, unique_names(words, "word")), dim=1)
        made.concepts, made.name_scores = _names(scores, embedded @ taught.T, list(words), generator)
    return made


def factorize(
    rows: Tensor, n_concepts: int, generator: torch.Generator, iterations: int = 40, *, sparsity: float = SPARSITY
) -> tuple[Tensor, float]:
    """``(K, C)`` unit directions of centered rows, and the fraction of their variance in the directions' span.

    The method is alternating coordinate descent (HALS with signed directions) on equalized principal components,
    initialized with rows that are far apart.
    """
    variance, axes = torch.linalg.eigh((rows.T @ rows / len(rows)).double())
    variance, axes = variance[-n_concepts:].clamp(min=0), axes[:, -n_concepts:]
    raised = (variance + _LEAST * variance[-1] + 1e-24).sqrt()
    z = rows @ (axes / raised).to(rows)
    directions = F.normalize(z[_far_apart(z, n_concepts, generator)] + 1e-8, dim=1)
    weights = rows.new_zeros(len(rows), n_concepts)
    for _ in range(iterations):
        descend(weights, directions @ directions.T, z @ directions.T - sparsity, 2)
        gram, cross = weights.T @ weights, weights.T @ z
        for k in range(n_concepts):
            if gram[k, k] <= 0:  # unused, so replaced by a random row
                directions[k] = z[int(torch.randint(len(z), (), generator=generator))]
            else:
                directions[k] += (cross[k] - gram[k] @ directions) / gram[k, k]
            directions[k] = F.normalize(directions[k], dim=0)
    descend(weights, directions @ directions.T, z @ directions.T - sparsity, 20)
    weights = (weights - weights.mean(0)).double()
    back = directions.double() @ (axes * raised).T  # for unused concepts
    ridge = 1e-6 * len(rows)
    gram = weights.T @ weights + ridge * torch.eye(n_concepts, dtype=weights.dtype)
    made = F.normalize(torch.linalg.solve(gram, weights.T @ rows.double() + ridge * back), dim=1)
    span = torch.linalg.svd(made, full_matrices=False)
    span = span.Vh[1e-6 * span.S[0] < span.S].to(rows)
    explained = (rows @ span.T).square().sum() / rows.square().sum().clamp(min=1e-30)
    return made.to(rows), min(float(explained), 1.0)


def descend(weights: Tensor, gram: Tensor, cross: Tensor, sweeps: int) -> Tensor:
    """``(R, K)`` nonnegative weights after coordinate descent on ``w gram w / 2 - cross w`` per row, in place.

    >>> descend(torch.zeros(1, 2), torch.eye(2), torch.tensor([[2.0, -3.0]]), 1)
    tensor([[2., 0.]])
    """
    for _ in range(sweeps):
        for k in range(len(gram)):
            step = (cross[:, k] - weights @ gram[:, k]) / gram[k, k].clamp(min=1e-12)
            weights[:, k] = (weights[:, k] + step).clamp(min=0)
    return weights


def _far_apart(rows: Tensor, count: int, generator: torch.Generator) -> list[int]:
    """Indices of rows of different directions, each drawn by energy times squared cosine distance from the others."""
    unit = F.normalize(rows, dim=1)
    energy = rows.square().sum(1)
    chosen = [int(torch.multinomial(energy.float() + 1e-12, 1, generator=generator))]
    distance = 1 - unit @ unit[chosen[0]]
    for _ in range(count - 1):
        weight = (distance.clamp(min=0).square() * energy).float() + 1e-12
        chosen.append(int(torch.multinomial(weight, 1, generator=generator)))
        distance = torch.minimum(distance, 1 - unit @ unit[chosen[-1]])
    return chosen


@torch.no_grad()
def _sampled_rows(
    layers: Layers, source: Any, max_rows: int, batch_size: int, generator: torch.Generator, show_progress: bool
) -> Tensor:
    """``(R, C)`` activations of sampled positions."""
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
    return torch.cat(found)[:max_rows] if count <= max_rows else torch.cat(found)


@torch.no_grad()
def _shown(
    made: DiscoveredConcepts,
    encoder: Any,
    transform: Callable[[Tensor], Tensor] | None,
    source: Any,
    batch_size: int,
    show_progress: bool,
) -> tuple[Tensor, Tensor]:
    """``(N, K)`` scores of images and, with an encoder, their ``(N, D)`` unit embeddings."""
    from tqdm import tqdm

    model = find_model(made.forward_func)
    scores, embedded = [], [torch.zeros(0)]
    read = batches(source, batch_size)
    for batch in tqdm(read, desc="scores", total=-(-len(source) // batch_size), disable=not show_progress):
        images = placed(batch.images, model)
        scores.append(made._similar(images)[1].cpu())
        if encoder is not None:
            shown = batch.images.to(images.device)  # the encoder may use another dtype than the model
            shown = shown if transform is None else transform(shown)
            with evaluation_mode(module_of(encoder)):
                embedded.append(encoder.encode_image(shown.clone()).detach().float().cpu())
    return torch.cat(scores), F.normalize(torch.cat(embedded[1:] or embedded), dim=-1)


def _names(
    scores: Tensor, similarity: Tensor, words: list[str], generator: torch.Generator
) -> tuple[list[str], Tensor]:
    """A unique name for each concept, and its correlation with the word (NaN if unnamed)."""
    found, taught = _standardized(scores), _standardized(similarity)
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
    return target[rows] if one_target_each(target) and len(target) == n else target
