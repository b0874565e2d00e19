"""Feature Activation Map: class activation maps for models without a classifier head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from captum_concepts._captum import LayerAttribution, log_usage, target_indices
from captum_concepts.activations import (
    SpatialActivations,
    evaluation_mode,
    find_model,
    gradients_enabled,
    layer_name,
    spatial_activations,
)
from captum_concepts.activations.capture import Inputs, Layer
from captum_concepts.activations.spatial import full_precision
from captum_concepts.attr._prototypes import class_means
from captum_concepts.attr._similarity import (
    SIMILARITIES,
    Similarity,
    check_embedding,
    check_references,
    hold_norm,
    mean_pool_scale,
    normalized,
    similarity_gradient,
    similarity_scores,
)
from captum_concepts.errors import InputError
from captum_concepts.explanation import ConceptExplanation

NORMALIZE = ("minmax", "l1", "none")
WEIGHTS = ("contribution", "gradient")


class FeatureActivationMap(LayerAttribution):
    r"""Where in the image the similarity to a reference embedding comes from (FAM).

    For few-shot, contrastive, retrieval and image-text models, which have no classifier head. With the layer's
    maps :math:`A_k`, the embedding :math:`f = T(A)` and a reference :math:`r`, the contribution of channel k to
    the similarity :math:`s(f, r)` is

    .. math:: c_k = \sum_{ij} A_{kij} \, \frac{\partial s(f, r)}{\partial A_{kij}}

    with the norms of the cosine held constant. Where T pools by mean, max or GeM (everything homogeneous) this is
    :math:`z_k \, \partial s / \partial z_k` of the pooled z, and :math:`z_k r_k / (|f| |r|)` where f is z itself: then
    no backward pass is made. The map is :math:`M = \sum_k w_k A_k`.

    Args:
        forward_func: maps images to embeddings ``(N, D)``: a model, one of its methods, or any callable.
        layer: the layer to read maps from, as a module or a dotted name; usually the last with a grid.
        references: ``(K, D)`` bank: class prototypes, gallery items, text embeddings.
        reference_names: K unique names; ``target`` may then be a name.
        similarity: ``"cosine"``, ``"dot"``, ``"euclidean"`` (:math:`-|f - r|^2`) or a differentiable callable that
            turns two ``(N, D)`` tensors into ``(N,)``. For euclidean and f = z, :math:`c_k = -(f_k - r_k)^2`.
        normalize: of the contributions of each example, ``"minmax"`` to [0, 1] (the paper's), ``"l1"``
            (divided by the sum of absolute values, sign kept) or ``"none"``. With ``"minmax"`` maps of several
            references do not compare: draw each on its own scale.
        weights: ``"contribution"`` (the paper's: w is the normalised c), or ``"gradient"``: w is
            :math:`\partial s / \partial z_k` alone, never normalised. For mean pooling, a linear T without
            bias, and cosine or dot, the mean of the map over its positions then equals the similarity.
        layout: ``"auto"``, ``"NCHW"``, ``"NHWC"``, ``"NLC"`` or ``"LNC"``.
        prefix_tokens: tokens in front of the grid; None infers it.

    Raises:
        InputError: an option that does not exist, or names that do not fit the references.

    Reference:
        Liao, Y., Gao, Y., Zhang, W. *Feature Activation Map: Visual Explanation of Deep Learning Models for Image
        Classification.* arXiv:2307.05017, 2023.

    Example:
        >>> from captum_concepts import FeatureActivationMap
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        >>> images = torch.rand(4, 3, 16, 16)
        >>> prototypes = FeatureActivationMap.prototypes(net, images, labels=["cat", "cat", "dog", "dog"])
        >>> fam = FeatureActivationMap(net, "0", prototypes, reference_names=["cat", "dog"])
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
        layout: str = "auto",
        prefix_tokens: int | None = None,
    ) -> None:
        super().__init__(forward_func, layer)
        _one_of("normalize", normalize, NORMALIZE)
        _one_of("weights", weights, WEIGHTS)
        if not callable(similarity):
            _one_of("similarity", similarity, SIMILARITIES, "or a callable")
        if reference_names is not None:
            names = list(reference_names)
            if references is not None and len(names) != len(references):
                raise InputError(f"{len(names)} reference_names for {len(references)} references; give one each")
            if len(set(names)) != len(names):
                raise InputError(f"reference_names must be unique, got {names}")
        self.references = references
        self.reference_names = reference_names
        self.similarity = similarity
        self.normalize = normalize
        self.weights = weights
        self.layout = layout
        self.prefix_tokens = prefix_tokens

    @log_usage()
    def attribute(
        self,
        inputs: Inputs,
        target: Any = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
    ) -> Tensor:
        """The map of each example's similarity to its target reference.

        Args:
            inputs: images ``(N, 3, H, W)`` as ``forward_func`` takes them, or a tuple of tensors.
            target: the reference to explain: an index or name, or one for each example (1-d tensor or list).
                None explains each example's most similar reference; ``torch.arange(N)`` explains pairs.
            additional_forward_args: passed to ``forward_func`` after the inputs.
            attribute_to_layer_input: read the layer's input instead of its output.

        Returns:
            ``(N, 1, h, w)`` in the layer's grid, fp32 (or fp64); enlarge it with ``LayerAttribution.interpolate``.

        Raises:
            TargetError: a target of wrong type, length or range (an ``AssertionError`` as well).
            LayerError: unknown, not reached or repeated layer, one without a grid, or one whose positions do not
                influence the embedding.
        """
        with gradients_enabled():
            seen, embedding, bank = self._run(inputs, additional_forward_args, attribute_to_layer_input)
            index = self._index(target, embedding, bank)
            return self._map(seen, embedding, bank[index])

    def scores(self, inputs: Inputs, additional_forward_args: Any = None) -> Tensor:
        """``(N, K)`` similarities to the references: cosine in [-1, 1], euclidean in (-inf, 0]."""
        with torch.no_grad(), evaluation_mode(find_model(self.forward_func)):
            parts = inputs if isinstance(inputs, tuple) else (inputs,)
            extra = additional_forward_args
            extra = () if extra is None else extra if isinstance(extra, tuple) else (extra,)
            embedding = full_precision(check_embedding(self.forward_func(*parts, *extra)))
            bank = check_references(self.references, embedding, self.similarity)
            return similarity_scores(embedding, bank, self.similarity)

    def explain(
        self,
        inputs: Inputs,
        target: Any = None,
        top_k: int | None = None,
        additional_forward_args: Any = None,
    ) -> ConceptExplanation:
        """Similarities and maps for the references, as concepts.

        Args:
            inputs: images.
            target: recorded as the explained reference; None records each example's most similar one.
            top_k: keep only the references that rank highest (by their best score over the examples).

        Returns:
            Scores ``(N, T)`` and maps ``(N, T, h, w)``; a reference without a name is called by its index.
        """
        with gradients_enabled():
            seen, embedding, bank = self._run(inputs, additional_forward_args, False)
            scores = similarity_scores(embedding, bank, self.similarity).detach()
            index = self._index(target, embedding, bank)
            columns = range(len(bank)) if top_k is None else scores.amax(0).argsort(descending=True)[:top_k].tolist()
            maps = [self._map(seen, embedding, bank[k].expand_as(embedding)) for k in columns]
        names = [str(k) for k in range(len(bank))] if self.reference_names is None else list(self.reference_names)
        return ConceptExplanation(
            [names[k] for k in columns],
            scores[:, list(columns)],
            torch.cat(maps, 1),
            target=index,
            layer=layer_name(self.forward_func, self.layer),
            method=self.get_name(),
        )

    @staticmethod
    def prototypes(
        forward_func: Callable[..., Any],
        data: Tensor | Dataset[Any] | DataLoader[Any],
        labels: Tensor | Sequence[Any] | None = None,
        *,
        batch_size: int = 32,
    ) -> Tensor:
        """Class prototypes: the mean embedding of each class (Snell et al., 2017).

        Args:
            forward_func: maps images to embeddings.
            data: images ``(n, 3, H, W)``, a dataset or a loader that gives ``(image, label)``.
            labels: one for each image of a tensor or dataset: integers or strings.
            batch_size: images a forward pass; a DataLoader brings its own.

        Returns:
            ``(K, D)``, classes in sorted order of their labels.

        Raises:
            InputError: labels are missing, or not one for each image.
        """
        return class_means(forward_func, data, labels, batch_size)

    def _run(self, inputs: Inputs, extra: Any, of_input: bool) -> tuple[SpatialActivations, Tensor, Tensor]:
        seen = spatial_activations(
            self.forward_func,
            inputs,
            [self.layer],
            additional_forward_args=extra,
            gradient=True,
            attribute_to_layer_input=of_input,
            layout=self.layout,
            prefix_tokens=self.prefix_tokens,
        )
        embedding = full_precision(check_embedding(seen.output).detach())
        return seen, embedding, check_references(self.references, embedding, self.similarity)

    def _index(self, target: Any, embedding: Tensor, bank: Tensor) -> Tensor:
        if target is None:
            return similarity_scores(embedding, bank, self.similarity).argmax(1)
        names = self.reference_names or ()
        return target_indices(target, len(embedding), len(bank), names, what="reference").to(bank.device)

    def _map(self, seen: SpatialActivations, embedding: Tensor, references: Tensor) -> Tensor:
        maps = full_precision(seen.maps[0].detach())
        slope = similarity_gradient(embedding, references, self.similarity)
        scale = mean_pool_scale(maps, embedding, half=seen.output.element_size() < 4)
        if scale is not None:
            gradient = slope * scale
            contribution = embedding * slope
            if self.similarity == "euclidean":
                contribution = -(embedding - references).square()
        else:
            output = check_embedding(seen.output)
            release = (lambda: None) if callable(self.similarity) else hold_norm(output)
            try:
                at = seen.gradients(output * slope.to(output), retain_graph=True)[0]
            finally:
                release()
            at = full_precision(at)
            gradient, contribution = at.sum((2, 3)), (maps * at).sum((2, 3))
        weight = gradient if self.weights == "gradient" else normalized(contribution, self.normalize)
        return torch.einsum("nk,nkhw->nhw", weight, maps).unsqueeze(1).contiguous()


def _one_of(name: str, value: Any, allowed: Sequence[str], more: str = "") -> None:
    if value not in allowed:
        raise InputError(f"{name} must be one of {tuple(allowed)} {more}".rstrip() + f", got {value!r}")
