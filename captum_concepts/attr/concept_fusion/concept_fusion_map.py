"""CE-FAM: zero-shot concept scores, maps and contributions for a trained classifier."""

from __future__ import annotations

import functools
import inspect
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_concepts._captum import LayerAttribution, layer_attribution, target_indices
from captum_concepts._checks import (
    finite_images,
    integer,
    name_positions,
    number,
    one_of,
    unique_names,
    warn_of_same_embeddings,
)
from captum_concepts._undo import unharming
from captum_concepts.activations import Inputs, Layer, Layers, find_model, gradients_enabled
from captum_concepts.attr.batches import as_inputs, count, image_names, joined
from captum_concepts.attr.concept_fusion import ablation, file
from captum_concepts.attr.concept_fusion.fit import link_of, train
from captum_concepts.attr.concept_fusion.setup import Setup, check_unused_target
from captum_concepts.attr.concept_fusion.trust import Curve, HeldOut, Trust, judge, odds, presence_table
from captum_concepts.attr.concept_fusion.words import LINKS, TextBank, check_words, encode
from captum_concepts.errors import ConvergenceWarning, InputError, InputWarning, NotFittedError, did_you_mean
from captum_concepts.explanation import RANKINGS, ConceptExplanation, Selection
from captum_concepts.images import ImageSource, thumbnails
from captum_concepts.models.concept_translator import Training
from captum_concepts.models.concept_translator.network import checked_hidden
from captum_concepts.vlm import check_encoder

if TYPE_CHECKING:
    from typing_extensions import Self

    from captum_concepts.concepts import Vocabulary

GRADIENTS = ("total", "branch")
MAP_LAYERS = ("auto", "fused")
#: Far beyond any encoder's scale or bias, and within the precision of fp32.
_MOST_LOGIT = 1e6
_RENAMED = {
    "layer": "map_layer=",
    "probability": "link=",
    "chunk_size": "batch_size=",
    "relevance": "layer_relevance(inputs, concepts)",
    "contribution": "contributions(inputs, target, concepts)",
}
Method = TypeVar("Method", bound=Callable[..., Any])


def _of_an_instance(method: Method) -> Method:
    """An instance method that raises with the new spelling when it is called on the class, as older versions did."""

    @functools.wraps(method)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, ConceptFusionMap):
            raise InputError(
                "fit is now an instance method: ConceptFusionMap(forward_func, layers, "
                "map_layer='fused').fit(images, encoder, concepts). Pass options of the map to the constructor"
            )
        return method(self, *args, **kwargs)

    return called  # type: ignore[return-value]


