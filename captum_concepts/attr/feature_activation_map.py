"""Feature Activation Map: class activation maps for models without a classifier head."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from captum_concepts._artifacts import (
    Array,
    either,
    flag,
    integer as whole_number,
    list_of,
    nothing_or,
    open_artifact,
    save_artifact,
    table,
    text,
)
from captum_concepts._captum import LayerAttribution, layer_attribution, target_indices
from captum_concepts._checks import finite_images, integer, one_of, unique_names, warn_of_numbers
from captum_concepts._memory import Halving
from captum_concepts._undo import unharming, warnings_filtered, watching
from captum_concepts.activations import (
    LAYOUTS,
    Inputs,
    Layer,
    Layers,
    SpatialActivations,
    check_images,
    evaluation_mode,
    find_model,
    forward_arguments,
    full_precision,
    gradients_enabled,
    input_errors,
)
from captum_concepts.activations.capture import copied
from captum_concepts.attr import refinement
from captum_concepts.attr.batches import (
    as_inputs,
    count,
    each_batch,
    image_names,
    joined,
    opened,
    placed,
)
from captum_concepts.attr.origin import check_origin, origin
from captum_concepts.attr.refinement import Refine
from captum_concepts.errors import InputError, InputWarning, NotFittedError, listing
from captum_concepts.explanation import ConceptExplanation, Selection
from captum_concepts.images import ImageSource, batches, class_name, thumbnails
from captum_concepts.solvers import Calibration, fit_calibration, truth_table

NORMALIZE = ("minmax", "l1", "none")
WEIGHTS = ("contribution", "gradient")
_SETTINGS = ("similarity", "normalize", "weights", "layout", "prefix_tokens", "batch_size")
_FORMAT = "captum_concepts.FeatureActivationMap/1"
_INFO = table({
    "names": nothing_or(list_of(text())),
    "layer": text(),
    "model": text(),
    "settings": table({
        "similarity": text(),
        "normalize": text(*NORMALIZE),
        "weights": text(*WEIGHTS),
        "layout": text(*LAYOUTS),
        "prefix_tokens": nothing_or(whole_number()),
        "batch_size": whole_number(1),
    }, {"refine": either(flag, list_of(text()))}),
})  # fmt: skip
_ARRAYS = {
    "references": Array("float", ("K", None)),
    "slopes": Array("float", ("K",), optional=True),
    "intercepts": Array("float", ("K",), optional=True),
}

# ------------------------------------------------------------------------------------------------------- similarities


@dataclass(frozen=True)
class SimilarityRule:
    r"""A similarity s of embeddings f to references r, with its derivative.

    Args:
        scores: maps embeddings ``(N, D)`` and the bank ``(K, D)`` to ``(N, K)``.
        slope: maps embeddings and one reference each, ``(N, D)``, to :math:`\partial s / \partial f` at constant norms.
        unit: display name of the unit of the scores.
        shares: ``(N, D)`` contribution of each dimension to s; None: :math:`f \, \partial s / \partial f`.
        free_of_length: s depends only on the direction of f.
    """

    scores: Callable[[Tensor, Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]
    unit: str
    shares: Callable[[Tensor, Tensor], Tensor] | None = None
    free_of_length: bool = False


def _unit(rows: Tensor) -> Tensor:
    return rows / _length(rows)


def _length(rows: Tensor) -> Tensor:
    return rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)


#: All similarities by name.
SIMILARITIES: Mapping[str, SimilarityRule] = {
    "cosine": SimilarityRule(
        scores=lambda f, bank: _unit(f) @ _unit(bank).T,
        slope=lambda f, r: _unit(r) / _length(f),
        unit="cosine",
        free_of_length=True,
    ),
    "dot": SimilarityRule(scores=lambda f, bank: f @ bank.T, slope=lambda _, r: r, unit="dot product"),
    "euclidean": SimilarityRule(
        # The expanded form |f|^2 - 2 f.r + |r|^2 cancels badly for near pairs, whose maps matter most.
        scores=lambda f, bank: -torch.stack([(f - row).square().sum(1) for row in bank], 1),
        slope=lambda f, r: -2 * (f - r),
        unit="negative squared distance",
        shares=lambda f, r: -(f - r).square(),
    ),
}
Similarity = str | Callable[[Tensor, Tensor], Tensor]


def _rule_of(function: Callable[[Tensor, Tensor], Tensor]) -> SimilarityRule:
    """The rule of a user-defined function of two ``(N, D)`` tensors, differentiated by autograd."""

    def values(f: Tensor, r: Tensor) -> Tensor:
        found = function(f, r)
        if not isinstance(found, Tensor) or found.shape != f.shape[:1]:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise InputError(
                f"the similarity function must turn two ({len(f)}, {f.shape[1]}) tensors into one value per pair, "
                f"({len(f)},), but returned {shape}"
            )
        return found

    def slope(f: Tensor, r: Tensor) -> Tensor:
        point = f.detach().requires_grad_()
        found = values(point, r)
        if not found.requires_grad:
            raise InputError(
                "the similarity function must be differentiable with respect to its first argument, but it is constant"
            )
        return torch.autograd.grad(found.sum(), point)[0]

    def scores(f: Tensor, bank: Tensor) -> Tensor:
        return torch.stack([values(f, row.expand_as(f)) for row in bank], 1)

    return SimilarityRule(scores, slope, getattr(function, "__name__", type(function).__name__))


# -------------------------------------------------------------------------------------- one forward pass, and its norm


class _Rows(TorchFunctionMode):
    """Copies, in order, of all tensors with one row per example that the model computes from the layer.

    ``eps`` is that of the coarsest dtype the model computes from the layer. A single-precision model may round to half
    precision internally (autocast), and a half-precision model may return single precision.
    """

    def __init__(self, examples: int) -> None:
        super().__init__()
        self.examples = examples
        self.found: list[tuple[Tensor, Any]] = []
        self.eps = 0.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor) and value.requires_grad and value.is_floating_point():
                self.eps = max(self.eps, torch.finfo(value.dtype).eps)
                sizes = [size for size in value.shape if size != 1]
                if len(sizes) == (1 if self.examples == 1 else 2) and (self.examples == 1 or self.examples in sizes):
                    self.found.append((value.clone(), value.grad_fn))  # a later operation may overwrite it
        return result

    def like(self, embedding: Tensor, output: Tensor | None = None) -> list[Tensor]:
        """Copies of the embedding's size, as ``(N, D)``; with ``output``, only those that it was computed from."""
        used = None if output is None else _graph(output)
        rows = []
        for value, node in self.found:
            if used is not None and node not in used:
                continue
            flat = value.squeeze() if self.examples > 1 else value.reshape(1, -1)
            flat = flat.unsqueeze(-1) if flat.ndim == 1 else flat
            rows += [one for one in (flat, flat.T) if one.shape == embedding.shape]
        return rows


