"""What a SALFCBM says about its decisions: rules, contributions, regions, and what an edit would change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_concepts._captum import target_indices
from captum_concepts.activations import check_images, evaluation_mode
from captum_concepts.activations.spatial import full_precision
from captum_concepts.errors import InputError
from captum_concepts.explanation import ConceptExplanation
from captum_concepts.models._salf_core import SALFCore
from captum_concepts.models._salf_edits import count, leading, parse_edits
from captum_concepts.models._salf_names import concept_positions
from captum_concepts.models._salf_regions import coverage, pooled_upsampling, region_mask

METHOD = "SALFCBM"


class SALFExplanations(SALFCore):
    """Explanations of the decisions; each is one forward of the backbone, in evaluation mode and without gradients."""

    def contributions(self, x: Tensor, target: Any = None) -> Tensor:
        r"""``(N, M)``: how much each concept moves the logit of ``target``, :math:`S(x, m, l) = W_{lm} c^*_m(x)`.

        The logit is their sum plus the head's bias.

        Args:
            x: images.
            target: a class (index or name), or one for each image; None takes the predicted ones.

        Raises:
            TargetError: wrong type, length or range (an ``AssertionError`` as well).
        """
        _, activations, logits = self._look(x)
        return self._shares(activations, self._target(target, logits))

    def explain(
        self,
        x: Tensor,
        target: Any = None,
        top_k: int | None = 5,
        *,
        concepts: str | int | Sequence[str | int] | None = None,
    ) -> ConceptExplanation:
        """What the model saw, where, and how much it moved the logit of ``target``.

        Args:
            x: images.
            target: as in :meth:`contributions`.
            top_k: keep the concepts with the highest absolute contributions; the columns are shared by all images, so
                a concept ranks by its best one. None keeps all; ``explanation[i].top(5, by="contributions")`` are then
                the five of image ``i``.
            concepts: explain just these (names or indices), in this order; ``top_k`` is then ignored.

        Returns:
            ``scores``: the standardised activations c*; ``maps``: the concept maps on the grid, in the units of the
            bottleneck; ``contributions``; ``target``.

        Raises:
            TargetError: as in :meth:`contributions`.
            InputError: ``top_k`` below 1, or an unknown concept (the nearest names are offered).
        """
        features, activations, logits = self._look(x)
        return self._explanation(features, activations, self._target(target, logits), top_k, concepts)

    def explain_classes(
        self, x: Tensor, classes: Sequence[str | int], top_k: int | None = 5
    ) -> dict[str | int, ConceptExplanation]:
        """Several classes of the same images, from one forward.

        Args:
            x: images.
            classes: names or indices.
            top_k: as in :meth:`explain`, for each class.

        Returns:
            An explanation for each class, under what it was called by.
        """
        if isinstance(classes, (str, int)):
            raise InputError(f"classes must be a list of classes, got {classes!r}")
        features, activations, logits = self._look(x)
        targets = {key: self._target(key, logits) for key in classes}
        return {key: self._explanation(features, activations, target, top_k) for key, target in targets.items()}

    def explain_region(
        self,
        x: Tensor,
        *,
        points: Any = None,
        boxes: Any = None,
        mask: Any = None,
        top_k: int | None = 5,
        target: Any = None,
        standardize: bool = True,
        reduction: str = "mean",
    ) -> ConceptExplanation:
        r"""What the model saw in a region ("Explain Anything"), strongest concept first.

        With the region :math:`I` in pixels and the concept maps enlarged bilinearly to the image, a concept scores

        .. math:: a(x, m \mid I) = \frac{1}{\sum I} \sum I \odot \frac{c(x)_m - \mu_m}{\sigma_m}

        The published score is the plain sum :math:`\sum I \odot c(x)_m` (``standardize=False, reduction="sum"``). The
        loss of a bottleneck leaves scale and zero of each map free, so plain sums compare concepts only where training
        brought them to one scale, as :func:`~captum_concepts.fit_salf_cbm` about does: there both rank
        nearly alike.

        Args:
            x: images ``(N, C, H, W)``.
            points: ``(x, y)`` in pixels, x the column from the left and y the row from the top, ``0 <= x < W``,
                ``0 <= y < H``; one or a list ``(P, 2)``, for all images, or such a list for each. A point stands for
                the cell of the grid that holds it.
            boxes: ``(x0, y0, x1, y1)`` in pixels, from the left and top border to the right and bottom one (pixel x
                covers [x, x+1)); one or a list ``(B, 4)``, or a list for each image. Parts outside are cut off.
            mask: ``(H, W)`` or ``(N, H, W)`` of the image's size: bool, integers (not 0 is the region), or the share
                in [0, 1] of each pixel.
            top_k: how many concepts; None for all.
            target: class of the contributions, as in :meth:`contributions`.
            standardize: compare concepts in standard deviations of their pooled activation over the training data.
            reduction: ``"mean"`` or ``"sum"`` over the region's pixels.

        Returns:
            ``scores`` a(x, m | I), ``maps`` as in :meth:`explain`; ``contributions`` is the region's part of
            :meth:`contributions`: over regions that tile the image, the parts add up to the whole.

        Raises:
            InputError: no region or two kinds, one outside of the image, empty, or of a wrong shape.
        """
        if points is None and boxes is None and mask is None:
            raise InputError("give the region as points=, boxes= or mask=; explain() explains the whole image")
        if reduction not in ("mean", "sum"):
            raise InputError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
        area = self._region(x, points, boxes, mask)
        features, _, logits = self._look(x)
        weights = pooled_upsampling(area, self.grid).to(features.device)
        share = coverage(area, self.grid).to(features.device)
        with torch.no_grad():
            mean, std = full_precision(self.concept_mean), full_precision(self.concept_std)
            total = weights.sum((1, 2))[:, None]
            scores = self._weighted(features, weights / total[..., None])
            if standardize:
                scores = (scores - mean) / std
            if reduction == "sum":
                scores = scores * total
            part = share.mean((1, 2))[:, None]
            inside = (self._weighted(features, share / share[0].numel()) - part * mean) / std
            index = self._target(target, logits)
            columns = leading(scores, top_k)
            return ConceptExplanation(
                [self.concepts[j] for j in columns],
                scores[:, columns],
                self._maps_of(features, columns),
                self._shares(inside, index)[:, columns],
                index,
                self.layer,
                METHOD,
            )

    def intervene(
        self,
        x: Tensor,
        concept: Any,
        *,
        beta: float | Sequence[float] | None = None,
        points: Any = None,
        boxes: Any = None,
        mask: Any = None,
        standardize: bool = False,
    ) -> tuple[Tensor, Tensor]:
        r"""What the model would say if it saw more or less of a concept in a region.

        .. math:: c(x)_m \leftarrow c(x)_m + \beta I

        Args:
            x: images.
            concept: a name or index; a list of them, edited in the same region; or a list of edits with regions of
                their own: ``[{"concept": "wheel", "beta": 2.0, "boxes": (0, 0, 90, 60)}, ...]``. All edits act at once.
            beta: what is added to the map inside the region; one number, or one for each concept of a list. Negative
                numbers take away.
            points, boxes, mask: the region, as in :meth:`explain_region`; none means the whole image.
            standardize: ``beta`` counts the concept's standard deviations ``concept_std`` instead of the map's own
                units: 1 over the whole image then raises its activation c* by 1.

        Returns:
            ``(logits_before, logits_after)``, each ``(N, num_classes)``.

        Raises:
            InputError: unknown concept (the nearest names are offered); ``beta`` missing, not finite or not one for
                each concept; a region as in :meth:`explain_region`.
        """
        regions = {"points": points, "boxes": boxes, "mask": mask}
        edits = parse_edits(concept, beta, regions, self.concepts)
        std = full_precision(self.concept_std)
        shift = std.new_zeros(x.shape[0], len(self.concepts))
        for row, amount, where in edits:
            area = self._region(x, **where).mean((1, 2)).to(shift)  # of the image; that is what pooling leaves of I
            shift[:, row] += amount * area / (1.0 if standardize else std[row])
        _, activations, logits = self._look(x)
        with torch.no_grad(), evaluation_mode(self):
            edited = full_precision(activations) + shift
            return logits, self.head(edited.to(activations.dtype))

    def decision_rules(self, class_index: str | int, top_k: int | None = None) -> list[tuple[str, float]]:
        """The concepts that decide for or against a class: ``(concept, weight)``, strongest first, none of weight 0.

        Args:
            class_index: index or name of the class.
            top_k: how many; None for all.

        Raises:
            TargetError: no such class.
        """
        row = int(target_indices(class_index, 1, self.num_classes, self.class_names or (), what="class")[0])
        weights = full_precision(self._head_weight()[row].detach())
        order = torch.argsort(weights.abs(), descending=True, stable=True).tolist()
        rules = [(self.concepts[j], float(weights[j])) for j in order if weights[j] != 0]
        return rules if top_k is None else rules[: count(top_k)]

    def _look(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features, activations and logits of one forward."""
        check_images(x)
        with torch.no_grad(), evaluation_mode(self):
            features = self.features(x)
            activations = self._standardize(self._pool(features))
            return features, activations, self.head(activations)

    def _target(self, target: Any, logits: Tensor) -> Tensor:
        if target is None:
            return logits.argmax(1)
        names = self.class_names or ()
        return target_indices(target, len(logits), self.num_classes, names, what="class").to(logits.device)

    def _head_weight(self) -> Tensor:
        if not isinstance(self.head, nn.Linear):
            raise InputError(f"contributions need a linear head, but head is a {type(self.head).__name__}")
        return self.head.weight

    def _shares(self, activations: Tensor, target: Tensor) -> Tensor:
        return full_precision(self._head_weight().detach())[target] * full_precision(activations)

    def _explanation(
        self, features: Tensor, activations: Tensor, target: Tensor, top_k: int | None, concepts: Any = None
    ) -> ConceptExplanation:
        shares = self._shares(activations, target)
        if concepts is None:
            columns = leading(shares.abs(), top_k)
        else:
            columns = concept_positions(concepts, self.concepts)
        return ConceptExplanation(
            [self.concepts[j] for j in columns],
            full_precision(activations)[:, columns],
            self._maps_of(features, columns),
            shares[:, columns],
            target,
            self.layer,
            METHOD,
        )

    def _maps_of(self, features: Tensor, columns: list[int]) -> Tensor:
        """The maps of some concepts; those of the others are not computed."""
        with torch.no_grad(), evaluation_mode(self.bottleneck):
            if not self._is_pointwise() or len(columns) == len(self.concepts):
                return full_precision(self.bottleneck(features))[:, columns]
            weight, bias = self.bottleneck.weight, self.bottleneck.bias
            return full_precision(F.conv2d(features, weight[columns], None if bias is None else bias[columns]))

    def _weighted(self, features: Tensor, weights: Tensor) -> Tensor:
        """``(N, M)``: sums over the grid of the concept maps times ``weights`` (N, h, w)."""
        with evaluation_mode(self.bottleneck):
            if not self._is_pointwise() or self.bottleneck.bias is not None:
                maps = full_precision(self.bottleneck(features))
                return torch.einsum("nmhw,nhw->nm", maps, weights.to(maps))
            wide = full_precision(features)
            pooled = torch.einsum("ndhw,nhw->nd", wide, weights.to(wide))
            return full_precision(self.bottleneck(pooled.to(features.dtype)[..., None, None]).flatten(1))

    def _region(self, x: Tensor, points: Any = None, boxes: Any = None, mask: Any = None) -> Tensor:
        if not isinstance(x, Tensor) or x.ndim != 4:
            raise InputError(f"images must be a batch (N, C, H, W), got {getattr(x, 'shape', type(x).__name__)}")
        size = (x.shape[-2], x.shape[-1])
        return region_mask(x.shape[0], size, self.grid, points=points, boxes=boxes, mask=mask)
