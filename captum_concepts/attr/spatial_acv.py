"""Spatial Activation Concept Vectors: where a layer sees a concept, and where it moves the prediction."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from captum_concepts._captum import log_usage
from captum_concepts.activations import find_model, layer_name, resolve_layer
from captum_concepts.activations.capture import Inputs, Layer
from captum_concepts.attr import _acv_file
from captum_concepts.attr._acv_base import LayerVectors
from captum_concepts.attr._acv_maps import all_channels, project, recorded_target
from captum_concepts.attr._acv_state import fit_vectors
from captum_concepts.errors import InputError
from captum_concepts.explanation import ConceptExplanation


class SpatialACV(LayerVectors):
    r"""Spatial Activation Concept Vectors (SACV): TCAV, position by position.

    Every position of every guidance image is one training row; a linear classifier separates the concept's rows from
    the negatives' rows, and :math:`v_k` is its weight vector, of unit length, pointing towards the concept. With the
    layer's activations A and an output :math:`F_c`,

    .. math::
        S_k(i, j) = A_{ij}^T v_k \qquad S_{k \to c}(i, j) = \Big(\frac{\partial F_c}{\partial A_{ij}}\Big)^T v_k

    say where the layer sees the concept (*relevance*) and where more of it would raise the output (*contribution*).
    All K concepts cost one backward pass.

    Args:
        forward_func: the model, one of its methods, or any callable that gives the outputs to explain.
        layer: where the concepts are looked for, as a module or a dotted name.
        classifier: None for the package's L2 logistic regression, or any ``captum.concept`` ``Classifier``.
        layout: ``"auto"``, ``"NCHW"``, ``"NHWC"``, ``"NLC"`` or ``"LNC"``.
        prefix_tokens: tokens in front of the grid; None infers it.
        batch_size: the most images in one forward pass, in fitting and in explaining. Results do not depend on it
            beyond rounding.

    After :meth:`fit` there are ``vectors`` (K, C), ``concept_names``, and for each concept ``accuracies_``,
    ``confidence_intervals_``, ``contrasts_``, ``p_values_``, ``significant_`` and ``rows_``; ``summary()`` prints them.
    ``visualization.panel(acv.explain(images), images, significant=acv.significant_)`` draws the maps, grey where a
    concept is *not encoded here*.

    Inside ``captum.concept.TCAV(..., layer_attr_method=SpatialACV(model, layer))``, fitted or not, it gives the
    gradients of all channels in the layer's own layout, which TCAV multiplies with the vectors it learns itself: TCAV
    announces itself by assigning ``.layer``, and only the call that follows is answered so.

    Reference:
        Wang, A., Lee, W.-N. *Exploring Concept Contribution Spatially: Hidden Layer Interpretation with Spatial
        Activation Concept Vector.* arXiv:2205.11511, 2022. The published notebook reshapes (C, HW) to (HW, C) where it
        must transpose, and gives the concept label 0, which turns the vector round; here it is as the paper says.

    Example:
        >>> from captum_concepts.attr.spatial_acv import SpatialACV
        >>> _ = torch.manual_seed(0)
        >>> conv = torch.nn.Conv2d(3, 8, 3)
        >>> net = torch.nn.Sequential(conv, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        >>> red = torch.rand(6, 3, 16, 16) * torch.tensor([1.0, 0.2, 0.2]).view(3, 1, 1)
        >>> acv = SpatialACV(net, "0").fit({"red": red}, torch.rand(6, 3, 16, 16), n_random=20)
        >>> acv.attribute(red, target=1).shape, acv.relevance(red).shape
        (torch.Size([6, 1, 14, 14]), torch.Size([6, 1, 14, 14]))
        >>> bool(acv.accuracies_ > 0.9), acv.significant_.tolist()
        (True, [True])
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: Layer,
        *,
        classifier: Any = None,
        layout: str = "auto",
        prefix_tokens: int | None = None,
        batch_size: int = 32,
    ) -> None:
        super().__init__(forward_func, layer, layout, prefix_tokens, batch_size)
        if classifier is not None and not all(hasattr(classifier, n) for n in ("train_and_eval", "weights", "classes")):
            raise InputError(f"classifier must be a captum.concept Classifier or None, got {type(classifier).__name__}")
        self.classifier = classifier

    def fit(
        self,
        concepts: Any,
        negatives: Any = None,
        *,
        n_random: int = 0,
        seed: int = 0,
        lam: float = 0.3,
        folds: int = 3,
        max_rows: int = 50_000,
        transform: Callable[[Any], Tensor] | None = None,
        image_size: int = 224,
        attribute_to_layer_input: bool = False,
        show_progress: bool = False,
    ) -> SpatialACV:
        r"""Learn the vectors from guidance images whose whole content shows the concept.

        Args:
            concepts: ``{name: images}`` or a list of ``captum.concept.Concept``. Images are a tensor ``(n, 3, H, W)``,
                a list of tensors or PIL images, a data set (of images, of tuples that start with one, or of dicts), a
                DataLoader, or the path of a folder. Grayscale is repeated and an alpha channel dropped where the model
                takes 3 channels.
            negatives: the same, all sets pooled, or one set alone. None takes the other concepts (*which* of them is
                it?); images like those to be explained (*is* it there?) find a concept better in them. An image that
                also belongs to the concept is never its negative.
            n_random: random sets behind ``p_values_``; 0 for none, 20 or more recommended. The test asks whether the
                concept's images can be told from the negatives at this layer: held-out-by-image balanced accuracy of a
                linear discriminant, against the same with the labels dealt anew among whole images ``n_random`` times,
                by the predictive t distribution (one-sided), Holm-adjusted over the concepts.
            seed: of the folds, of the random sets and of the row sample.
            lam: L2 penalty of the default classifier, for features divided by their common standard deviation. A strong
                one turns the vector from the best filter (small ``lam``) towards the difference of the means, which is
                the concept's own direction; the default costs about a point of accuracy on real textures.
            folds: parts that the images are dealt to for held-out accuracy.
            max_rows: row budget: the concept keeps at most half of it and the negatives the other half (without
                ``negatives``, each of the K sets keeps 1/K), a seeded uniform sample of all positions; ``rows_``
                reports it. Memory is a few times ``max_rows`` times C floats, whatever the number of images.
            transform: PIL image to tensor, for folders and PIL images: **give the model's own preprocessing**. None
                gives RGB in [0, 1], shorter side ``image_size``, middle square.
            image_size: of the default transform.
            attribute_to_layer_input: learn in the layer's input instead of its output.
            show_progress: show a progress bar.

        Raises:
            InputError: fewer than 2 different images on a side, concept and negatives identical, an empty folder, a
                name twice, integer or NaN pixels, a bad option.
            LayerError, LayoutError: the layer is unknown, does not run, or has no grid.
        """
        self._fitted = fit_vectors(
            lambda images: self._maps(images, attribute_to_layer_input),
            concepts,
            negatives,
            model=find_model(self.forward_func),
            batch_size=self.batch_size,
            classifier=self.classifier,
            n_random=n_random,
            seed=seed,
            lam=lam,
            folds=folds,
            max_rows=max_rows,
            transform=transform,
            image_size=image_size,
            of_input=attribute_to_layer_input,
            show_progress=show_progress,
        )
        return self

    @log_usage()
    def attribute(
        self,
        inputs: Inputs,
        target: Any = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
    ) -> Tensor:
        """Contribution maps: where more of each concept would raise the target output.

        Args:
            inputs: images ``(N, 3, H, W)`` or a tuple of tensors.
            target: the output to explain, in any form Captum accepts; None where the model gives ``(N,)``.
            additional_forward_args: passed to ``forward_func`` after the inputs.
            attribute_to_layer_input: must be as it was in :meth:`fit`.

        Returns:
            ``(N, K, h, w)``, signed, in units of the output per unit of activation, fp32 (or fp64).

        Raises:
            NotFittedError: before :meth:`fit`.
            TargetError: a target of wrong type, length or range (an ``AssertionError`` as well).
            LayerError: unknown, not reached or repeated layer, one without a grid, or one whose positions do not
                influence the output. A gradient that is zero for every example warns (``InputWarning``).
        """
        if self._asked_by_tcav is not None:
            layer, self._asked_by_tcav = self._asked_by_tcav, None

            def every(*part: Any) -> Tensor:
                return all_channels(self.forward_func, layer, part, attribute_to_layer_input)

            return torch.cat(self._each(inputs, additional_forward_args, target, every)).contiguous()
        fitted = self._need_fit()
        if bool(attribute_to_layer_input) != fitted.of_input:
            raise InputError(
                f"attribute_to_layer_input={attribute_to_layer_input}, but the vectors were fitted with "
                f"{fitted.of_input}; fit again with what you want to explain"
            )

        def contribution(*part: Any) -> Tensor:
            seen, gradient = self._gradient(*part)
            return project(gradient, self._vectors(seen.maps[0]))

        return torch.cat(self._each(inputs, additional_forward_args, target, contribution)).contiguous()

    def relevance(self, inputs: Inputs, probability: bool = False, additional_forward_args: Any = None) -> Tensor:
        """Relevance maps: where the layer sees each concept.

        Args:
            inputs: images.
            probability: give the classifier's probability of the concept at each position (slope and intercept
                included, concept and negatives equally likely beforehand) instead of the bare projection.
            additional_forward_args: passed to ``forward_func`` after the inputs.

        Returns:
            ``(N, K, h, w)``: the projection in units of the activation, or probabilities in [0, 1].
        """
        fitted = self._need_fit()

        @torch.no_grad()
        def seen(part: Inputs, extra: Any, _target: None) -> Tensor:
            return self._relevance(self._maps(part, fitted.of_input, extra), probability)

        return torch.cat(self._each(inputs, additional_forward_args, None, seen)).contiguous()

    def tcav(self, inputs: Inputs, target: Any = None, additional_forward_args: Any = None) -> dict[str, Tensor]:
        r"""TCAV scores from the contribution maps, :math:`d_{nk} = \sum_{ij} S_{k \to c}(i, j)` of each example n.

        d is the derivative of the output along the concept, added at every position at once.

        Returns:
            ``"sign"`` ``(K,)``: share of the examples with d > 0, in [0, 1]; ``"magnitude"`` ``(K,)``: mean of d.
        """
        of_input = self._need_fit().of_input
        maps = self.attribute(inputs, target, additional_forward_args, attribute_to_layer_input=of_input)
        total = maps.sum((2, 3))
        return {"sign": (total > 0).to(total.dtype).mean(0), "magnitude": total.mean(0)}

    def explain(
        self, inputs: Inputs, target: Any = None, top_k: int | None = None, additional_forward_args: Any = None
    ) -> ConceptExplanation:
        """What, where and how much, for every concept.

        Args:
            inputs: images.
            target: the output whose change the contributions tell; None takes each example's highest output.
            top_k: keep the concepts that rank highest by score; those *not encoded here* come last.
            additional_forward_args: passed to ``forward_func`` after the inputs.

        Returns:
            Scores ``(N, K)``: the highest probability of the concept at any position. Maps: relevance. Contributions:
            the contribution map summed over positions (as in :meth:`tcav`).
        """
        fitted = self._need_fit()

        def told(part: Inputs, extra: Any, goal: Any) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
            seen, gradient = self._gradient(part, extra, goal, best=True)
            at = seen.maps[0].detach()
            sums = project(gradient, self._vectors(at)).sum((2, 3))
            score = self._relevance(at, True).amax((2, 3))
            return score, self._relevance(at, False), sums, recorded_target(seen.output, goal)

        parts = self._each(inputs, additional_forward_args, target, told)
        scores, maps, sums, goals = zip(*parts, strict=True)
        targets = None if any(g is None for g in goals) else torch.cat([g for g in goals if g is not None])
        explanation = ConceptExplanation(
            list(fitted.names),
            torch.cat(scores),
            torch.cat(maps),
            torch.cat(sums),
            target=targets,
            layer=layer_name(self.forward_func, resolve_layer(self.forward_func, self.layer)),
            method=self.get_name(),
        )
        return explanation if top_k is None else explanation[self._ranked(explanation, top_k)]

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write vectors, statistics and the model's fingerprint as one safetensors file, atomically."""
        settings = {"layout": self.layout, "prefix_tokens": self.prefix_tokens, "batch_size": self.batch_size}
        return _acv_file.save(path, self._need_fit(), self.forward_func, self.layer, settings)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], forward_func: Callable[..., Any], layer: Layer | None = None
    ) -> SpatialACV:
        """Read what :meth:`save` wrote; maps are bit-identical to those before.

        Args:
            path: the file.
            forward_func: the model it was fitted on.
            layer: the layer it was fitted on; None takes the name in the file.

        Raises:
            FileNotFoundError: there is no such file.
            ArtifactError: the file is broken, or was fitted on another model or layer.
        """
        loaded: SpatialACV = _acv_file.load(path, cls, forward_func, layer)
        return loaded

    @staticmethod
    def layer_sweep(*args: Any, **options: Any) -> Any:
        """Fit every layer and compare: see :func:`captum_concepts.attr.layer_sweep.layer_sweep`."""
        from captum_concepts.attr.layer_sweep import layer_sweep

        return layer_sweep(*args, **options)