def _graph(output: Tensor) -> set[Any]:
    """The autograd nodes that a tensor was computed with."""
    seen, open_ = set(), [output.grad_fn]
    while open_:
        node = open_.pop()
        if node is not None and node not in seen:
            seen.add(node)
            open_ += [other for other, _ in node.next_functions]
    return seen


@dataclass(frozen=True)
class _Pass:
    """One forward pass.

    Args:
        maps: ``(N, C, h, w)`` of the layer; ``embedding`` is ``(N, D)``; both in full precision, detached.
        seen: the activations that the embedding is differentiated with respect to.
        point: ``(N, D)``, differentiable; ``point * factor`` is the embedding, where ``factor`` ``(N, 1)`` is constant.
        pooled: ``(N, 1)`` ratio of the embedding to the mean of the maps; None if they are not parallel.
        channelwise: ``(N,)`` bool: dimension k of the embedding depends on channel k alone.
    """

    maps: Tensor
    embedding: Tensor
    seen: SpatialActivations
    point: Tensor
    factor: Tensor
    pooled: Tensor | None
    channelwise: Tensor

    def gradients(self, slope: Tensor, numbers: Sequence[int]) -> tuple[Tensor, ...]:
        """``(N, C, h, w)`` derivatives of ``(embedding * slope).sum()`` for some of the layers."""
        seed = (slope * self.factor).to(self.point)
        seen = refinement.only(self.seen, numbers)
        return tuple(map(full_precision, seen.gradients(self.point * seed, retain_graph=True)))

    def gradient(self, slope: Tensor) -> Tensor:
        """The derivative for the explained layer."""
        return self.gradients(slope, (0,))[0]


