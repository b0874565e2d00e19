"""Spatial Activation Concept Vectors, maps of where a layer encodes a concept and where it affects the prediction."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from captum_concepts._artifacts import (
    Array,
    Keys,
    either,
    flag,
    integer as whole_number,
    list_of,
    mapping_of,
    nothing_or,
    open_artifact,
    save_artifact,
    table,
    text,
)
from captum_concepts._captum import LayerAttribution, check_target, layer_attribution, select_output
from captum_concepts._checks import finite_images, integer, name_positions, number, one_of, take_rows
from captum_concepts._undo import unharming, warnings_filtered
from captum_concepts.activations import (
    LAYOUTS,
    Inputs,
    Layer,
    Layers,
    SpatialActivations,
    find_model,
    full_precision,
    gradients_enabled,
    unwrap,
)
from captum_concepts.activations.survey import followed_by_linear, suggest_layer
from captum_concepts.attr import refinement
from captum_concepts.attr.batches import as_inputs, count, each_batch, first_example, image_names, joined, opened
from captum_concepts.attr.origin import check_origin, origin
from captum_concepts.attr.refinement import Refine
from captum_concepts.attr.spatial_acv.evidence import (
    LEAST_SHARE,
    ConceptEvidence,
    effects_of,
    explained_index,
)
from captum_concepts.attr.spatial_acv.fit import FitOptions, FittedVectors, fit_vectors
from captum_concepts.attr.spatial_acv.sweep import LayerSweep, sweep
from captum_concepts.errors import InputError, InputWarning, LayerError, NotFittedError, listing
from captum_concepts.explanation import RANKINGS, ConceptExplanation, Selection
from captum_concepts.images import thumbnails
from captum_concepts.solvers import fit_calibration, truth_table

_FORMAT = "captum_concepts.SpatialACV/2"
_SETTINGS = ("layout", "prefix_tokens", "batch_size")
_PRESENCE = ("presence_slopes", "presence_intercepts", "reliability", "null_vectors")
_TENSORS = ("vectors", "slopes", "intercepts", "accuracies", "intervals", "contrasts", "p_values", *_PRESENCE)
_INFO = table({
    "names": list_of(text(), least=1),
    "rows": mapping_of(mapping_of(whole_number())),
    "of_input": flag,
    "layer": text(),
    "model": text(),
    "settings": table({
        "layout": text(*LAYOUTS), "prefix_tokens": nothing_or(whole_number()), "batch_size": whole_number(1)
    }, {"refine": either(flag, list_of(text()))}),
}, {"presence": text()})  # fmt: skip
_ARRAYS = {
    "vectors": Array("float", ("K", "C")),
    **{name: Array("float", ("K",)) for name in ("slopes", "intercepts", "accuracies", "contrasts")},
    "intervals": Array("float", ("K", 2)),
    "p_values": Array("float", ("K",), optional=True),
    "presence_slopes": Array("float", ("K",), optional=True),
    "presence_intercepts": Array("float", ("K",), optional=True),
    "reliability": Array("float", ("K", 3), optional=True),
    "null_vectors": Array("float", ("K", None, "C"), optional=True),
}
#: Names of earlier versions, with their replacements.
_RENAMED = {
    "relevance": "concept_maps(inputs, concepts=None, probability=False)",
    "concept_names": "concepts",
}


@unharming
class SpatialACV(LayerAttribution):
    r"""TCAV per position, with concept maps and conceptual sensitivities (Spatial Activation Concept Vectors, SACV).

    Every position of every concept example is one training row. A linear classifier separates the concept's rows from
    the negatives' rows, and :math:`v_k` is its weight vector, of unit length, pointing towards the concept. With the
    layer's activations A and an output :math:`F_c`,

    .. math::
        S_k(i, j) = A_{ij}^T v_k \qquad S_{k \to c}(i, j) = \Big(\frac{\partial F_c}{\partial A_{ij}}\Big)^T v_k

    show where the layer encodes the concept (*concept map*) and where more of it would raise the output (*conceptual
    sensitivity*, whose sum over positions is the *contribution*). All K concepts cost one backward pass.

    Args:
        forward_func: the model, one of its methods, or any callable that returns the outputs to explain.
        layer: the layer to read, as a module or a dotted name.
        classifier: None for the package's L2 logistic regression, or any ``captum.concept`` ``Classifier``.
        refine: False returns concept maps as published; True, or a list of layers, returns sharper ones (see below).
        layout: ``"auto"``, ``"NCHW"``, ``"NHWC"``, ``"NLC"`` or ``"LNC"``.
        prefix_tokens: number of tokens before the grid; None infers it.
        batch_size: maximum number of images per forward pass, for fitting and explaining. It affects results only by
            rounding.

    With ``refine=True``, the projection of each position is measured relative to an image without content (each image's
    mean color), which removes padding artifacts at the borders, and half of the projections on the other concepts that
    the image shows is subtracted. Positive values spread along the feature affinity of the network's stages and the
    image's colors. The map is in [0, 1], on a grid of up to 1,024 positions, and costs a second forward pass. A list
    names the stages explicitly. Scores, contributions and :meth:`attribute` are unchanged.

    After :meth:`fit` there are ``vectors`` (K, C), ``concepts``, and for each concept ``accuracies_``,
    ``confidence_intervals_``, ``contrasts_``, ``p_values_``, ``significant_`` and ``rows_``; ``summary()`` prints them.
    ``visualization.panel(acv.explain(images), images, significant=acv)`` draws the maps, in gray if a
    concept is *not encoded here*.

    Inside ``captum.concept.TCAV(..., layer_attr_method=SpatialACV(model, layer))``, fitted or not, it returns the
    gradients of all channels in the layer's own layout, which TCAV multiplies with the vectors it learns itself. After
    TCAV assigns ``.layer``, the next :meth:`attribute` returns them.

    Reference:
        Wang, A., Lee, W.-N. *Exploring Concept Contribution Spatially: Hidden Layer Interpretation with Spatial
        Activation Concept Vector.* arXiv:2205.11511, 2022. The published notebook reshapes (C, HW) to (HW, C) instead
        of transposing, and assigns label 0 to the concept, which reverses the vector; this class follows the paper.

    Example:
        >>> from captum_concepts.attr.spatial_acv import SpatialACV
        >>> _ = torch.manual_seed(0)
        >>> conv = torch.nn.Conv2d(3, 8, 3)
        >>> net = torch.nn.Sequential(conv, torch.nn.Tanh(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        >>> red = torch.rand(6, 3, 16, 16) * torch.tensor([1.0, 0.2, 0.2]).view(3, 1, 1)
        >>> acv = SpatialACV(net, "0").fit({"red": red}, torch.rand(6, 3, 16, 16), n_random=20)
        >>> acv.attribute(red, target=1).shape, acv.concept_maps(red).shape
        (torch.Size([6, 1, 14, 14]), torch.Size([6, 1, 14, 14]))
        >>> bool(acv.accuracies_ > 0.9), acv.significant_.tolist()
        (True, [True])
    """

    #: Explaining all concepts costs as much as explaining a few (``audit_dataset`` calls ``explain`` once).
    explains_all_at_once = True

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: Layer,
        *,
        classifier: Any = None,
        refine: Refine = False,
        layout: str = "auto",
        prefix_tokens: int | None = None,
        batch_size: int = 32,
    ) -> None:
        self._layer: Layer | None = None
        self._asked_by_tcav: nn.Module | None = None
        super().__init__(forward_func, layer)
        if classifier is not None and not all(hasattr(classifier, n) for n in ("train_and_eval", "weights", "classes")):
            raise InputError(f"classifier must be a captum.concept Classifier or None, got {type(classifier).__name__}")
        self.classifier = classifier
        self.refine = refinement.checked(refine)
        self._stages: dict[Any, list[str]] = {}  # cached per network
        self.layout = layout
        self.prefix_tokens = prefix_tokens
        self.batch_size = integer("batch_size", batch_size)
        self._fitted: FittedVectors | None = None
        self._linear: str | None = None  # advice if only linear operations follow; '' if others do, None if unknown
        self._layers()  # raises for an unknown layer

    @classmethod
    def get_name(cls) -> str:
        """``"Spatial ACV"``, which Captum would spell "Spatial A C V"."""
        return "Spatial ACV"

    def __getattr__(self, name: str) -> Any:
        if name in _RENAMED:
            raise AttributeError(f"SpatialACV.{name} is called {_RENAMED[name]} now")
        raise AttributeError(f"SpatialACV has no attribute {name!r}")

    def __repr__(self) -> str:
        model = find_model(self.forward_func)
        name = type(model).__name__ if model is not None else getattr(self.forward_func, "__name__", "a function")
        names = () if self._fitted is None else self._fitted.names
        about = f"{len(names)} concepts: {listing(names)}" if names else "no concepts yet, call fit"
        return f"SpatialACV({name}, layer {self.layer_name!r})\n  {about}\n  trust: {self.trust}"

    @property
    def layer(self) -> Any:
        """The layer; a SpatialACV keeps the one it was constructed for."""
        return self._layer

    @layer.setter
    def layer(self, value: Any) -> None:
        if self._layer is None:
            self._layer = value
        elif isinstance(value, nn.Module):
            self._asked_by_tcav = value
        else:
            raise InputError("the vectors belong to one layer; construct another SpatialACV for another layer")

    @property
    def layer_name(self) -> str:
        """The dotted name of the layer."""
        return self._layers().names[0]

    # ------------------------------------------------------------------------------------------------------- fitting

    def fit(
        self,
        concepts: Any,
        negatives: Any = None,
        *,
        n_random: int = 0,
        seed: int = 0,
        lam: float | str = 0.3,
        folds: int = 3,
        max_rows: int = 50_000,
        transform: Callable[[Any], Any] | None = None,
        image_size: int | None = None,
        attribute_to_layer_input: bool = False,
        show_progress: bool = False,
    ) -> SpatialACV:
        r"""Learn the vectors from concept examples, images that show the concept everywhere.

        Args:
            concepts: ``{name: images}`` or a list of ``captum.concept.Concept``. Images are anything
                :func:`captum_concepts.images.open_images` reads: a tensor ``(n, 3, H, W)``, a list, a folder, a data
                set, a loader. Float tensors are passed to the model unchanged.
            negatives: the same, with all sets pooled, or one set alone. None uses the other concepts, to learn *which*
                concept an image shows. Images like those to be explained teach *whether* it is present, which locates a
                concept better. Images of a concept are never its negatives, nor is the set with its name, so
                ``{"striped": ..., "dotted": ...}`` gives each concept its own.
            n_random: number of random sets for ``p_values_``; 0 for none, 20 or more recommended. The test is whether
                the concept's images can be separated from the negatives at this layer. It compares the balanced
                accuracy of a linear discriminant, held out by image, with that for labels permuted among whole images
                ``n_random`` times, by the predictive t distribution (one-sided), Holm-adjusted over the concepts.
            seed: of the folds, of the random sets and of the row sample.
            lam: L2 penalty of the default classifier, for features divided by their common standard deviation. A small
                ``lam`` learns the best filter. A large one turns the vector towards the difference of the means, the
                concept's own direction; the default costs about a point of accuracy on real textures. Use a small one
                to separate similar concepts (0.003 on the scenes of ``benchmarks``). ``"published"`` is that of the
                authors' notebook, scikit-learn's ``LogisticRegression`` with ``C=1`` on unscaled features.
            folds: number of folds of images for held-out accuracy.
            max_rows: row budget. The concept keeps at most half of it and the negatives the other half (without
                ``negatives``, each of the K sets keeps 1/K), a seeded uniform sample of all positions; ``rows_``
                reports it. Memory is a few times ``max_rows`` times C floats, for any number of images.
            transform: converts a PIL image to a tensor, for files and PIL images. None reads them at the model's input
                size, normalized if the model's library specifies how, else in [0, 1].
            image_size: size of files without ``transform``; None uses the model's, else 224.
            attribute_to_layer_input: learn in the layer's input instead of its output.
            show_progress: show a progress bar over images and one over concepts.

        Raises:
            InputError: there are fewer than 2 different images on a side, concept and negatives are identical, a folder
                is empty, a name repeats, activations are NaN, or an option is invalid.
            LayerError, LayoutError: the layer is unknown, does not run, or has no grid.
        """
        options = FitOptions(n_random, seed, lam, folds, max_rows, bool(attribute_to_layer_input))
        layers = self._layers()
        self._fitted = fit_vectors(
            lambda images: _maps(layers, images, None, options.attribute_to_layer_input),
            concepts,
            negatives,
            options,
            read=lambda source: opened(source, layers.model, transform=transform, image_size=image_size),
            model=layers.model,
            batch_size=self.batch_size,
            classifier=self.classifier,
            show_progress=show_progress,
        )
        return self

    @classmethod
    def layer_sweep(
        cls,
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
        """Fit the concepts at every layer and compare the layers (paper, Fig. 2B).

        Accuracy and contrast are held out by image and scale-free, so layers of any width and range are comparable.

        Args:
            forward_func: the model.
            layers: modules or dotted names, usually from the image to the output.
            concepts, negatives: as in :meth:`fit`.
            classifier, layout, prefix_tokens, batch_size: as in the constructor.
            show_progress: show a bar over the layers.
            **options: of :meth:`fit`: ``n_random``, ``seed``, ``lam``, ``folds``, ``max_rows``, ...

        Returns:
            The comparison, with the fitted methods and a ``plot()``.

        Example:
            >>> _ = torch.manual_seed(0)
            >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 3))
            >>> dark = torch.rand(4, 3, 12, 12) * 0.1
            >>> sweep = SpatialACV.layer_sweep(net, ["0", "2"], {"dark": dark}, torch.rand(4, 3, 12, 12))
            >>> sweep.layers, sweep.accuracies.shape
            (['0', '2'], torch.Size([2, 1]))
        """
        settings = {"classifier": classifier, "layout": layout, "prefix_tokens": prefix_tokens}
        return sweep(
            lambda layer: cls(forward_func, layer, batch_size=batch_size, **settings),
            layers,
            lambda method: method.fit(concepts, negatives, **options),
            show_progress,
        )

    @property
    def vectors(self) -> Tensor:
        """``(K, C)`` unit rows, towards the concept."""
        return self._need_fit().vectors

    @property
    def concepts(self) -> list[str]:
        """The K names."""
        return list(self._need_fit().names)

    @property
    def accuracies_(self) -> Tensor:
        """``(K,)`` balanced accuracy of positions on held-out images, in [0, 1], chance 0.5."""
        return self._need_fit().accuracies

    @property
    def confidence_intervals_(self) -> Tensor:
        """``(K, 2)`` 95 % interval of the accuracy, by a bootstrap over images with refitting.

        With a ``classifier`` it is Nadeau and Bengio's corrected t interval.
        """
        return self._need_fit().intervals

    @property
    def contrasts_(self) -> Tensor:
        """``(K,)`` held-out difference of the mean projection on concept and negatives, in standard deviations."""
        return self._need_fit().contrasts

    @property
    def p_values_(self) -> Tensor | None:
        """``(K,)`` Holm-adjusted p-values (see ``fit``), or None if ``n_random=0``."""
        return self._need_fit().p_values

    @property
    def significant_(self) -> Tensor | None:
        """``(K,)`` bool in the order of ``concepts``, ``p_values_ < 0.05`` (False: *not encoded here*), or None if
        ``n_random=0``. For figures pass ``significant=`` this object, as explanations have another order."""
        return self._need_fit().significant

    @property
    def rows_(self) -> dict[str, dict[str, int]]:
        """For each concept, the numbers of images and rows seen and of rows kept within the budget."""
        return self._need_fit().rows

    @property
    def reliability_(self) -> Tensor | None:
        """``(K, 3)`` AUROC of :meth:`scores` on held-out images with and without the concept, and its 95 % interval."""
        return self._need_fit().reliability

    @property
    def trust(self) -> str:
        """One sentence on the reliability of the scores."""
        return "not measured: there are no concepts yet" if self._fitted is None else self._fitted.trust()

    def summary(self) -> str:
        """A table of accuracy, interval, p-value and rows per concept, which may be *not encoded here*."""
        return self._need_fit().summary()

    # ---------------------------------------------------------------------------------------------------- explaining

    @layer_attribution
    def attribute(
        self,
        inputs: Any,
        target: Any = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
    ) -> Tensor:
        """Conceptual sensitivity, positive where more of a concept would raise the target output.

        Args:
            inputs: images ``(N, 3, H, W)`` or a tuple of tensors.
            target: the output to explain, in any form Captum accepts; None if the model returns ``(N,)``.
            additional_forward_args: passed to ``forward_func`` after the inputs.
            attribute_to_layer_input: must be the same as in :meth:`fit`.

        Returns:
            ``(N, K, h, w)``, signed, in units of the output per unit of activation, fp32 (or fp64). Its sum over the
            positions is :meth:`contributions`.

        Raises:
            NotFittedError: before :meth:`fit`.
            TargetError: the target has the wrong type, length or range (also an ``AssertionError``).
            LayerError: the layer is unknown, not reached or repeated, has no grid, or its positions do not influence
                the output. A gradient that is zero for every example warns (``InputWarning``).
        """
        if self._asked_by_tcav is not None:
            asked, self._asked_by_tcav = self._layers().other(unwrap(self._asked_by_tcav)), None

            def every(part: Inputs, extra: Any, goal: Any) -> Tensor:
                return _all_channels(asked, part, extra, goal, attribute_to_layer_input)

            return joined(self._each(every, inputs, additional_forward_args, target)).contiguous()
        fitted, layers = self._need_fit(), self._layers()
        if bool(attribute_to_layer_input) != fitted.of_input:
            raise InputError(
                f"attribute_to_layer_input={attribute_to_layer_input}, but the vectors were fitted with "
                f"{fitted.of_input}; fit again with the option that you want to use"
            )

        inputs = as_inputs(inputs, layers.model)
        self._warn_if_linear(layers, inputs, additional_forward_args)

        def sensitivity(part: Inputs, extra: Any, goal: Any) -> Tensor:
            _, gradient, _ = _gradient(layers, part, extra, goal, fitted.of_input, best=False)
            return _project(gradient, fitted)

        return joined(self._each(sensitivity, inputs, additional_forward_args, target)).contiguous()

    def contributions(
        self, inputs: Any, target: Any = None, concepts: Any = None, additional_forward_args: Any = None
    ) -> Tensor:
        """``(N, T)`` derivatives of the output along each concept, added at every position at once.

        Args:
            inputs: images.
            target: the output; None selects each example's highest output.
            concepts: names or indices; None selects all.
            additional_forward_args: passed to ``forward_func`` after the inputs.
        """
        fitted, layers = self._need_fit(), self._layers()
        columns = name_positions(concepts, fitted.names)
        inputs = as_inputs(inputs, layers.model)
        self._warn_if_linear(layers, inputs, additional_forward_args)

        def sums(part: Inputs, extra: Any, goal: Any) -> Tensor:
            _, gradient, _ = _gradient(layers, part, extra, goal, fitted.of_input, best=True)
            return _project(gradient, fitted).sum((2, 3))[:, columns]

        return torch.cat(self._each(sums, inputs, additional_forward_args, target))

    def concept_maps(
        self, inputs: Any, concepts: Any = None, *, probability: bool = False, additional_forward_args: Any = None
    ) -> Tensor:
        """``(N, T, h, w)`` maps of where the layer encodes each concept.

        Args:
            inputs: images.
            concepts: names or indices; None selects all.
            probability: return the classifier's probability of the concept at each position (with slope and
                intercept, and equal priors of concept and negatives) instead of the projection.
            additional_forward_args: passed to ``forward_func`` after the inputs.

        Returns:
            ``(N, T, h, w)`` projections in units of the activation, or probabilities in [0, 1].
        """
        if not isinstance(probability, bool):
            raise InputError(f"probability must be True or False, got {probability!r}")
        fitted, layers = self._need_fit(), self._layers()
        columns = name_positions(concepts, fitted.names)

        if probability and self.refine is not False:
            raise InputError(
                "a refined map has no probabilities; pass probability=False, or construct with refine=False"
            )
        inputs = as_inputs(inputs, layers.model)
        layers = refinement.with_stages(layers, self.refine, self._stages, inputs, additional_forward_args)

        def maps(part: Inputs, extra: Any, _target: None) -> Tensor:
            with torch.no_grad():
                seen = layers.run(part, additional_forward_args=extra, attribute_to_layer_input=fitted.of_input)
            projected = _project(seen.maps[0], fitted)
            if probability:
                return fitted.probability(projected)[:, columns]
            return self._drawn(layers, seen, projected, part, extra)[:, columns]

        return joined(self._each(maps, inputs, additional_forward_args, None)).contiguous()

    def scores(self, inputs: Any, additional_forward_args: Any = None) -> Tensor:
        """``(N, K)`` probabilities that an image shows each concept.

        They are computed from the mean logit of the strongest tenth of the image's positions, calibrated on images held
        out of the fit (:meth:`fit`) or on your own (:meth:`calibrate`).
        """
        fitted, layers = self._need_fit(), self._layers()

        def score(part: Inputs, extra: Any, _target: None) -> Tensor:
            return fitted.scores(_project(_maps(layers, part, extra, fitted.of_input), fitted))

        return torch.cat(self._each(score, inputs, additional_forward_args, None))

    def tcav(self, inputs: Any, target: Any = None, additional_forward_args: Any = None) -> dict[str, Tensor]:
        r"""TCAV scores of a set of images, from their :meth:`contributions`.

        Returns:
            ``"sign_count"`` ``(K,)``, the fraction of examples with a positive contribution, in [0, 1], and
            ``"magnitude"`` ``(K,)``, the mean contribution.
        """
        total = self.contributions(inputs, target, additional_forward_args=additional_forward_args)
        return {"sign_count": (total > 0).to(total.dtype).mean(0), "magnitude": total.mean(0)}

    def evidence(
        self,
        inputs: Any,
        target: Any = None,
        *,
        alpha: float = 0.1,
        steps: int = 5,
        additional_forward_args: Any = None,
    ) -> ConceptEvidence:
        r"""The effect of each concept on an output's margin, and whether the concept decides the output.

        Wherever the layer encodes a concept, its projection is lowered to the classifier's threshold, and the loss of
        margin (the target output minus the mean of the other outputs) is the concept's *effect*. A contribution
        measures what more of a concept would change; an effect measures what the concept in the image changes.

        A concept *decides* if its effect is at least 5 % of the margin, if no other concept's vector would have the
        same effect at the same positions, and if the effect is larger than that of directions for permuted labels and
        for random halves of the negatives at this layer (p < ``alpha``). The last condition needs ``fit(n_random=20)``;
        without it, no concept decides.

        Args:
            inputs: images.
            target: the output; None selects each example's highest output.
            alpha: level of the comparison with other directions.
            steps: of the integral along which concepts are removed; each costs one pass per image and concept.
            additional_forward_args: passed to ``forward_func`` after the inputs.

        Raises:
            NotFittedError: before :meth:`fit`.
            TargetError: the target has the wrong type, length or range (also an ``AssertionError``).
        """
        fitted, layers = self._need_fit(), self._layers()
        steps = integer("steps", steps)
        alpha = number("alpha", alpha, lambda level: 0 < level < 1, "in (0, 1)")
        at_once = max(1, self.batch_size // (steps * len(fitted.names)))

        def part(images: Inputs, extra: Any, goal: Any) -> tuple[Tensor, ...]:
            return effects_of(layers, fitted, images, extra, goal, steps)

        inputs = as_inputs(inputs, layers.model)
        parts = each_batch(part, inputs, additional_forward_args, target, at_once, layers.model)
        margins, effects, p_values, others, *index = (joined(column) for column in zip(*parts, strict=True))
        shares = effects / margins.abs().clamp_min(1e-12)[:, None]
        decides = (shares >= LEAST_SHARE) & (p_values < alpha) & (effects > others)
        return ConceptEvidence(
            list(fitted.names),
            index[0] if index else None,
            margins,
            effects,
            shares,
            p_values if fitted.null_vectors is not None else None,
            decides,
        )

    def explain(
        self,
        inputs: Any,
        target: Any = None,
        *,
        concepts: Any = None,
        top_k: int | None = 5,
        rank_by: str = "scores",
        contributions: bool = True,
        additional_forward_args: Any = None,
    ) -> ConceptExplanation:
        """Scores, maps and contributions of the top concepts of each image.

        Args:
            inputs: images as tensors, or anything :func:`captum_concepts.images.inputs_for` reads: a folder, paths, PIL
                images, a data set, a loader.
            target: the output that contributions refer to; None selects each example's highest output.
            concepts: names or indices to explain instead of the top concepts.
            top_k: number of concepts selected for each image; None selects all. Concepts *not encoded here* come last.
            rank_by: ``"scores"`` or ``"contributions"`` (by magnitude).
            contributions: False skips them, and the backward pass.
            additional_forward_args: passed to ``forward_func`` after the inputs.

        Returns:
            Scores as :meth:`scores`, maps as :meth:`concept_maps`, contributions as :meth:`contributions`.
        """
        one_of("rank_by", rank_by, RANKINGS)
        if rank_by == "contributions" and not contributions:
            raise InputError("rank_by='contributions' requires contributions=True")
        fitted, layers = self._need_fit(), self._layers()
        inputs = as_inputs(inputs, layers.model)
        if contributions:
            self._warn_if_linear(layers, inputs, additional_forward_args)
        layers = refinement.with_stages(layers, self.refine, self._stages, inputs, additional_forward_args)

        def part(images: Inputs, extra: Any, goal: Any) -> tuple[Tensor, ...]:
            rest: list[Tensor] = []
            if contributions:
                seen, gradient, index = _gradient(layers, images, extra, goal, fitted.of_input, best=True)
                rest = [_project(gradient, fitted).sum((2, 3)), *([] if index is None else [index])]
            else:
                with torch.no_grad():
                    seen = layers.run(images, additional_forward_args=extra, attribute_to_layer_input=fitted.of_input)
                check_target(seen.returned, goal)
            projected = _project(seen.maps[0].detach(), fitted)
            return (fitted.scores(projected), self._drawn(layers, seen, projected, images, extra), *rest)

        parts = self._each(part, inputs, additional_forward_args, target)
        scores, maps, *rest = (joined(column) for column in zip(*parts, strict=True))
        values = rest[0] if rank_by == "contributions" else scores
        chosen = Selection.choose(
            fitted.names, self._demoted(values, rank_by), concepts=concepts, top_k=top_k, rank_by=rank_by
        )
        columns = chosen.columns
        return ConceptExplanation(
            [fitted.names[k] for k in columns],
            scores[:, columns],
            maps[:, columns],
            rest[0][:, columns] if contributions else None,
            target=rest[1] if len(rest) > 1 else None,
            presence=scores[:, columns] if fitted.presence_slopes is not None else None,
            selected=chosen.selected.to(scores.device),
            image_names=image_names(inputs),
            layer=layers.names[0],
            method=self.get_name(),
            score_unit="probability",
            contribution_unit="output per unit of activation" if contributions else "",
            rank_by=chosen.rank_by,
            pictures=thumbnails(inputs),
        )

    def calibrate(
        self,
        images: Any,
        labels: Any,
        *,
        transform: Callable[[Any], Any] | None = None,
        image_size: int | None = None,
    ) -> SpatialACV:
        """Calibrate :meth:`scores` on your own labeled images, a few dozen of each of the kind to be explained.

        Args:
            images: anything :func:`captum_concepts.images.open_images` reads.
            labels: for each image the concepts it shows (a name or index, a list of them, or None), or a bool tensor
                ``(n, K)``.
            transform, image_size: as in :meth:`fit`.

        Returns:
            The same object. :meth:`save` includes the calibration.
        """
        fitted, layers = self._need_fit(), self._layers()
        source = opened(images, layers.model, transform=transform, image_size=image_size)

        def found(part: Inputs, extra: Any, _target: None) -> Tensor:
            return fitted.evidence(_project(_maps(layers, part, extra, fitted.of_input), fitted))

        values = torch.cat(self._each(found, source, None, None))
        finite_images(values, range(len(values)), "the score")
        curve = fit_calibration(values, truth_table(labels, fitted.names, len(values)))
        self._fitted = replace(
            fitted,
            presence_slopes=curve.slopes,
            presence_intercepts=curve.intercepts,
            presence_source=f"{len(values)} labeled images",
        )
        return self

    # ------------------------------------------------------------------------------------------------------- storage

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write vectors, statistics and the model's fingerprint to one safetensors file, atomically."""
        fitted, layers = self._need_fit(), self._layers()
        info = {
            "names": fitted.names,
            "rows": fitted.rows,
            "of_input": fitted.of_input,
            "presence": fitted.presence_source,
            **origin(layers),
            "settings": {
                **{name: getattr(self, name) for name in _SETTINGS},
                "refine": refinement.names(self.refine, layers),
            },
        }
        return save_artifact(path, _FORMAT, info, {n: v for n in _TENSORS if (v := getattr(fitted, n)) is not None})

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], forward_func: Callable[..., Any], layers: Layer | None = None
    ) -> SpatialACV:
        """Load a file that :meth:`save` wrote; maps are bit-identical to those of the saved object.

        Args:
            path: the file.
            forward_func: the model it was fitted on.
            layers: the layer it was fitted on; None uses the name in the file.

        Raises:
            FileNotFoundError: there is no such file.
            ArtifactError: the file is damaged, or was fitted on another model or layer.
        """
        sizes = lambda info: {"K": len(info["names"])}  # noqa: E731
        formats: dict[str, Keys] = {_FORMAT: {}, "captum_concepts.SpatialACV/1": {}}
        opened = open_artifact(path, formats, "a saved SpatialACV", info=_INFO, arrays=_ARRAYS, sizes=sizes)
        with opened as (info, tensors):
            fields: dict[str, Any] = {name: tensors.get(name) for name in _TENSORS}
            fitted = FittedVectors(tuple(info["names"]), rows=info["rows"], of_input=info["of_input"], **fields)
            fitted = replace(fitted, presence_source=info.get("presence", ""))
            if missing := set(fitted.names) - set(fitted.rows):
                raise ValueError(f"it has no counts of rows for {sorted(missing)[:5]}")
        loaded = check_origin(
            path, lambda: cls(forward_func, info["layer"] if layers is None else layers, **info["settings"]), info
        )
        loaded._fitted = fitted
        return loaded

    # -------------------------------------------------------------------------------------------------------- inside

    def _layers(self) -> Layers:
        return Layers.resolve(self.forward_func, self.layer, layout=self.layout, prefix_tokens=self.prefix_tokens)

    def _need_fit(self) -> FittedVectors:
        if self._fitted is None:
            raise NotFittedError("there are no concept vectors yet; call fit(concepts, negatives), or SpatialACV.load")
        return self._fitted

    def _each(self, run: Callable[[Inputs, Any, Any], Any], inputs: Any, extra: Any, target: Any) -> list[Any]:
        model = find_model(self.forward_func)
        return each_batch(run, as_inputs(inputs, model), extra, target, self.batch_size, model)

    def _drawn(self, layers: Layers, seen: SpatialActivations, projected: Tensor, inputs: Inputs, extra: Any) -> Tensor:
        """``(N, K, h, w)`` projections, refined if requested."""
        if self.refine is False:
            return projected
        fitted = self._need_fit()
        sharper = refinement.prepare(layers, seen, inputs, extra, fitted.of_input)
        content, scores = _project(sharper.content[-1], fitted), fitted.scores(projected)
        numbers = range(len(fitted.names))
        weights = [refinement.contrast(scores, torch.full_like(scores[:, 0], k, dtype=torch.long)) for k in numbers]
        return sharper.maps([torch.einsum("nkj,njhw->nkhw", torch.stack(weights, 1), content)])

    def _warn_if_linear(self, layers: Layers, inputs: Any, extra: Any) -> None:
        """Warn if the gradient is the same for every image and thus explains none; checked once."""
        if self._linear is None:
            n = count(inputs)
            part, extra = first_example(inputs, layers.model), take_rows(extra, slice(1), n)
            try:
                with warnings_filtered("ignore", InputWarning):
                    linear = not self._need_fit().of_input and all(
                        followed_by_linear(layers, part, additional_forward_args=extra)
                    )
                    self._linear = self._other_layer(part, extra) if linear else ""
            except (InputError, RuntimeError, TypeError, AssertionError):
                return  # the error is raised where the gradient is computed
        if self._linear:
            warnings.warn(
                f"only linear operations follow layer {layers.names[0]!r}, so contributions are the same for every "
                f"image and do not explain any of them; {self._linear}",
                InputWarning,
                stacklevel=3,
            )

    def _other_layer(self, inputs: Inputs, extra: Any) -> str:
        try:
            other = suggest_layer(self.forward_func, inputs, additional_forward_args=extra, for_gradients=True)
        except InputError:
            return "use an earlier layer"
        return f"use layer {other!r} instead"

    def _demoted(self, values: Tensor, rank_by: str) -> Tensor:
        """``values`` for ranking, with concepts that are not encoded below all others."""
        significant = self.significant_
        if significant is None or bool(significant.all()):
            return values
        ranked = values.abs() if rank_by == "contributions" else values
        low, high = ranked.aminmax()
        return ranked + (high - low + 1) * significant.to(ranked)


