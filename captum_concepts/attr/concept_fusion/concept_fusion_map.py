"""CE-FAM: what concepts a classifier saw, where, and how much each moved the prediction, for any words."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from captum_concepts._captum import log_usage
from captum_concepts.activations import check_images, gradients_enabled, layer_name
from captum_concepts.activations.capture import Inputs, Layer
from captum_concepts.attr.concept_fusion import ablation as ablation
from captum_concepts.attr.concept_fusion.base import check_concepts, check_layers, class_indices
from captum_concepts.attr.concept_fusion.scores import ConceptScores
from captum_concepts.errors import InputError, InputWarning
from captum_concepts.explanation import ConceptExplanation

PROBABILITIES = ("softmax", "sigmoid")
GRADIENTS = ("total", "branch")


class ConceptFusionMap(ConceptScores):
    r"""What, where and how much: zero-shot concepts of a classifier in one-to-one correspondence (CE-FAM).

    A translator h maps the pooled activations :math:`z^l` of the classifier's layers to the embedding of an
    image-text model. A concept is any text t:

    - *what*: logit :math:`S^t = \text{scale} \cos(h(z), t) + \text{bias}`, and its softmax over the concepts (CLIP) or
      its sigmoid (SigLIP): :meth:`scores`.
    - *where*: :math:`R^t_l = \mathrm{ReLU}(\sum_k \beta_k A^l_k)` with :math:`\beta_k` the spatial mean of
      :math:`\partial S^t / \partial A^l_k`: :meth:`attribute`.
    - *how much*: channels of the layer are taken away in the order of :math:`\beta_k z_k`; the mean relative drop of
      the class probability over the first 1..K of them: :meth:`contribution`. Negative: the concept spoke against the
      class.

    Args:
        forward_func: the classifier, giving logits ``(N, classes)``: a module, one of its methods, or any callable.
        layers: the layers read by the translator, as modules or dotted names, in the translator's order. They need not
            lie on one path. For a ViT: the last block's tokens behind the final norm.
        translator: a fitted :class:`ConceptTranslator`, or any module from a list of ``(N, C_l)`` to ``(N, D)``.
        concepts: T unique names, or None for a translator without words yet (see :meth:`with_concepts`).
        text_embeddings: ``(T, D)``, in any length; None with ``concepts=None``.
        logit_scale, logit_bias: of the image-text model (CLIP: about 100 and 0).
        probability: ``"softmax"`` or ``"sigmoid"``. Under a softmax, one concept alone always scores 1 (a warning says
            so); its map is as good as ever, its layer relevance is 0 and the last layer is taken.
        gradient: ``"total"`` (published): :math:`\partial S / \partial A^l` also through the layers behind l;
            ``"branch"``: every :math:`z^l` is a free input, so no backward pass enters the classifier. At the last
            layer they agree.
        layer: where maps come from. ``"auto"``: each concept's most relevant layer (published); an index into (or a
            member of) ``layers``; ``"fused"``: all layers, see below.
        n_channels: K, channels taken away for relevance and contribution.
        channel_share: at most this share of a layer's channels is taken (at least one), so that a narrow layer is not
            simply emptied. None: a quarter for the published K = 20, no limit for a K of your own. On scenes with a
            planted ground the largest contribution is the ground's for a biased network in 56 % and for an unbiased
            one in 12 % (without a limit, 20 of a first layer's 24 channels: 42 % and 37 %; ``layer=-1``: 70 % and 6 %).
        fill: what a channel is replaced by in the classifier: ``"layer_mean"`` (the mean of the layer's pooled vector),
            ``"channel_mean"`` (its own mean, which keeps the pooled value) or ``"zero"``.
        chunk_size: bound of images, and of images x concepts, in flight at once. Results do not depend on it beyond
            rounding.
        layout, prefix_tokens: how layers are read, as in :class:`FeatureActivationMap`.

    Fused regions (``layer="fused"``). The published map weights whole channels by one number each, in one layer, and
    on real photographs falls behind maps that know no concept. Here, at every layer, the evidence of a position is

    .. math:: E_l = \sum_k A^l_k \, \frac{\partial S'}{\partial A^l_k}, \qquad
        S' = S^t - \tfrac12 \, u \log \sum_{s \ne t} \exp(S^s / u), \quad u = 3

    with its sign (HiResCAM's product; rectifying the gradient first finds objects, not the concept); the second term
    takes away what speaks for other likely concepts as well. The positive parts of all layers are added with equal
    energy, for late layers know the concept and early ones its place; less where the concept's relevance lies in front
    of a layer, and as far as a layer agrees with the others. One more layer is what the translator says of each cell
    alone: a gradient tells what would change the concept, this what is seen there. What is found is mostly the telling
    part of a thing; three steps of a random walk on the network's own feature affinity (and the image's colours, on a
    grid finer than coarse layers have) spread it over the rest of the thing. A walk averages, so it invents no
    evidence: without any, the map is zero. Values are shares of the map's strongest position, in [0, 1].

    Prefer ``"fused"`` where the region is what you want: in every comparison so far (photographs and drawn scenes, CNN
    and ViT; ``benchmarks/results/concept_regions_*.md``) its NRA and its specificity are above the published one's,
    and deleting it lowers the concept's logit more. Prefer ``"auto"`` for the published method, or where the region
    must belong to the one layer whose channels :meth:`contribution` takes away.

    Attributes:
        history_: of :meth:`fit`: lists ``"train_loss"``, ``"val_loss"``, ``"val_cosine"``, ``"lr"``, an entry an epoch.

    Raises:
        InputError: empty, duplicate or unnamed concepts; texts that fit neither them nor the translator; an option that
            does not exist.

    Reference:
        *CE-FAM: Concept-Based Explanation via Fusion of Activation Maps.* ICCV 2025, arXiv:2509.23849.

    Example:
        >>> from captum_concepts.attr.concept_fusion_map import ConceptFusionMap
        >>> from captum_concepts.models import ConceptTranslator
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
        >>> translator = ConceptTranslator([8], 4, hidden=(16, 16))
        >>> cefam = ConceptFusionMap(net, ["1"], translator, ["sky", "sea"], torch.eye(4)[:2])
        >>> images = torch.rand(2, 3, 16, 16)
        >>> cefam.attribute(images, target="sea").shape, cefam.attribute(images).shape
        (torch.Size([2, 1, 14, 14]), torch.Size([2, 2, 14, 14]))
        >>> cefam.contribution(images, target=3).shape
        torch.Size([2, 2])
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layers: Sequence[Layer],
        translator: nn.Module,
        concepts: Sequence[str] | None,
        text_embeddings: Tensor | None,
        *,
        logit_scale: float = 100.0,
        logit_bias: float = 0.0,
        probability: str = "softmax",
        gradient: str = "total",
        layer: Layer | int = "auto",
        n_channels: int = ablation.PUBLISHED,
        channel_share: float | None = None,
        fill: str = "layer_mean",
        chunk_size: int = 32,
        layout: str = "auto",
        prefix_tokens: int | None = None,
    ) -> None:
        super().__init__(forward_func, layer)
        for name, value, allowed in (
            ("probability", probability, PROBABILITIES),
            ("gradient", gradient, GRADIENTS),
            ("fill", fill, ablation.FILLS),
        ):
            if value not in allowed:
                raise InputError(f"{name} must be one of {allowed}, got {value!r}")
        if n_channels < 1 or chunk_size < 1:
            raise InputError(f"n_channels and chunk_size must be at least 1, got {n_channels} and {chunk_size}")
        if channel_share is not None and not 0 < channel_share <= 1:
            raise InputError(f"channel_share must be in (0, 1], or None, got {channel_share}")
        self.layers = layers
        self.translator = translator
        self.concepts = concepts
        self.text_embeddings = text_embeddings
        self.logit_scale = logit_scale
        self.logit_bias = logit_bias
        self.probability = probability
        self.gradient = gradient
        self.n_channels = n_channels
        self.channel_share = channel_share
        self.fill = fill
        self.chunk_size = chunk_size
        self.layout = layout
        self.prefix_tokens = prefix_tokens
        self.history_: dict[str, list[float]] | None = None
        check_layers(forward_func, layers)
        self._layer_index()
        check_concepts(concepts, text_embeddings, getattr(translator, "embedding_dim", None))
        if concepts is not None and len(concepts) == 1 and probability == "softmax":
            warnings.warn(
                f"a softmax over the single concept {concepts[0]!r} is always 1; add concepts it competes with, or use "
                "probability='sigmoid'",
                InputWarning,
                stacklevel=2,
            )

    @log_usage()
    def attribute(
        self,
        inputs: Inputs,
        target: Any = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
    ) -> Tensor:
        """Where each concept is.

        Args:
            inputs: images as ``forward_func`` takes them, or a tuple of tensors.
            target: a concept, by index or name, or one for each example (1-d tensor or list). None: all T.
            additional_forward_args: passed to ``forward_func`` after the inputs.
            attribute_to_layer_input: read the layers' inputs; the translator must have been fitted on those.

        Returns:
            ``(N, 1, h, w)`` for one concept an example, ``(N, T, h, w)`` for None; at least 0, fp32 (or fp64). The grid
            is the layer's own where ``layer`` is an index; the finest of ``layers`` for ``"auto"``; a whole
            multiple or fraction of that with at most 1,024 positions for ``"fused"``.

        Raises:
            TargetError: a target of wrong type, length or range (an ``AssertionError`` as well).
            LayerError: an unknown, unreached or repeated layer, or one without a grid.
        """
        batch = len(check_images(inputs)[0])
        index = self._concept_index(target, batch)
        parts = []
        with gradients_enabled():
            for start, own, _, seen in self._passes(inputs, additional_forward_args, attribute_to_layer_input):
                parts.append(self._maps(seen, index[start : start + len(seen.embedding)], own))
        return torch.cat(parts).detach().contiguous()

    def contribution(
        self,
        inputs: Inputs,
        target: Any = None,
        concepts: Sequence[str | int] | None = None,
        *,
        return_curve: bool = False,
        additional_forward_args: Any = None,
    ) -> Any:
        """How much each concept moved the probability of a class.

        Args:
            inputs: images.
            target: the class, as Captum accepts it; None: each example's predicted class.
            concepts: names or indices; None: all T.
            return_curve: also return the drop after 0, 1, ..., K channels.

        Returns:
            ``(N, T)``: mean over i = 1..K of (p_0 - p_i) / p_0 of the class' softmax probability (of the sigmoid for a
            model with one output), at most 1; negative where the concept speaks against the class. With
            ``return_curve`` also ``(N, T, n_channels + 1)``, from 0 on; constant beyond the layer's channels.

        Raises:
            LayerError: the output does not depend on the chosen layer.
        """
        batch = len(check_images(inputs)[0])
        index = torch.tensor(self._columns(concepts)).expand(batch, -1)
        parts = []
        with gradients_enabled():
            for start, own, extra, seen in self._passes(inputs, additional_forward_args):
                stop = start + len(seen.embedding)
                classes = class_indices(target, seen.seen.output, start, stop, batch)
                _, choice, ranked = self._channels(seen, index[start:stop], maps=False, ranks=True)
                parts.append(self._curves(seen, own, extra, choice, ranked, classes))
        value, curve = (torch.cat(part).detach() for part in zip(*parts, strict=True))
        return (value, curve) if return_curve else value

    def explain(
        self,
        inputs: Inputs,
        target: Any = None,
        top_k: int = 8,
        concepts: Sequence[str | int] | None = None,
        additional_forward_args: Any = None,
        *,
        contributions: bool = True,
    ) -> ConceptExplanation:
        """What, where and how much together.

        Args:
            inputs: images.
            target: the class whose probability contributions refer to; None: each example's predicted class.
            top_k: how many concepts, those of the highest scores over the examples.
            concepts: explain just these (names or indices), in this order; ``top_k`` is then ignored.
            contributions: False leaves the ablations of the classifier out: what and where alone.

        Returns:
            Scores, maps and contributions; ``layer`` names, for each example and concept, where they come from. Scores
            of the chosen concepts are those among all T.
        """
        batch = len(check_images(inputs)[0])
        if concepts is None and top_k < 1:
            raise InputError(f"top_k must be at least 1, got {top_k}")
        fused = isinstance(self.layer, str) and self.layer == "fused"
        maps, values, targets = [], [], []
        layers: list[tuple[str, ...]] = []
        names = [layer_name(self.forward_func, layer) for layer in self.layers]
        with gradients_enabled():
            passes: Any = self._passes(inputs, additional_forward_args)
            if batch <= self.chunk_size:  # one forward for all
                passes = list(passes)
                h = passes[0][-1].embedding.detach()
                scores = self._probability(self._space(h).logits(h))
            else:
                scores = self.scores(inputs, additional_forward_args)
            if concepts is None:
                columns = scores.amax(0).argsort(dim=0, descending=True, stable=True)[:top_k].tolist()
            else:
                columns = self._columns(concepts)
            index = torch.tensor(columns).expand(batch, -1)
            for start, own, extra, seen in passes:
                stop = start + len(seen.embedding)
                part = index[start:stop]
                regions = self._maps(seen, part, own) if fused else None
                if contributions or not fused:
                    made, choice, ranked = self._channels(seen, part, maps=not fused, ranks=contributions)
                    regions = made if regions is None else regions
                    layers.extend(tuple(names[number] for number in row) for row in choice.tolist())
                maps.append(regions)
                if contributions:
                    targets.append(class_indices(target, seen.seen.output, start, stop, batch))
                    values.append(self._curves(seen, own, extra, choice, ranked, targets[-1])[0])
        return ConceptExplanation(
            [self._names()[column] for column in columns],
            scores[:, columns],
            torch.cat([value for value in maps if value is not None]).to(scores.device),
            torch.cat(values).to(scores.device) if contributions else None,
            torch.cat(targets).to(scores.device) if contributions else None,
            "fused" if fused else tuple(layers),
            self.get_name(),
        )