def _forward(layers: Layers, inputs: Inputs, extra: Any, of_input: bool, rule: SimilarityRule, exact: bool) -> _Pass:
    """Run the model and choose the tensor at which the similarity is differentiated.

    The cosine depends only on the direction of the embedding, so it is differentiated at the first tensor that has
    this direction, regardless of how the model normalizes it afterwards. Other similarities depend on the length, so
    the norm is held constant only where the model itself makes it constant.

    Args:
        layers: the explained layer, and the stages of a refinement.
        exact: differentiate at the output itself (a user-defined similarity).
    """
    check_images(inputs)
    examples = count(inputs)
    rows = _Rows(examples)
    with watching(rows):
        seen = layers.run(inputs, additional_forward_args=extra, gradient=True, attribute_to_layer_input=of_input)
    output = embedding_of(seen.output)
    maps, embedding = full_precision(seen.maps[0].detach()), full_precision(output.detach())
    eps = max(rows.eps, *(torch.finfo(part.dtype).eps for part in (seen.raw[0], output)))
    coarse = eps > 1e-5
    tolerance = 1e-2 if coarse else 1e-5 if eps > 1e-12 else 1e-9
    one = torch.ones_like(embedding[:, :1])
    at_output = _Pass(maps, embedding, seen, output, one, None, one[:, 0] < 0)
    if exact:
        return at_output
    # In half precision, nearly uniform attention looks like a mean, although its gradient differs.
    known = None if coarse else _mean_pool_factor(maps, embedding, tolerance, any_length=rule.free_of_length)
    if known is not None and len(layers) == 1:
        return replace(at_output, pooled=known, channelwise=one[:, 0] > 0)
    like = rows.like(embedding, output if coarse else None)
    found = next((row for row in like if _parallel(row, embedding, tolerance)), output)
    factor = _factor(embedding, full_precision(found.detach()))
    held = replace(at_output, point=found, factor=factor)
    rescaled = bool(((factor - 1).abs() > tolerance).any())
    if rescaled and not rule.free_of_length:
        constant = _length_is_constant(at_output, held, eps)[:, None]
        held = replace(at_output, point=torch.where(constant, (found * factor).to(output), output))
    if not rescaled and rule.free_of_length and _hides_its_norm(at_output):
        warnings.warn(
            "the embedding is normalized inside a part of the model whose operations cannot be observed (traced or "
            "custom code), so its contributions sum to 0 instead of the cosine. Pass a forward_func that returns the "
            "embedding before normalization",
            InputWarning,
            stacklevel=3,
        )
    if rule.shares is not None and maps.shape[1] == embedding.shape[1]:
        held = replace(held, channelwise=_channelwise(held, tolerance, coarse))
    return held


def _factor(one: Tensor, other: Tensor) -> Tensor:
    """``(N, 1)`` factors by which ``other`` comes closest to ``one``."""
    tiny = torch.finfo(other.dtype).tiny
    return (one * other).sum(1, keepdim=True) / other.square().sum(1, keepdim=True).clamp_min(tiny)


def _parallel(row: Tensor, embedding: Tensor, tolerance: float) -> bool:
    values = full_precision(row.detach())
    off = (embedding - _factor(embedding, values) * values).norm(dim=1)
    return bool(((off <= tolerance * embedding.norm(dim=1)) | _undefined(embedding)).all())


def _undefined(embedding: Tensor) -> Tensor:
    """``(N,)`` bool: embeddings that are not finite, which decide nothing about the other images."""
    return ~embedding.isfinite().all(1)


def _mean_pool_factor(maps: Tensor, embedding: Tensor, tolerance: float, *, any_length: bool) -> Tensor | None:
    """``(N, 1)`` factors a with f = a z for the mean z of the maps, or None; only 1 or 1/|z| unless ``any_length``."""
    if maps.shape[1] != embedding.shape[1]:
        return None
    z = maps.mean((2, 3))
    if not _parallel(z, embedding, tolerance):
        return None
    factor = _factor(embedding, z)
    one, inverse = torch.ones_like(factor), 1 / _length(z)
    known = torch.isclose(factor, one, rtol=10 * tolerance) | torch.isclose(factor, inverse, rtol=10 * tolerance)
    return factor if any_length or bool((known | _undefined(embedding)[:, None]).all()) else None


def _length_is_constant(at_output: _Pass, held: _Pass, eps: float) -> Tensor:
    """``(N,)`` bool: whether the embedding's length is independent of the layer, up to the rounding of gradients."""
    return _influence(at_output, at_output.embedding) <= max(1e-3, 16 * eps) * _influence(held, held.embedding)


def _hides_its_norm(run: _Pass) -> bool:
    """Whether embeddings have length 1 and the layer changes their direction but not their length."""
    if bool(((run.embedding.norm(dim=1) - 1).abs() > 1e-2).any()):
        return False
    signs = torch.ones_like(run.embedding)
    signs[:, ::2] = -1
    length, direction = _influence(run, run.embedding), _influence(run, signs * run.embedding)
    return bool(((length <= 1e-3 * direction) & (direction > 0)).any())


def _influence(run: _Pass, slope: Tensor) -> Tensor:
    """``(N,)`` influence of the layer's activations on ``(embedding * slope).sum()``."""
    with warnings_filtered("ignore", InputWarning):  # a gradient of zero is valid here
        return (run.gradient(slope) * run.maps).abs().sum((1, 2, 3))


