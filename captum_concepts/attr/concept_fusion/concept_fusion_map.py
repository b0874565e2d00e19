"""CE-FAM: what concepts a classifier saw, where, and how much each moved the prediction, for any words."""

from __future__ import annotations

import functools
import inspect
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from captum_concepts._captum import LayerAttribution, log_usage, target_indices
from captum_concepts._checks import integer, name_positions, number, one_of
from captum_concepts.activations import Inputs, Layer, Layers, check_images, gradients_enabled
from captum_concepts.attr.concept_fusion import ablation, file
from captum_concepts.attr.concept_fusion.setup import Part, Setup
from captum_concepts.attr.concept_fusion.words import LINKS, TextBank, check_words, encode
from captum_concepts.errors import InputError, InputWarning, NotFittedError, did_you_mean
from captum_concepts.explanation import RANKINGS, ConceptExplanation, Selection

if TYPE_CHECKING:
    from typing_extensions import Self

    from captum_concepts.concepts import Vocabulary

GRADIENTS = ("total", "branch")
MAP_LAYERS = ("auto", "fused")
_RENAMED = {
    "layer": "map_layer=",
    "probability": "link=",
    "chunk_size": "batch_size=",
    "relevance": "layer_relevance(inputs, concepts)",
    "contribution": "contributions(inputs, target, concepts)",
}
Method = TypeVar("Method", bound=Callable[..., Any])


def _of_an_instance(method: Method) -> Method:
    """A method that was once called on the class, which now raises with the new spelling."""

    @functools.wraps(method)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, ConceptFusionMap):
            raise InputError(
                "fit is a method of an instance now: ConceptFusionMap(forward_func, layers, map_layer='fused').fit("
                "images, encoder, concepts). Options of the map go to the constructor"
            )
        return method(self, *args, **kwargs)

    return called  # type: ignore[return-value]