@unharming
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
            not lie on one path. For a ViT, use the last block's tokens after the final norm.
        translator: a fitted :class:`ConceptTranslator`, or any module that maps a list of ``(N, C_l)`` to ``(N, D)``.
            None: :meth:`fit` trains one.
        concepts: T unique names, or None to add them later (:meth:`with_concepts`).
        text_embeddings: ``(T, D)``, of any length. None without a translator: :meth:`fit` queries its encoder.
        map_layer: where maps and contributions are computed: ``"auto"`` (published) is each concept's most relevant
            layer, an integer is an index into ``layers``, and ``"fused"`` combines maps of all layers (see below).
        link: ``"softmax"`` or ``"sigmoid"``; None uses that of the encoder of :meth:`fit`, else ``"softmax"``. Under a
            softmax, a single concept always scores 1 (with a warning), and its layer relevance is 0.
        logit_scale, logit_bias: of the VLM; None uses those of the encoder of :meth:`fit`, else 100 and 0 (CLIP).
        gradient: ``"total"`` (published) computes :math:`\partial S / \partial A^l` also through the layers downstream
            of l. ``"branch"`` treats every :math:`z^l` as a free input, so no backward pass enters the classifier. At
            the last layer they agree.
        n_channels: K, the number of channels ablated for layer relevance and contributions.
        channel_share: maximum fraction of a layer's channels to ablate, at least one channel. None: 0.25 if
            ``n_channels`` is 20, otherwise no limit.
        fill: replaces an ablated channel in the classifier: ``"layer_mean"`` (the mean of the layer's pooled vector),
            ``"channel_mean"`` (the channel's mean, which keeps the pooled value) or ``"zero"``.
        class_probability: how contributions read the classifier's output: ``"softmax"`` or ``"sigmoid"`` (independent
            labels) of its logits. ``"auto"`` uses the softmax or sigmoid that the classifier ends in, otherwise the
            sigmoid of a single output and the softmax of several. A final softmax or sigmoid is recomputed from its
            logits, so saturated probabilities lose no precision.
        layout, prefix_tokens: how layers are read, as in :class:`FeatureActivationMap`.
        batch_size: maximum number of images, and of images times concepts, processed at once. It and the other images
            of a batch affect results only by rounding, a value of a fused map by at most 40 ``logit_scale`` eps, with
            eps the machine epsilon (1e-4 for a scale of 20 in fp32).
        calibrated: calibrate scores with statistics of :meth:`fit`: the translator's mean logit per concept is
            subtracted, and the softmax gets a temperature. False uses the published formula;
            ``**published.CONCEPT_FUSION_MAP`` selects all settings of the paper.

    The published map weights whole channels of one layer. With ``map_layer="fused"``, the evidence of a position at
    layer l is

    .. math:: E_l = \sum_k A^l_k \, \frac{\partial S'}{\partial A^l_k}, \qquad
        S' = S^t - \tfrac12 \, u \log \sum_{s \ne t} \exp(S^s / u), \quad u = 3

    with its sign (HiResCAM's product; rectifying the gradient first finds objects instead of the concept). The second
    term subtracts evidence that also supports other likely concepts. The positive evidence of all layers is added with
    equal energy, because late layers encode the concept and early ones its position. A layer has less weight if the
    concept's relevance lies upstream of it, or if it disagrees with the other layers. The translator's output at each
    position alone counts as one more layer. Three steps of a random walk on the network's feature affinity and the
    image's colors then spread the evidence over the rest of the object. Without any evidence the map is zero. Values
    are fractions of the map's strongest position, in [0, 1].

    Use ``"fused"`` to localize concepts (``benchmarks/results/concept_regions_*.md`` compares it with the published
    map). Use ``"auto"`` for the published method, or if the map must belong to the layer whose channels
    :meth:`contributions` ablates.

    Attributes:
        history_: lists ``"train_loss"``, ``"val_loss"``, ``"val_cosine"`` and ``"lr"`` of :meth:`fit`, one entry per
            epoch.

    Raises:
        InputError: concepts are empty, duplicate or unnamed, text embeddings do not match them or the translator, or an
            option is unknown.

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
        calibrated: bool = True,
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
        self.calibrated = calibrated
        self.history_: dict[str, list[float]] | None = None
        self.held_out_: HeldOut | None = None
        self.presence_: Curve | None = None
        self._of_encoder = {name for name in ("link", "logit_scale", "logit_bias") if getattr(self, name) is None}
        self._known: tuple[Any, Trust] | None = None
        self._check()
        if self.link != "sigmoid" and concepts is not None and len(list(concepts)) == 1:
            warnings.warn(
                f"a softmax over the single concept {next(iter(concepts))!r} is always 1; add competing concepts, or "
                "use link='sigmoid'",
                InputWarning,
                stacklevel=2,
            )
        self._layers()

    #: ``target`` of :meth:`attribute` is a concept, never a class.
    target_is_concept = True

    # ------------------------------------------------------------ what, where, how much

    @layer_attribution
    def attribute(
        self,
        inputs: Any,
        target: Any = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
    ) -> Tensor:
        """Concept maps with Captum's signature; :meth:`concept_maps` returns the same maps by name.

        Args:
            inputs: tensors as ``forward_func`` takes them, or anything :func:`captum_concepts.images.inputs_for` reads
                and preprocesses for the model: files, folders, PIL images, a data set with a length.
            target: a concept (never a class), by index or name, or one per example (1-d tensor or list). None: all T.
            additional_forward_args: passed to ``forward_func`` after the inputs.
            attribute_to_layer_input: read the layers' inputs; the translator must have been fitted on those.

        Returns:
            ``(N, 1, h, w)`` for one concept per example, ``(N, T, h, w)`` for None; nonnegative, fp32 or fp64. The grid
            is that of the layer if ``map_layer`` is an index, the finest of ``layers`` for ``"auto"``, and an integer
            multiple or fraction of the finest with at most 1,024 positions for ``"fused"``.

        Raises:
            TargetError: the target has the wrong type, length or range (also an ``AssertionError``).
            LayerError: a layer is unknown, not reached or repeated, or has no grid.
        """
        names, inputs = self._names(), self._opened(inputs)
        batch = count(inputs)
        if target is None:
            index = torch.arange(len(names)).expand(batch, -1)
        else:
            index = target_indices(target, batch, len(names), names).unsqueeze(1)
        return self._maps(inputs, index, additional_forward_args, attribute_to_layer_input)

    def concept_maps(self, inputs: Any, concepts: Any = None, *, additional_forward_args: Any = None) -> Tensor:
        """``(N, T, h, w)`` maps of *where* each concept is, independent of the class; see :meth:`attribute`.

        Args:
            inputs: as for :meth:`attribute`.
            concepts: names or indices; None: all T.
            additional_forward_args: passed to ``forward_func`` after the inputs.
        """
        columns, inputs = name_positions(concepts, self._names()), self._opened(inputs)
        index = torch.tensor(columns).expand(count(inputs), -1)
        return self._maps(inputs, index, additional_forward_args)

    def logits(self, inputs: Any, *, additional_forward_args: Any = None) -> Tensor:
        """``(N, T)`` logits S of the concepts, before softmax or sigmoid."""
        setup = self._setup()
        with torch.no_grad():
            parts = [
                part.logits() for _, part in setup.passes(self._opened(inputs), additional_forward_args, gradient=False)
            ]
        return torch.cat(parts)

    def scores(self, inputs: Any, *, additional_forward_args: Any = None) -> Tensor:
        """``(N, T)`` probabilities of *what* is present, in [0, 1]; they sum to 1 under a softmax."""
        return self._bank().probability(self.logits(inputs, additional_forward_args=additional_forward_args))

    def layer_relevance(self, inputs: Any, concepts: Any = None, *, additional_forward_args: Any = None) -> Tensor:
        """``(N, T, L)`` relevance of each layer to each concept.

        It is the mean over i = 1..K of the relative drop (S_0 - S_i) / S_0 of the concept's probability, with the i
        channels of largest beta_k z_k replaced, in the translator's input, by the mean of the layer's pooled vector.

        Args:
            inputs: as for :meth:`attribute`.
            concepts: names or indices; None: all T.
            additional_forward_args: passed to ``forward_func`` after the inputs.
        """
        columns = torch.tensor(name_positions(concepts, self._names()))
        setup = self._setup()
        with gradients_enabled():
            return torch.cat(
                [
                    part.layer_relevance(columns.expand(rows.stop - rows.start, -1))
                    for rows, part in setup.passes(self._opened(inputs), additional_forward_args)
                ]
            )

    def contributions(
        self,
        inputs: Any,
        target: Any = None,
        concepts: Any = None,
        *,
        return_curve: bool = False,
        additional_forward_args: Any = None,
    ) -> Any:
        """``(N, T)`` contributions, *how much* each concept changes the probability of a class.

        Args:
            inputs: as for :meth:`attribute`.
            target: the class, as Captum accepts it; None: each example's predicted class, which for a classifier with a
                single output (a sigmoid) is always that output, whether or not its probability is above 0.5.
            concepts: names or indices; None: all T.
            return_curve: also return the drop after 0, 1, ..., K channels.
            additional_forward_args: passed to ``forward_func`` after the inputs.

        Returns:
            ``(N, T)`` mean over i = 1..K of (p_0 - p_i) / p_0 of the class probability (see ``class_probability``), at
            most 1, and negative where the concept opposes the class. With ``return_curve`` also
            ``(N, T, n_channels + 1)``, which starts at 0 and is constant beyond the layer's channels.

        Raises:
            LayerError: the output does not depend on the chosen layer.
        """
        columns = torch.tensor(name_positions(concepts, self._names()))
        inputs = self._opened(inputs)
        batch = count(inputs)
        setup = self._setup()
        parts = []
        with gradients_enabled():
            for rows, part in setup.passes(inputs, additional_forward_args):
                classes = part.classes(target, rows, batch)
                index = columns.expand(len(classes), -1)
                _, choice, channels = part.explained(index, contributions=True, maps=False)
                parts.append(part.contributions(choice, channels, classes))
        value, curve = (torch.cat(part).detach() for part in zip(*parts, strict=True))
        if return_curve and (missing := setup.n_channels + 1 - curve.shape[-1]):
            curve = torch.cat([curve, curve[..., -1:].expand(*curve.shape[:-1], missing)], -1)
        return (value, curve) if return_curve else value

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
            inputs: as for :meth:`attribute`.
            target: the class whose probability contributions refer to; None: as in :meth:`contributions`.
            concepts: explain only these (names or indices), in this order, and ignore ``top_k``.
            top_k: number of concepts per image, the highest-ranked ones; None: all T.
            rank_by: ``"scores"``, or ``"contributions"`` (by magnitude; computes those of all T concepts).
            contributions: False skips the ablations and returns scores and maps only.
            additional_forward_args: passed to ``forward_func`` after the inputs.

        Returns:
            Scores of all concepts selected for at least one image, and maps (equal to :meth:`concept_maps`) and
            contributions of the concepts selected for each image, at the cost of ``top_k`` concepts per image.
            ``layer`` names the layers they come from.
        """
        one_of("rank_by", rank_by, RANKINGS)
        if rank_by == "contributions" and not contributions and concepts is None:
            raise InputError("rank_by='contributions' requires contributions=True; pass it, or use rank_by='scores'")
        names = self._names()
        setup, inputs = self._setup(), self._opened(inputs)
        batch = count(inputs)
        choose = functools.partial(Selection.choose, names, concepts=concepts, top_k=top_k, rank_by=rank_by)
        found: dict[str, list[Any]] = {}
        with gradients_enabled():
            for rows, part in setup.passes(inputs, additional_forward_args):
                logits = part.logits()
                more = {"scores": part.bank.probability(logits), "ranking": part.bank.probability(logits)}
                presence = self._presence(logits)
                if presence is not None:
                    more["presence"] = presence
                check_unused_target(part, None if contributions else target, rows, batch)
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
        whole = {key: joined(values) for key, values in found.items()}
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
            presence=whole["presence"][:, selection.columns] if "presence" in whole else None,
            selected=selection.selected.to(device),
            target_probability=whole["target_probability"].to(device) if contributions else None,
            score_unit="probability",
            contribution_unit="relative drop of the class probability" if contributions else "",
            rank_by=selection.rank_by,
            image_names=image_names(inputs),
            pictures=thumbnails(inputs),
        )

    # ------------------------------------------------------------ fit, words, options, files

    @_of_an_instance
    def fit(
        self,
        images: Any,
        encoder: Any,
        concepts: Sequence[str] | Vocabulary | None = None,
        *,
        training: Training | Mapping[str, Any] | None = None,
        crops: int = 4,
        seed: int = 0,
        similarity_weight: float = 1e-3,
        hidden: Sequence[int] | None = None,
        image_size: Any = None,
        model_transform: Callable[[Tensor], Tensor] | None = None,
        encoder_transform: Callable[[Tensor], Tensor] | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        memory_budget: int = 2**30,
        show_progress: bool = False,
    ) -> Self:
        """Train a translator from the classifier to ``encoder``, without labels.

        Args:
            images: anything :func:`~captum_concepts.images.open_images` reads: a tensor ``(n, 3, H, W)``, a folder, a
                Dataset, a DataLoader. Float tensors are passed to the classifier unchanged; files, PIL images and
                integer arrays are read in [0, 1] and normalized as the classifier's library specifies.
            encoder: any object with ``encode_image(images) -> (N, D)``, ``encode_text(list) -> (T, D)``,
                ``logit_scale`` and ``logit_bias``, and optionally ``link`` (``"softmax"`` or ``"sigmoid"``).
            concepts: concepts for the similarity loss and the fitted map (a Vocabulary is encoded in its templates).
                None uses those of the constructor, if any; :meth:`with_concepts` adds them later.
            training: ``optimizer``, ``epochs``, ``batch_size``, ``lr``; see :class:`~captum_concepts.models.Training`.
            crops: number of random crops per image, used for training and to estimate the encoder's certainty
                (:meth:`presence`). Classifier and encoder run on them too, so a fit costs 1 + ``crops`` times as much.
            seed: of crops, split, initial weights and order.
            similarity_weight: weight of the similarity loss for embeddings of length 10, as in CLIP (rebalanced for
                others, see :func:`~captum_concepts.models.fit_translator`); 0 disables it.
            hidden: of the translator, see :class:`ConceptTranslator`.
            image_size: of files and PIL images; None uses the classifier's if known, else 224.
            model_transform, encoder_transform: applied to each batch of images for the classifier and the encoder.
            cache_dir: folder for activations and embeddings, from which an interrupted run resumes and other fits read.
                A cache of another model, encoder, layer, layout, transform or of other images is rejected.
            memory_budget: bytes of cached rows above which they go to disk.
            show_progress: show progress bars.

        Under ``torchrun`` every process reads its part of the images, and all take the same steps. The cache is
        byte-identical for any number of processes, so one process can resume what several began.

        Returns:
            This map, fitted.

        Raises:
            InputError: there are no images, an option is unknown, or the encoder does not know a concept (the message
                names it); raised before training.
            ArtifactError: the cache does not match.

        Warns:
            ConvergenceWarning: the loss became NaN (the best weights so far are kept), or the translator agrees with
                the encoder no better than chance.
        """
        options = Training.of(training)
        self._check()
        layers = self._layers()
        number("similarity_weight", similarity_weight, lambda v: v >= 0, "0 or more")
        integer("crops", crops, least=0)
        integer("seed", seed, least=None)
        integer("memory_budget", memory_budget, least=0)
        hidden = None if hidden is None else checked_hidden(hidden)
        concepts = self.concepts if concepts is None else concepts
        check_encoder(encoder, words=concepts is not None)
        names, text = (None, None) if concepts is None else encode(concepts, encoder)
        if names is not None and text is not None:
            warn_of_same_embeddings(names, text)
        asked: dict[str, Any] = {
            "logit_scale": float(getattr(encoder, "logit_scale", 100.0)),
            "logit_bias": float(getattr(encoder, "logit_bias", 0.0) or 0.0),
            "link": link_of(encoder),
        }
        own = {name: value for name, value in asked.items() if name in self._of_encoder}
        fitted = train(
            layers,
            encoder,
            images,
            text,
            training=options,
            crops=crops,
            seed=seed,
            logit_scale=float({"logit_scale": self.logit_scale, **own}["logit_scale"]),
            similarity_weight=similarity_weight,
            hidden=hidden,
            batch_size=self.batch_size,
            image_size=image_size,
            model_transform=model_transform,
            encoder_transform=encoder_transform,
            cache_dir=cache_dir,
            memory_budget=memory_budget,
            show_progress=show_progress,
        )
        self.translator, self.history_, self.held_out_ = fitted.translator, fitted.history, fitted.held_out
        self.concepts, self.text_embeddings, self.presence_ = names, text, None
        for name, value in own.items():
            setattr(self, name, value)
        if names is not None:
            self._warn_of_words()
        return self

    def with_concepts(self, concepts: Sequence[str] | Vocabulary, encoder: Any) -> Self:
        """A copy with other concepts, without training.

        Args:
            concepts: unique names, any text that the encoder knows, or a Vocabulary, which is encoded in its templates.
            encoder: the encoder that the translator was fitted to.

        Raises:
            InputError: the encoder does not know a concept (named), concepts are empty or duplicate, or the width
                differs.
        """
        check_encoder(encoder, words=True)
        names, text = encode(concepts, encoder)
        made = self._copy(names, text, {})
        made._warn_of_words()
        return made

    def with_options(self, **changed: Any) -> Self:
        """A copy with other options of the constructor, such as ``map_layer`` or ``gradient``.

        Raises:
            InputError: an option is unknown, or a value is not allowed.
        """
        _refuse({name: value for name, value in changed.items() if name not in _OPTIONS})
        return self._copy(self.concepts, self.text_embeddings, changed)

    def calibrate(self, images: Any, labels: Any) -> Self:
        """Fit :meth:`presence` to your own labels instead of the encoder's predictions, in place.

        Args:
            images: as for :meth:`attribute`; a few hundred that are not among the training images.
            labels: the concepts in each image, as ``(N, T)`` of 0 and 1 (NaN: unknown), or N lists of names.

        Returns:
            This map.
        """
        images = self._opened(images)
        table = presence_table(labels, self._names(), count(images))
        trust = self._trust()
        logits = self.logits(images).float().cpu()
        finite_images(logits, range(len(logits)), "the score")
        values = odds(trust.bank.to(torch.zeros(())), logits)
        known = ~table.isnan()
        seen = int(known.any(1).sum())
        self.presence_ = Curve.fit(values[known], table[known], seen, f"{seen} labeled images")
        return self

    def presence(self, inputs: Any, *, additional_forward_args: Any = None) -> Tensor | None:
        """``(N, T)`` probability that each concept is present; None if it was not measured.

        It is fitted to the encoder's predictions on held-out images of :meth:`fit` and on crops of them, or to labels
        (:meth:`calibrate`), and does not exceed the highest rate observed there.
        """
        return self._presence(self.logits(inputs, additional_forward_args=additional_forward_args))

    @property
    def reliability_(self) -> Tensor | None:
        """``(T, 3)`` correlations of each concept's logit with the encoder's on held-out images, and 95 % intervals.

        None if the translator was not fitted here.
        """
        return self._trust().reliability

    @property
    def trust(self) -> str:
        """One sentence on the reliability of the scores."""
        if self.concepts is None:
            return "not measured: there are no concepts yet"
        trust, curve = self._trust(), self.presence_
        if curve is None and trust.images and not trust.no_better_than_chance:
            curve = trust.presence
        return trust.sentence() + (f"; presence from {curve.source}" if curve is not None else "")

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write translator, concepts, options, history and calibration to one safetensors file, atomically."""
        return file.save(path, self, {name: getattr(self, name) for name in _OPTIONS})

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        forward_func: Callable[..., Any],
        layers: Sequence[Layer] | None = None,
    ) -> Self:
        """Load a file that :meth:`save` wrote.

        Args:
            path: the file.
            forward_func: the same classifier.
            layers: needed only if the saved names do not identify the layers (modules of a plain function).

        Raises:
            FileNotFoundError: there is no such file.
            ArtifactError: the file is damaged, or was saved for another classifier or other layers.
        """
        with file.load(path, forward_func, layers) as saved:
            made = cls(forward_func, *saved.arguments, **saved.options)
            made.history_, made.held_out_, made.presence_ = saved.history, saved.held_out, saved.presence
            made._of_encoder = saved.of_encoder
        return made

    def __repr__(self) -> str:
        layers = [layer if isinstance(layer, str) else type(layer).__name__ for layer in self.layers]
        model = type(getattr(self.forward_func, "__self__", self.forward_func)).__name__
        names = None if self.concepts is None else list(self.concepts)
        words = "no concepts yet" if names is None else f"{len(names)} concepts: {', '.join(names[:5])}"
        more = ", ..." if names is not None and len(names) > 5 else ""
        fitted = "" if self.translator is not None else ", not fitted"
        return (
            f"ConceptFusionMap({model}, layers {', '.join(layers)}, map_layer={self.map_layer!r}{fitted})\n"
            f"  {words}{more}\n  trust: {self.trust}"
        )

    # ------------------------------------------------------------ what a call works with

    @property
    def layer(self) -> Sequence[Layer]:
        """``layers``, under the name that Captum's wrappers read and assign."""
        return self.layers

    @layer.setter
    def layer(self, value: Any) -> None:
        if isinstance(value, int) or (isinstance(value, str) and value in MAP_LAYERS):
            raise InputError(f"layer={value!r} is called map_layer={value!r} now")
        if isinstance(value, (str, nn.Module)) or not len(value):
            hint = f"; pass [{value!r}]" if isinstance(value, str) and value else ""
            raise InputError(f"layers must be a non-empty list of modules or names, got {value!r}{hint}")
        self.layers = value

    def __getattr__(self, name: str) -> Any:
        if name in _RENAMED:
            raise AttributeError(f"ConceptFusionMap.{name} is called {_RENAMED[name]} now")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _check(self) -> None:
        if isinstance(self.map_layer, (str, bool)):
            one_of("map_layer", self.map_layer, MAP_LAYERS, f"or an index from 0 to {len(self.layers) - 1}")
        else:
            integer("map_layer", self.map_layer, least=-len(self.layers), most=len(self.layers) - 1)
        one_of("link", self.link, (None, *LINKS))
        one_of("gradient", self.gradient, GRADIENTS)
        one_of("fill", self.fill, ablation.FILLS)
        one_of("class_probability", self.class_probability, ablation.CLASS_PROBABILITIES)
        integer("n_channels", self.n_channels)
        integer("batch_size", self.batch_size)
        if self.channel_share is not None:
            number("channel_share", self.channel_share, lambda v: 0 < v <= 1, "in (0, 1], or None")
        if self.logit_scale is not None:
            number("logit_scale", self.logit_scale, lambda v: 0 < v <= _MOST_LOGIT, f"in (0, {_MOST_LOGIT:g}]")
        if self.logit_bias is not None:
            most = f"from -{_MOST_LOGIT:g} to {_MOST_LOGIT:g}"
            number("logit_bias", self.logit_bias, lambda v: abs(v) <= _MOST_LOGIT, most)
        text = self.text_embeddings
        if self.translator is None and text is None and self.concepts is not None:
            unique_names(self.concepts, "concept")  # fit encodes them
        else:
            check_words(self.concepts, text, getattr(self.translator, "embedding_dim", None))

    def _layers(self) -> Layers:
        layers = Layers.resolve(
            self.forward_func, list(self.layers), layout=self.layout, prefix_tokens=self.prefix_tokens
        )
        if len(set(layers.modules)) != len(layers):
            raise InputError("layers contains one layer twice; pass each layer once")
        return layers

    def _names(self) -> list[str]:
        if self.translator is None:
            raise NotFittedError("this map does not have a translator yet; call fit(images, encoder, concepts)")
        if self.concepts is None:
            raise NotFittedError("there are no concepts yet; use with_concepts(concepts, encoder)")
        return list(self.concepts)

    def _trust(self) -> Trust:
        """The concepts and their calibration, cached until one of its inputs changes."""
        names = tuple(self._names())
        text, held_out = self.text_embeddings, self.held_out_
        scale = 100.0 if self.logit_scale is None else float(self.logit_scale)
        bias = 0.0 if self.logit_bias is None else float(self.logit_bias)
        link = self.link or "softmax"
        key = (names, text, held_out if self.calibrated else None, scale, bias, link)
        if self._known is None or any(
            one is not other and (isinstance(one, (Tensor, HeldOut)) or one != other)
            for one, other in zip(self._known[0], key, strict=True)
        ):
            assert text is not None
            unit = F.normalize(text.detach(), dim=1)
            bank = TextBank(names, unit, torch.full((len(names),), bias).to(unit), scale, link)
            self._known = (key, judge(bank, key[2]))
        return self._known[1]

    def _bank(self) -> TextBank:
        return self._trust().bank

    def _setup(self) -> Setup:
        self._check()
        trust = self._trust()
        count = len(self.layers)
        assert self.translator is not None
        share = ablation.SHARE if self.n_channels == ablation.PUBLISHED else 1.0
        return Setup(
            self._layers(),
            self.translator,
            trust.bank,
            self.map_layer % count if isinstance(self.map_layer, int) else None,
            self.map_layer == "fused",
            self.gradient == "branch",
            self.n_channels,
            share if self.channel_share is None else self.channel_share,
            self.fill,
            self.class_probability,
            self.batch_size,
        )

    def _opened(self, inputs: Any) -> Inputs | ImageSource:
        return as_inputs(inputs, find_model(self.forward_func))

    def _maps(self, inputs: Inputs | ImageSource, index: Tensor, extra: Any, of_input: bool = False) -> Tensor:
        with gradients_enabled():
            parts = [part.maps(index[rows]) for rows, part in self._setup().passes(inputs, extra, of_input)]
        return joined(parts).detach().contiguous()

    def _presence(self, logits: Tensor) -> Tensor | None:
        trust = self._trust()
        curve = trust.presence if self.presence_ is None else self.presence_
        return None if curve is None else curve(odds(trust.bank.to(logits), logits))

    def _layer_names(self, setup: Setup, selection: Selection, choice: Tensor) -> Any:
        """The layer of each map, empty for concepts not selected for an image."""
        if setup.fused:
            return "fused"
        if setup.fixed is not None:
            return setup.layers.names[setup.fixed]
        numbers = selection.spread(choice.float()).tolist()
        return tuple(tuple("" if n != n else setup.layers.names[int(n)] for n in row) for row in numbers)

    def _copy(self, concepts: Any, text: Tensor | None, changed: Mapping[str, Any]) -> Self:
        options = {name: getattr(self, name) for name in _OPTIONS} | dict(changed)
        made = type(self)(self.forward_func, self.layers, self.translator, concepts, text, **options)
        made.history_, made.held_out_, made.presence_ = self.history_, self.held_out_, self.presence_
        made._of_encoder = {name for name in self._of_encoder if name not in changed}
        return made

    def _warn_of_words(self) -> None:
        if self._trust().no_better_than_chance:
            warnings.warn(
                f"the translator does not detect these concepts: {self._trust().sentence()}. Do not rely on their "
                "scores; fit on more images, including images that show them",
                ConvergenceWarning,
                stacklevel=3,
            )


_OPTIONS = tuple(
    name
    for name, parameter in inspect.signature(ConceptFusionMap.__init__).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
)


def _refuse(options: Mapping[str, Any]) -> None:
    """Raise for options that are unknown or were renamed."""
    for name in options:
        if name in _RENAMED:
            raise InputError(f"ConceptFusionMap: {name}= is called {_RENAMED[name]} now")
        raise InputError(f"ConceptFusionMap has no option {name!r}.{did_you_mean(name, _OPTIONS)}")