def _channelwise(run: _Pass, tolerance: float, coarse: bool) -> Tensor:
    """``(N,)`` bool: dimension k of the embedding depends on channel k alone (mean, maximum, GeM pooling).

    If so, and with probability 1 only if so, random weights w of the dimensions scale the gradient at channel k by
    :math:`w_k`. In half precision, the weights are drawn four times from ±1 and ±2, which cause no rounding.
    """
    generator = torch.Generator().manual_seed(0)
    width = run.embedding.shape[1]
    plain = run.gradient(torch.ones_like(run.embedding))
    found = torch.ones(len(plain), dtype=torch.bool, device=plain.device)
    for _ in range(4 if coarse else 1):
        if coarse:
            weights = torch.tensor([-2, -1, 1, 2])[torch.randint(4, (width,), generator=generator)]
        else:
            weights = torch.rand(width, generator=generator, dtype=torch.float64) + 0.5
        weights = weights.to(run.embedding)
        weighted = run.gradient(weights.expand_as(run.embedding))
        off = (weighted - plain * weights[:, None, None]).abs().amax((1, 2, 3))
        found &= off <= (1e-4 if coarse else 10 * tolerance) * plain.abs().amax((1, 2, 3))
    return found


def embedding_of(output: Any) -> Tensor:
    """A model's output as ``(N, D)`` embeddings; trailing dimensions of size 1 are dropped.

    Raises:
        InputError: the output is not such a tensor.
    """
    if isinstance(output, Tensor) and output.ndim > 2 and all(size == 1 for size in output.shape[2:]):
        output = output.flatten(1)
    if not isinstance(output, Tensor) or output.ndim != 2:
        what = f"a tensor {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise InputError(
            f"forward_func must return one embedding per image, (N, D), but it returns {what}; pass the part of the "
            "model that returns the embedding (model.encode_image for CLIP, or a function that selects it)"
        )
    return output


def normalized(contribution: Tensor, how: str) -> Tensor:
    """Each example's normalized contributions; with min-max, equal contributions become 1, or 0 if they are 0."""
    if how == "none":
        return contribution
    if how == "l1":
        return contribution / contribution.abs().sum(1, keepdim=True).clamp_min(torch.finfo(contribution.dtype).tiny)
    low, high = contribution.amin(1, keepdim=True), contribution.amax(1, keepdim=True)
    return torch.where(high > low, (contribution - low) / (high - low), (contribution != 0).to(contribution))


# ----------------------------------------------------------------------------------------------------------- the method