class ConceptFusionMap(LayerAttribution):
    r"""Zero-shot concept scores, maps and contributions for a trained classifier (CE-FAM).

    A translator h maps the classifier's pooled activations :math:`z^l` into the embedding space of a vision-language
    model (VLM). Any text t then defines a concept:

    - *what*: the logit :math:`S^t = \text{scale} \cos(h(z), t) + \text{bias}`, and its softmax over the concepts (CLIP)
      or its sigmoid (SigLIP): :meth:`scores`.
    - *where*: :math:`R^t_l = \mathrm{ReLU}(\sum_k \beta_k A^l_k)` with :math:`\beta_k` the spatial mean of
      :math:`\partial S^t / \partial A^l_k`: :meth:`concept_maps`.
    - *how much*: channels of the layer are ablated in the order of :math:`\beta_k z_k`; the mean relative drop of the
      class probability over the first 1..K of them: :meth:`contributions`. Negative: the concept opposes the class.

    Args:
        forward_func: the classifier, returning logits ``(N, classes)``: a module, one of its methods, or any callable.
        layers: the layers that the translator reads, as modules or dotted names, in the translator's order. They need
            not lie on one path. For a ViT: the last block's tokens after the final norm.
        translator: a fitted :class:`ConceptTranslator`, or any module from a list of ``(N, C_l)`` to ``(N, D)``. None:
            :meth:`fit` trains one.
        concepts: T unique names, or None for words that come later (:meth:`with_concepts`).
        text_embeddings: ``(T, D)``, of any length; None without a translator: :meth:`fit` asks its encoder.
        map_layer: where maps and contributions are computed. ``"auto"``: each concept's most relevant layer
            (published); an index into ``layers``; ``"fused"``: maps from all layers, see below.
        link: ``"softmax"`` or ``"sigmoid"``. None: what the encoder of :meth:`fit` says, else ``"softmax"``. Under a
            softmax a single concept always scores 1 (a warning says so), and its layer relevance is 0.
        logit_scale, logit_bias: of the VLM. None: those of the encoder of :meth:`fit`, else 100 and 0 (CLIP).
        gradient: ``"total"`` (published): :math:`\partial S / \partial A^l` also through the layers downstream of l;
            ``"branch"``: every :math:`z^l` is a free input, so no backward pass enters the classifier. At the last
            layer they agree.
        n_channels: K, the number of channels ablated for layer relevance and contributions.
        channel_share: maximum fraction of a layer's channels to ablate, at least one channel. None: 0.25 if
            ``n_channels`` is 20, otherwise no limit.
        fill: what replaces an ablated channel in the classifier: ``"layer_mean"`` (the mean of the layer's pooled
            vector), ``"channel_mean"`` (its own mean, which keeps the pooled value) or ``"zero"``.
        class_probability: how contributions read the classifier's output: ``"softmax"`` or ``"sigmoid"`` (independent
            labels) of its logits. ``"auto"``: the sigmoid of a single output, else the softmax; an output that is a
            probability already is taken as it is.
        layout, prefix_tokens: how layers are read, as in :class:`FeatureActivationMap`.
        batch_size: bound of images, and of images times concepts, in flight at once. Results do not depend on it, or on
            the other images of a batch, beyond rounding: a value of a fused map by at most 40 ``logit_scale`` eps,
            with eps the machine epsilon (1e-4 for a scale of 20 in fp32). An embedding that is off by eps moves a
            logit by 2 ``logit_scale`` eps, and what is then divided by its own size is divided by at least 1/20.

    Fused maps (``map_layer="fused"``). The published map weights whole channels of one layer. Here the evidence of a
    position at layer l is

    .. math:: E_l = \sum_k A^l_k \, \frac{\partial S'}{\partial A^l_k}, \qquad
        S' = S^t - \tfrac12 \, u \log \sum_{s \ne t} \exp(S^s / u), \quad u = 3

    with its sign (HiResCAM's product; rectifying the gradient first finds objects, not the concept). The second term
    subtracts what supports other likely concepts as well. The positive parts of all layers are added with equal energy:
    late layers know the concept, early ones its position. A layer counts less where the concept's relevance lies
    upstream of it, and where it disagrees with the other layers. One more layer is what the translator reads at each
    position alone: a gradient says what would change the concept, this what is seen there. Three steps of a random walk
    on the network's feature affinity (and the image's colors, on a grid finer than coarse layers have) then spread the
    evidence over the rest of the object. Averaging cannot create evidence: without any, the map is zero. Values are
    fractions of the map's strongest position, in [0, 1].

    Use ``"fused"`` if the region is what you want (compared with the published map in
    ``benchmarks/results/concept_regions_*.md``), and ``"auto"`` for the published method, or where the region must
    belong to the one layer whose channels :meth:`contributions` ablates.

    Attributes:
        history_: of :meth:`fit`: lists ``"train_loss"``, ``"val_loss"``, ``"val_cosine"``, ``"lr"``, one entry per
            epoch.

    Raises:
        InputError: empty, duplicate or unnamed concepts; texts that fit neither them nor the translator; an unknown
            option.

    Reference:
        *CE-FAM: Concept-Based Explanation via Fusion of Activation Maps.* ICCV 2025, arXiv:2509.23849.

    Example:
        >>> from captum_concepts import ConceptFusionMap, ConceptTranslator
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
        >>> translator = ConceptTranslator([8], 4, hidden=(16, 16))
        >>> cefam = ConceptFusionMap(net, ["1"], translator, ["sky", "sea"], torch.eye(4)[:2])
        >>> images = torch.rand(2, 3, 16, 16)
        >>> cefam.attribute(images, target="sea").shape, cefam.concept_maps(images).shape
        (torch.Size([2, 1, 14, 14]), torch.Size([2, 2, 14, 14]))
        >>> cefam.contributions(images, target=3).shape
        torch.Size([2, 2])
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layers: Sequence[Layer],
        translator: nn.Module | None = None,
        concepts: Sequence[str] | None = None,
        text_embeddings: Tensor | None = None,
        *,
        map_layer: str | int = "auto",
        link: str | None = None,
        logit_scale: float | None = None,
        logit_bias: float | None = None,
        gradient: str = "total",
        n_channels: int = ablation.PUBLISHED,
        channel_share: float | None = None,
        fill: str = "layer_mean",
        class_probability: str = "auto",
        layout: str = "auto",
        prefix_tokens: int | None = None,
        batch_size: int = 32,
        **renamed: Any,
    ) -> None:
        _refuse(renamed)
        super().__init__(forward_func, layers)
        self.translator = translator
        self.concepts = concepts
        self.text_embeddings = text_embeddings
        self.map_layer = map_layer
        self.link = link
        self.logit_scale = logit_scale
        self.logit_bias = logit_bias
        self.gradient = gradient
        self.n_channels = n_channels
        self.channel_share = channel_share
        self.fill = fill
        self.class_probability = class_probability
        self.layout = layout
        self.prefix_tokens = prefix_tokens
        self.batch_size = batch_size
        self.history_: dict[str, list[float]] | None = None
        self._check()
        self._layers()

    # ------------------------------------------------------------ what, where, how much

    @log_usage()
    def attribute(
        self,
        inputs: Inputs,
        target: Any = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
    ) -> Tensor:
        """Where a concept is, in Captum's words; :meth:`concept_maps` says the same with the concepts' names.

        Args:
            inputs: images as ``forward_func`` takes them, or a tuple of tensors.
            target: a concept (never a class), by index or name, or one per example (1-d tensor or list). None: all T.
            additional_forward_args: passed to ``forward_func`` after the inputs.
            attribute_to_layer_input: read the layers' inputs; the translator must have been fitted on those.

        Returns:
            ``(N, 1, h, w)`` for one concept per example, ``(N, T, h, w)`` for None; at least 0, fp32 (or fp64). The grid
            is the layer's own if ``map_layer`` is an index; the finest of ``layers`` for ``"auto"``; a whole multiple
            or fraction of that with at most 1,024 positions for ``"fused"``.

        Raises:
            TargetError: a target of wrong type, length or range (an ``AssertionError`` as well).
            LayerError: an unknown, unreached or repeated layer, or one without a grid.
        """
        names = self._names()
        batch = len(check_images(inputs)[0])
        if target is None:
            index = torch.arange(len(names)).expand(batch, -1)
        else:
            index = target_indices(target, batch, len(names), names).unsqueeze(1)
        return self._maps(inputs, index, additional_forward_args, attribute_to_layer_input)

    def concept_maps(
        self, inputs: Inputs, concepts: Any = None, *, additional_forward_args: Any = None
    ) -> Tensor:
        """``(N, T, h, w)`` *where* each concept is, whatever the class; see :meth:`attribute`.

        Args:
            inputs: images.
            concepts: names or indices; None: all T.
            additional_forward_args: passed to ``forward_func`` after the inputs.
        """
        columns = name_positions(concepts, self._names())
        index = torch.tensor(columns).expand(len(check_images(inputs)[0]), -1)
        return self._maps(inputs, index, additional_forward_args)

    def logits(self, inputs: Inputs, *, additional_forward_args: Any = None) -> Tensor:
        """``(N, T)`` logits S of the concepts, before softmax or sigmoid."""
        setup = self._setup()
        with torch.no_grad():
            parts = [part.logits() for _, part in setup.passes(inputs, additional_forward_args, gradient=False)]
        return torch.cat(parts)

    def scores(self, inputs: Inputs, *, additional_forward_args: Any = None) -> Tensor:
        """``(N, T)`` *what*: probabilities in [0, 1], summing to 1 under a softmax."""
        return self._bank().probability(self.logits(inputs, additional_forward_args=additional_forward_args))

    def layer_relevance(
        self, inputs: Inputs, concepts: Any = None, *, additional_forward_args: Any = None
    ) -> Tensor:
        """``(N, T, L)``: how much each layer carries each concept.

        The mean over i = 1..K of the relative drop (S_0 - S_i) / S_0 of the concept's probability, where the i channels
        of largest beta_k z_k are replaced, in the translator's input, by the mean of the layer's pooled vector.

        Args:
            inputs: images.
            concepts: names or indices; None: all T.
            additional_forward_args: passed to ``forward_func`` after the inputs.
        """
        columns = torch.tensor(name_positions(concepts, self._names()))
        setup = self._setup()
        with gradients_enabled():
            return torch.cat(
                [
                    part.layer_relevance(columns.expand(rows.stop - rows.start, -1))
                    for rows, part in setup.passes(inputs, additional_forward_args)
                ]
            )

    def contributions(
        self,
        inputs: Inputs,
        target: Any = None,
        concepts: Any = None,
        *,
        return_curve: bool = False,
        additional_forward_args: Any = None,
    ) -> Any:
        """``(N, T)`` *how much* each concept moves the probability of a class.

        Args:
            inputs: images.
            target: the class, as Captum accepts it; None: each example's predicted class.
            concepts: names or indices; None: all T.
            return_curve: also return the drop after 0, 1, ..., K channels.
            additional_forward_args: passed to ``forward_func`` after the inputs.

        Returns:
            ``(N, T)``: mean over i = 1..K of (p_0 - p_i) / p_0 of the class probability (see ``class_probability``), at
            most 1; negative where the concept opposes the class. With ``return_curve`` also
            ``(N, T, n_channels + 1)``, which starts at 0 and is constant beyond the layer's channels.

        Raises:
            LayerError: the output does not depend on the chosen layer.
        """
        columns = torch.tensor(name_positions(concepts, self._names()))
        batch = len(check_images(inputs)[0])
        setup = self._setup()
        parts = []
        with gradients_enabled():
            for rows, part in setup.passes(inputs, additional_forward_args):
                classes = part.classes(target, rows, batch)
                index = columns.expand(len(classes), -1)
                _, choice, channels = part.explained(index, contributions=True, maps=False)
                parts.append(part.contributions(choice, channels, classes))
        value, curve = (torch.cat(part).detach() for part in zip(*parts, strict=True))
        return (value, curve) if return_curve else value

    def explain(
        self,
        inputs: Inputs,
        target: Any = None,
        *,
        concepts: Any = None,
        top_k: int | None = 5,
        rank_by: str = "scores",
        contributions: bool = True,
        additional_forward_args: Any = None,
    ) -> ConceptExplanation:
        """What, where and how much together, for each image its own concepts.

        Args:
            inputs: images.
            target: the class whose probability contributions refer to; None: each example's predicted class.
            concepts: explain just these (names or indices), in this order; ``top_k`` is then ignored.
            top_k: how many concepts per image, those of its highest scores; None: all T.
            rank_by: ``"scores"``, or ``"contributions"`` (by magnitude; computes those of all T concepts).
            contributions: False leaves the ablations of the classifier out: what and where alone.
            additional_forward_args: passed to ``forward_func`` after the inputs.

        Returns:
            Scores of all concepts that any image selected; maps (equal to :meth:`concept_maps`) and contributions of
            each image's own, at the cost of ``top_k`` concepts per image. ``layer`` names where they come from.
        """
        one_of("rank_by", rank_by, RANKINGS)
        if rank_by == "contributions" and not contributions and concepts is None:
            raise InputError("rank_by='contributions' needs them; leave contributions=True, or use rank_by='scores'")
        names = self._names()
        setup = self._setup()
        batch = len(check_images(inputs)[0])
        choose = functools.partial(Selection.choose, names, concepts=concepts, top_k=top_k, rank_by=rank_by)
        found: dict[str, list[Any]] = {}
        with gradients_enabled():
            for rows, part in setup.passes(inputs, additional_forward_args):
                logits = part.logits()
                more = {"scores": part.bank.probability(logits), "ranking": part.bank.probability(logits)}
                if contributions:
                    more["target"] = part.classes(target, rows, batch)
                    more["target_probability"] = part.class_probability(more["target"])
                if rank_by == "contributions" and concepts is None:
                    everything = torch.arange(len(names)).expand(len(logits), -1)
                    _, choice, channels = part.explained(everything, contributions=True, maps=False)
                    more["ranking"] = part.contributions(choice, channels, more["target"])[0]
                index = choose(more["ranking"]).index
                more["maps"], more["choice"], channels = part.explained(index, contributions=contributions)
                if contributions:
                    more["contributions"] = part.contributions(more["choice"], channels, more["target"])[0]
                for key, value in more.items():
                    found.setdefault(key, []).append(value.detach())
        whole = {key: torch.cat(values) for key, values in found.items()}
        device = whole["scores"].device
        selection = choose(whole["ranking"])
        return ConceptExplanation(
            [names[column] for column in selection.columns],
            whole["scores"][:, selection.columns],
            selection.spread(whole["maps"]).to(device),
            selection.spread(whole["contributions"]).to(device) if contributions else None,
            whole["target"].to(device) if contributions else None,
            self._layer_names(setup, selection, whole["choice"]),
            self.get_name(),
            selected=selection.selected.to(device),
            target_probability=whole["target_probability"].to(device) if contributions else None,
            score_unit="probability",
            contribution_unit="relative drop of the class probability" if contributions else "",
            rank_by=selection.rank_by,
        )

    # ------------------------------------------------------------ fit, words, options, files