def _maps(layers: Layers, inputs: Inputs, extra: Any, of_input: bool) -> Tensor:
    """``(N, C, h, w)`` activations of the layer, without gradients."""
    with torch.no_grad():
        seen = layers.run(inputs, additional_forward_args=extra, attribute_to_layer_input=of_input)
    return seen.maps[0].detach()


def _gradient(
    layers: Layers, inputs: Inputs, extra: Any, target: Any, of_input: bool, *, best: bool
) -> tuple[SpatialActivations, Tensor, Tensor | None]:
    """The pass, the gradient ``(N, C, h, w)`` of the target output, and the index of that output if it has one.

    Args:
        best: ``target=None`` selects each example's highest output.
    """
    with gradients_enabled():
        seen = layers.run(inputs, additional_forward_args=extra, gradient=True, attribute_to_layer_input=of_input)
        output = seen.output
        index = explained_index(output, target)
        goal = index if best and target is None else target
        gradient = refinement.only(seen, (0,)).gradients(select_output(output, goal))[0]
    return seen, gradient.detach(), index


def _project(maps: Tensor, fitted: FittedVectors) -> Tensor:
    """``(N, K, h, w)`` components of each position of ``(N, C, h, w)`` along each vector."""
    maps, vectors = full_precision(maps), fitted.vectors
    if vectors.shape[1] != maps.shape[1]:
        raise LayerError(f"the vectors have {vectors.shape[1]} channels, but the layer now has {maps.shape[1]}")
    return torch.einsum("nchw,kc->nkhw", maps, vectors.to(maps))


def _all_channels(layers: Layers, inputs: Inputs, extra: Any, target: Any, of_input: bool) -> Tensor:
    """The gradient at a layer, in the layer's own layout, in which Captum's TCAV flattens activations."""
    with gradients_enabled():
        seen = layers.capture(inputs, additional_forward_args=extra, gradient=True, attribute_to_layer_input=of_input)
        value = select_output(seen.output, target)
        return torch.autograd.grad(value.sum(), seen.layers[0])[0].detach()