@unharming
class FeatureActivationMap(LayerAttribution):
    r"""Maps of where the similarity between an image and a reference embedding comes from (Feature Activation Map).

    FAM explains models without a classifier head, such as few-shot, contrastive, retrieval and vision-language models.
    With the layer's maps :math:`A_k`, the embedding :math:`f = T(A)` and a reference :math:`r`, the contribution of
    channel k to the similarity :math:`s(f, r)` is

    .. math:: c_k = \sum_{ij} A_{kij} \, \frac{\partial s(f, r)}{\partial A_{kij}}

    with the norms of the cosine held constant, wherever the model divides by them. If T pools by mean, maximum or GeM,
    this equals :math:`z_k \, \partial s / \partial z_k` of the pooled z. If f is the mean z itself, it equals
    :math:`z_k r_k / (|f| |r|)` and needs no backward pass. For euclidean, if dimension k of f depends on channel k
    alone, it is :math:`c_k = -(f_k - r_k)^2`. The map is :math:`M = \sum_k w_k A_k`.

    Args:
        forward_func: maps images to embeddings ``(N, D)``: a model, one of its methods, or any callable.
        layer: the layer to read maps from, as a module or a dotted name; usually the last with a grid.
        references: ``(K, D)`` bank of class prototypes (see :meth:`fit`), gallery items or text embeddings.
        reference_names: K unique names; ``target`` may then be a name. None uses "0", "1", ...
        similarity: ``"cosine"``, ``"dot"``, ``"euclidean"`` (:math:`-|f - r|^2`) or a differentiable function of
            two ``(N, D)`` tensors that returns ``(N,)``. A norm that the model itself divides by is held constant
            for the first three.
        normalize: normalization of each example's contributions: ``"minmax"`` to [0, 1] (as in the paper), ``"l1"``
            (signed, divided by the sum of absolute values) or ``"none"``. With ``"minmax"``, maps of different
            references are not comparable.
        weights: ``"contribution"`` (as in the paper) uses the normalized c as w, and ``"gradient"`` uses
            :math:`\partial s / \partial z_k` without normalization. With mean pooling, a linear T without
            bias, and cosine or dot, the mean of the gradient-weighted map over positions equals the similarity.
        refine: False returns the published map; True, or a list of layers, returns a sharper one (see below).
        layout: ``"auto"``, ``"NCHW"``, ``"NHWC"``, ``"NLC"`` or ``"LNC"``.
        prefix_tokens: number of tokens before the grid; None infers it.
        batch_size: maximum number of images per forward pass. It affects results only by rounding.

    The published map weights whole channels of one layer. With ``refine=True``, each position of each stage of the
    network up to the layer has its own signed evidence, :math:`e = \sum_k (A_k - A^0_k) \, \partial (s_r -
    \tfrac{1}{2} \bar s) / \partial A_k`. It is measured relative to an image without content (each image's mean color),
    and half of the evidence for the other likely references (:math:`\bar s`) is subtracted. The positive evidence of
    all stages, weighted equally, then spreads along the network's feature affinity and the image's colors, as in
    ``ConceptFusionMap(map_layer="fused")``. Refined maps are in [0, 1], on a grid of up to 1,024 positions, and ignore
    ``normalize`` and ``weights``. They cost a second forward pass, and one backward pass through the network per
    reference. A list names the stages explicitly. ``docs/methods/fam.md`` compares both maps with baselines.

    Raises:
        InputError: an option does not exist, or the names do not match the references.

    Reference:
        Liao, Y., Gao, Y., Zhang, W. *Feature Activation Map: Visual Explanation of Deep Learning Models for Image
        Classification.* arXiv:2307.05017, 2023.

    Example:
        >>> from captum_concepts import FeatureActivationMap
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        >>> images = torch.rand(4, 3, 16, 16)
        >>> fam = FeatureActivationMap(net, "0").fit(images, labels=["cat", "cat", "dog", "dog"])
        >>> fam
        FeatureActivationMap of Sequential, layer '0', cosine to 2 references: 'cat', 'dog'; not calibrated
        >>> fam.attribute(images, target="dog").shape
        torch.Size([4, 1, 14, 14])
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: Layer,
        references: Tensor | None = None,
        *,
        reference_names: Sequence[str] | None = None,
        similarity: Similarity = "cosine",
        normalize: str = "minmax",
        weights: str = "contribution",
        refine: Refine = False,
        layout: str = "auto",
        prefix_tokens: int | None = None,
        batch_size: int = 32,
    ) -> None:
        super().__init__(forward_func, layer)
        one_of("normalize", normalize, NORMALIZE)
        one_of("weights", weights, WEIGHTS)
        if not callable(similarity):
            one_of("similarity", similarity, tuple(SIMILARITIES), "or a function")
        if reference_names is not None:
            unique_names(reference_names, "reference", None if references is None else len(references))
        self.references = references
        self.reference_names = reference_names
        self.similarity = similarity
        self.normalize = normalize
        self.weights = weights
        self.refine = refinement.checked(refine)
        self._stages: dict[Any, list[str]] = {}  # cached per network
        self.layout = layout
        self.prefix_tokens = prefix_tokens
        self.batch_size = integer("batch_size", batch_size)
        self.calibration: Calibration | None = None

    def __repr__(self) -> str:
        model = find_model(self.forward_func)
        name = type(model).__name__ if model is not None else getattr(self.forward_func, "__name__", "a function")
        count = "no references" if self.references is None else f"{len(self.references)} references"
        names = "" if self.reference_names is None else f": {listing(self.concepts)}"
        layer = self._layers().names[0]
        trust = "not calibrated" if self.calibration is None else "calibrated"
        return f"FeatureActivationMap of {name}, layer {layer!r}, {self._rule().unit} to {count}{names}; {trust}"

    @property
    def concepts(self) -> list[str]:
        """The names of the references."""
        count = 0 if self.references is None else len(self.references)
        return [str(k) for k in range(count)] if self.reference_names is None else list(self.reference_names)

    @layer_attribution
    def attribute(
        self,
        inputs: Any,
        target: Any = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
    ) -> Tensor:
        """The map of each example's similarity to its target reference.

        Args:
            inputs: images ``(N, 3, H, W)`` as ``forward_func`` takes them, or a tuple of tensors.
            target: index or name of the reference to explain, or one per example (1-d tensor or list).
                None explains each example's most similar reference; ``torch.arange(N)`` explains pairs.
            additional_forward_args: passed to ``forward_func`` after the inputs.
            attribute_to_layer_input: read the layer's input instead of its output.

        Returns:
            ``(N, 1, h, w)`` in the layer's grid, fp32 (or fp64); resize it with ``LayerAttribution.interpolate``.

        Raises:
            TargetError: the target has the wrong type, length or range (also an ``AssertionError``).
            LayerError: the layer is unknown, not reached or repeated, has no grid, or its positions do not
                influence the embedding.
        """
        layers, rule, exact = self._layers(), self._rule(), callable(self.similarity)
        inputs = as_inputs(inputs, layers.model)
        layers = refinement.with_stages(layers, self.refine, self._stages, inputs, additional_forward_args)
        index = self._index(target, count(inputs))

        def maps(part: Inputs, extra: Any, goal: Tensor | None) -> Tensor:
            with gradients_enabled():
                run = _forward(layers, part, extra, attribute_to_layer_input, rule, exact)
                bank = self._bank(run.embedding)
                scores = rule.scores(run.embedding, bank).detach()
                best = scores.argmax(1) if goal is None else goal.to(bank.device)
                return self._maps(layers, run, bank, scores, best[:, None], part, extra, attribute_to_layer_input)

        return joined(self._each(maps, inputs, additional_forward_args, index)).contiguous()

    def scores(self, inputs: Any, additional_forward_args: Any = None) -> Tensor:
        """``(N, K)`` similarities to the references: cosine in [-1, 1], euclidean in (-inf, 0]."""
        rule = self._rule()

        def score(part: Inputs, extra: Any, _target: None) -> Tensor:
            embedding = self._embed(part, extra)
            return rule.scores(embedding, self._bank(embedding)).detach()

        return torch.cat(self._each(score, inputs, additional_forward_args, None))

    def concept_maps(self, inputs: Any, concepts: Any = None, additional_forward_args: Any = None) -> Tensor:
        """``(N, T, h, w)``: the map of each reference.

        Args:
            inputs: images.
            concepts: names or indices of references; None selects all.
            additional_forward_args: passed to ``forward_func`` after the inputs.
        """
        return self._explain(
            self._layers(), inputs, self.concepts if concepts is None else concepts, None, additional_forward_args
        )[2]

    def explain(
        self,
        inputs: Any,
        target: Any = None,
        *,
        concepts: Any = None,
        top_k: int | None = 5,
        rank_by: str = "scores",
        contributions: bool = True,  # noqa: ARG002
        additional_forward_args: Any = None,
    ) -> ConceptExplanation:
        """Scores and maps of the references most similar to each image.

        Args:
            inputs: images as tensors, or anything :func:`captum_concepts.images.inputs_for` reads: a folder, paths, PIL
                images, a data set, a loader.
            target: recorded as the explained reference; None records each image's most similar reference.
            concepts: names or indices of references to explain instead of the most similar.
            top_k: number of references selected for each image; None selects all. Only their maps are computed.
            rank_by: must be ``"scores"``, because a similarity has no contributions to a class.
            contributions: ignored; part of the common signature of all methods.
            additional_forward_args: passed to ``forward_func`` after the inputs.

        Returns:
            Scores ``(N, T)`` and maps ``(N, T, h, w)`` of the T references selected for at least one image.
        """
        if rank_by != "scores":
            one_of("rank_by", rank_by, ("scores",))
        inputs = as_inputs(inputs, find_model(self.forward_func))
        layers = self._layers()
        chosen, scores, maps, best = self._explain(layers, inputs, concepts, top_k, additional_forward_args)
        index = self._index(target, len(scores))
        return ConceptExplanation(
            [self.concepts[k] for k in chosen.columns],
            scores[:, chosen.columns],
            chosen.spread(maps),
            target=best if index is None else index.to(best.device),
            presence=None if self.calibration is None else self.calibration(scores)[:, chosen.columns],
            selected=chosen.selected.to(scores.device),
            class_names=self.concepts,
            image_names=image_names(inputs),
            layer=layers.names[0],
            method=self.get_name(),
            score_unit=self._rule().unit,
            rank_by=chosen.rank_by,
            pictures=thumbnails(inputs),
        )

    def fit(
        self,
        images: Any,
        labels: Any = None,
        *,
        transform: Callable[[Any], Any] | None = None,
        image_size: int | None = None,
        show_progress: bool = False,
    ) -> FeatureActivationMap:
        """Set the references to class prototypes, the mean embedding of each class (Snell et al., 2017).

        Args:
            images: anything :func:`captum_concepts.images.open_images` reads: a tensor ``(n, 3, H, W)``, a list, a
                folder with one folder per class, a data set or a loader of ``(image, label)``. Float tensors are
                passed to the model unchanged.
            labels: one per image, integers or names; None uses those of the data set or the folders.
            transform: converts a PIL image to a tensor, for files and PIL images. None reads them at the model's input
                size, normalized if the model's library specifies how, else in [0, 1].
            image_size: size of files without ``transform``; None uses the model's, else 224.
            show_progress: show a progress bar.

        Returns:
            The same object, with ``references`` ``(K, D)`` and ``reference_names`` in sorted order of the labels.

        Raises:
            InputError: labels are missing or not one per image, or an embedding is NaN (the message names the image).
        """
        model = find_model(self.forward_func)
        source = opened(images, model, labels=labels, transform=transform, image_size=image_size)
        sums: dict[Any, Tensor] = {}
        counts: dict[Any, int] = {}
        for label, row in self._labeled_embeddings(source, show_progress):
            sums[label] = sums[label] + row if label in sums else row.clone()
            counts[label] = counts.get(label, 0) + 1
        ordered = sorted(sums)
        names = source.class_names
        warn_of_numbers(ordered if names is None else [])
        self.reference_names = [str(label) if names is None else class_name(label, names) for label in ordered]
        self.references = torch.stack([sums[label] / counts[label] for label in ordered])
        self.calibration = None
        return self

    def calibrate(
        self,
        images: Any,
        labels: Any,
        *,
        transform: Callable[[Any], Any] | None = None,
        image_size: int | None = None,
    ) -> FeatureActivationMap:
        """Fit the probability that an image shows a reference's class, given its score, on labeled images.

        Explanations then report this probability as ``presence``. Use other images than those of :meth:`fit`.

        Args:
            images: anything :func:`captum_concepts.images.open_images` reads.
            labels: for each image a reference (name or index), a list of them, or None for no reference; or a bool
                tensor ``(n, K)``.
            transform, image_size: as in :meth:`fit`.

        Returns:
            The same object. :meth:`save` includes the calibration.
        """
        model = find_model(self.forward_func)
        source = opened(images, model, transform=transform, image_size=image_size)
        scores = self.scores(source)
        finite_images(scores, range(len(scores)), "the score")
        self.calibration = fit_calibration(scores, truth_table(labels, self.concepts, len(scores)))
        return self

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write references, names, options, calibration and the model's fingerprint to one file, atomically.

        Raises:
            NotFittedError: there are no references.
            InputError: the similarity is a function, which cannot be saved.
        """
        if self.references is None:
            raise NotFittedError("there are no references to save; pass references=(K, D), or call fit(images, labels)")
        if not isinstance(self.similarity, str):
            raise InputError("a similarity function cannot be saved; save the references and construct the map in code")
        tensors = {"references": self.references}
        if self.calibration is not None:
            tensors |= {"slopes": self.calibration.slopes, "intercepts": self.calibration.intercepts}
        layers = self._layers()
        info = {
            "names": None if self.reference_names is None else list(self.reference_names),
            **origin(layers),
            "settings": {
                **{name: getattr(self, name) for name in _SETTINGS},
                "refine": refinement.names(self.refine, layers),
            },
        }
        return save_artifact(path, _FORMAT, info, tensors)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], forward_func: Callable[..., Any], layers: Layer | None = None
    ) -> FeatureActivationMap:
        """Load a file that :meth:`save` wrote.

        Args:
            path: the file.
            forward_func: the model that computed the references.
            layers: the layer; None uses the name in the file.

        Raises:
            FileNotFoundError: there is no such file.
            ArtifactError: the file is damaged, or was saved for another model.
        """
        opened = open_artifact(path, _FORMAT, "a saved FeatureActivationMap", info=_INFO, arrays=_ARRAYS)
        with opened as (info, tensors):
            layer = info["layer"] if layers is None else layers
        bank, names = tensors["references"], info["names"]
        loaded = check_origin(
            path, lambda: cls(forward_func, layer, bank, reference_names=names, **info["settings"]), info
        )
        if "slopes" in tensors:
            loaded.calibration = Calibration(tensors["slopes"], tensors["intercepts"])
        return loaded

    # -------------------------------------------------------------------------------------------------------- inside

    def _layers(self) -> Layers:
        return Layers.resolve(self.forward_func, self.layer, layout=self.layout, prefix_tokens=self.prefix_tokens)

    def _rule(self) -> SimilarityRule:
        return SIMILARITIES[self.similarity] if isinstance(self.similarity, str) else _rule_of(self.similarity)

    def _each(self, run: Callable[[Inputs, Any, Any], Any], inputs: Any, extra: Any, target: Any) -> list[Any]:
        model = find_model(self.forward_func)
        return each_batch(run, as_inputs(inputs, model), extra, target, self.batch_size, model)

    def _index(self, target: Any, n: int) -> Tensor | None:
        if target is None or self.references is None:
            return None
        return target_indices(target, n, len(self.references), self.reference_names or (), what="reference")

    def _labeled_embeddings(self, source: ImageSource, show_progress: bool) -> Iterator[tuple[Any, Tensor]]:
        from tqdm import tqdm

        halving = Halving("batch_size")
        with tqdm(desc="images", unit="img", disable=not show_progress) as bar:
            for batch in batches(source, self.batch_size):
                if batch.labels is None:
                    raise InputError(
                        "labels are missing; pass labels=, or a folder, data set or loader that includes them"
                    )
                images = placed(batch.images, find_model(self.forward_func))
                parts = halving(lambda part: self._embed(part, None), images, lambda part: part.chunk(2))
                embeddings = torch.cat(parts)
                finite_images(embeddings, batch.names, "the embedding")
                yield from zip(batch.labels, embeddings, strict=True)
                bar.update(len(batch))

    @torch.no_grad()
    def _embed(self, inputs: Inputs, extra: Any) -> Tensor:
        model, arguments = find_model(self.forward_func), (*check_images(inputs), *forward_arguments(extra))
        with evaluation_mode(model), input_errors(arguments, None if model is None else model.modules()):
            output = self.forward_func(*copied(arguments))
        return full_precision(embedding_of(output))

    def _bank(self, embedding: Tensor) -> Tensor:
        """The validated references ``(K, D)`` on the embedding's device."""
        references = self.references
        if references is None:
            raise NotFittedError(
                "there are no references to compare with; pass references=(K, D), or call fit(images, labels)"
            )
        shape = tuple(references.shape) if isinstance(references, Tensor) else type(references).__name__
        if not isinstance(references, Tensor) or references.ndim != 2 or not references.is_floating_point():
            raise InputError(f"references must be a floating-point tensor (K, D), got {shape}")
        if not len(references):
            raise InputError("references is empty; pass at least one reference embedding")
        if references.shape[1] != embedding.shape[1]:
            raise InputError(
                f"references have width {references.shape[1]}, but forward_func returns embeddings of width "
                f"{embedding.shape[1]}; compute them with the same model, up to the same layer"
            )
        bank = references.detach().to(embedding)
        if not bank.isfinite().all():
            raise InputError(f"references contain NaN or infinite values in rows {_rows(~bank.isfinite().all(1))}")
        if self._rule().free_of_length and not bank.any(1).all():
            raise InputError(
                f"references rows {_rows(~bank.any(1))} are all zero and have no direction to compare; remove them"
            )
        return bank

    def _explain(
        self, layers: Layers, inputs: Any, concepts: Any, top_k: int | None, extra: Any
    ) -> tuple[Selection, Tensor, Tensor, Tensor]:
        """The selection per image, all scores ``(N, K)``, maps ``(N, k, h, w)`` of the selected, the best per image."""
        rule, names = self._rule(), self.concepts
        layers = refinement.with_stages(layers, self.refine, self._stages, as_inputs(inputs, layers.model), extra)

        def part(images: Inputs, more: Any, _target: None) -> tuple[Tensor, Tensor]:
            with gradients_enabled():
                run = _forward(layers, images, more, False, rule, callable(self.similarity))
                bank = self._bank(run.embedding)
                scores = rule.scores(run.embedding, bank).detach()
                index = Selection.choose(names, scores, concepts=concepts, top_k=top_k).index.to(bank.device)
                return scores, self._maps(layers, run, bank, scores, index, images, more, False)

        scores, maps = map(joined, zip(*self._each(part, inputs, extra, None), strict=True))
        return Selection.choose(names, scores, concepts=concepts, top_k=top_k), scores, maps, scores.argmax(1)

    def _maps(
        self, layers: Layers, run: _Pass, bank: Tensor, scores: Tensor, index: Tensor, inputs: Inputs, extra: Any,
        of_input: bool,
    ) -> Tensor:  # fmt: skip
        """``(N, J, h, w)`` maps of the references ``index`` ``(N, J)``."""
        if self.refine is False:
            return torch.stack([self._map(run, bank[column]) for column in index.T], 1)
        sharper = refinement.prepare(layers, run.seen, inputs, extra, of_input)
        rule, found = self._rule(), []
        slopes = [rule.slope(one.expand(len(bank), -1), bank) for one in run.embedding.split(1)]  # (K, D) each
        for column in index.T:
            weights = refinement.contrast(scores, column)
            slope = torch.stack([weight @ each for weight, each in zip(weights, slopes, strict=True)])
            pairs = zip(sharper.content, run.gradients(slope, sharper.numbers), strict=True)
            found.append(sharper.maps([(content * gradient).sum(1, keepdim=True) for content, gradient in pairs]))
        return torch.cat(found, 1)

    def _map(self, run: _Pass, references: Tensor) -> Tensor:
        """``(N, h, w)`` maps of one reference per example."""
        rule = self._rule()
        slope = rule.slope(run.embedding, references)
        if run.pooled is not None:
            weight, contribution = slope * run.pooled, run.embedding * slope
        else:
            at = run.gradient(slope)
            weight, contribution = at.sum((2, 3)), (run.maps * at).sum((2, 3))
        if self.weights != "gradient":
            if rule.shares is not None and bool(run.channelwise.any()):
                shares = rule.shares(run.embedding, references)
                contribution = torch.where(run.channelwise[:, None], shares, contribution)
            weight = normalized(contribution, self.normalize)
        return torch.einsum("nk,nkhw->nhw", weight, run.maps)


def _rows(mask: Tensor) -> list[int]:
    return torch.nonzero(mask).flatten().tolist()[:10]
