"""The resolved layers, concepts and options of one ConceptFusionMap call, and its computations."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_concepts._captum import target_indices
from captum_concepts._checks import take_rows
from captum_concepts.activations import Inputs, Layers
from captum_concepts.activations.capture import images_among
from captum_concepts.attr.batches import count, in_parts
from captum_concepts.attr.concept_fusion import ablation, regions
from captum_concepts.attr.concept_fusion.gradients import ConceptPass, concept_pass
from captum_concepts.attr.concept_fusion.local import read_locally
from captum_concepts.attr.concept_fusion.words import TextBank
from captum_concepts.errors import InputError
from captum_concepts.images import ImageSource


@dataclass(frozen=True, eq=False)
class Setup:
    """The resolved arguments of one call.

    Args:
        layers: of the classifier, in the translator's order.
        translator: maps a list of ``(N, C_l)`` to ``(N, D)``.
        bank: the concepts.
        fixed: index of the layer that maps come from; None: each concept's most relevant one.
        fused: fuse the maps of all layers.
        branch: use gradients of the translator alone.
        n_channels, share: number of channels to ablate, see :func:`~ablation.rank_channels`.
        fill, class_probability: see :class:`ConceptFusionMap`.
        batch_size: maximum number of images, and of images times concepts, at once.
    """

    layers: Layers
    translator: nn.Module
    bank: TextBank
    fixed: int | None
    fused: bool
    branch: bool
    n_channels: int
    share: float
    fill: str
    class_probability: str
    batch_size: int

    def passes(
        self, inputs: Inputs | ImageSource, extra: Any, of_input: bool = False, *, gradient: bool = True
    ) -> Iterator[tuple[slice, Part]]:
        """Parts of at most ``batch_size`` examples, each with its rows in the batch."""
        batch = count(inputs)
        for rows, own in in_parts(inputs, self.batch_size, self.layers.model):
            own_extra = take_rows(extra, rows, batch)
            seen = concept_pass(
                self.layers,
                self.translator,
                own,
                branch=self.branch or not gradient,
                additional_forward_args=own_extra,
                attribute_to_layer_input=of_input,
            )
            width = self.bank.direction.shape[1]
            if seen.embedding.shape[1] != width:
                raise InputError(
                    f"text_embeddings have width {width}, but the translator returns {seen.embedding.shape[1]}; pass "
                    "embeddings of the vision-language model it was fitted to"
                )
            yield rows, Part(self, own, own_extra, seen)


@dataclass(frozen=True, eq=False)
class Part:
    """Some examples after one forward pass, and the computations on them.

    Args:
        setup: the call's resolved arguments.
        inputs, extra: the examples and the classifier's additional arguments.
        seen: the forward pass of classifier and translator.
    """

    setup: Setup
    inputs: Inputs
    extra: Any
    seen: ConceptPass

    @property
    def bank(self) -> TextBank:
        """The concepts, on the embedding's device."""
        return self.setup.bank.to(self.seen.embedding.detach())

    @functools.cached_property
    def link(self) -> str:
        """The link from the classifier's output to probabilities."""
        return ablation.class_link(self.setup.class_probability, self.seen.seen.output, self.seen.seen.final)

    def logits(self) -> Tensor:
        """``(N, T)`` logits of the concepts."""
        return self.bank.logits(self.seen.embedding.detach())

    def classes(self, target: Any, rows: slice, batch: int) -> Tensor:
        """``(N,)`` classes of these rows, from the ``target`` of the whole batch; None: the predicted ones."""
        output = self.seen.seen.output
        _ = self.link  # checks the output's shape
        count = 1 if output.ndim == 1 else output.shape[1]
        if target is None:
            return torch.zeros(len(output), dtype=torch.long) if output.ndim == 1 else output.detach().argmax(1).cpu()
        return target_indices(target, batch, count, what="class")[rows]

    def class_probability(self, classes: Tensor) -> Tensor:
        """``(N,)`` probabilities of ``classes`` from the classifier."""
        output = self.seen.seen.output.detach()
        link = self.link
        each = zip(output.split(1), classes.tolist(), strict=True)
        return torch.cat([ablation.class_log_probability(one, target, link).exp() for one, target in each])

    def layer_relevance(self, index: Tensor) -> Tensor:
        """``(N, J, L)`` relevance of the layers to the concepts ``index``."""
        rows = [self._relevance(self._ranked(betas), part) for part, betas, _ in self._chunks(index)]
        return torch.cat(rows, 1).detach()

    def maps(self, index: Tensor) -> Tensor:
        """``(N, J, h, w)`` maps of the concepts ``index``."""
        return self.explained(index, contributions=False)[0]

    def explained(self, index: Tensor, *, contributions: bool, maps: bool = True) -> tuple[Tensor, Tensor, Channels]:
        """Maps ``(N, J, h, w)``, the layer of each concept ``(N, J)``, and the channels :meth:`contributions` needs.

        Results that are not requested are empty. Channels are ranked once, for relevance and contributions.
        """
        fixed = self.setup.fixed
        only = fixed if fixed is not None or len(self.setup.layers) > 1 else 0
        grids = [layout.grid for layout in self.seen.seen.layouts]
        grid = regions.finest_grid(grids) if fixed is None else grids[fixed]
        found, choices, rankings = [], [], []
        fused = self._fused(index) if maps and self.setup.fused else None
        if fused is not None and not contributions:
            return fused, torch.zeros(index.shape, dtype=torch.long), []
        for part, betas, _ in self._chunks(index, only=only):
            ranked = self._ranked(betas, only) if contributions or only is None else []
            if only is None:
                relevance = self._relevance(ranked, part)  # the last of equally relevant layers
                choices.append(relevance.shape[-1] - 1 - relevance.flip(-1).argmax(-1))
            else:
                choices.append(torch.full(part.shape, only, device=part.device))
            if maps and fused is None:
                choice = choices[-1].to(self.seen.maps[0].device)
                found.append(regions.published_maps(betas, self.seen.maps, choice, grid))
            rankings.append(ranked)
        drawn = fused if fused is not None else torch.cat(found, 1).detach() if maps else torch.zeros(())
        channels = [torch.cat(parts, 1) for parts in zip(*rankings, strict=True)]
        return drawn, torch.cat(choices, 1), channels

    def contributions(self, choice: Tensor, channels: Channels, classes: Tensor) -> tuple[Tensor, Tensor]:
        """``(N, J)`` contributions and ``(N, J, K + 1)`` curves, K at most the channels of the widest layer."""
        setup, seen = self.setup, self.seen
        length = min(setup.n_channels, max(pooled.shape[-1] for pooled in seen.pooled))
        curve = seen.maps[0].new_zeros((*choice.shape, length + 1))
        mean = seen.maps[0].new_zeros(choice.shape)
        sizes = [maps[0].numel() for maps in seen.maps]
        link, batch = self.link, len(choice)
        for i in range(batch):
            one = slice(i, i + 1)
            for number in choice[i].unique().tolist():
                here = choice[i] == number
                drops = ablation.contribution_curves(
                    setup.layers[number],
                    seen.seen.layouts[number],
                    take_rows(self.inputs, one, batch),
                    take_rows(self.extra, one, batch),
                    seen.pooled[number][i],
                    channels[number][i][here],
                    int(classes[i]),
                    seen.seen.output[one],
                    link=link,
                    fill=setup.fill,
                    # A small layer allows more copies in the memory that the largest needs for batch_size.
                    rows=setup.batch_size * max(1, max(sizes) // sizes[number]),
                ).to(curve)
                mean[i, here] = drops.mean(-1)
                padded = F.pad(drops, (1, 0))
                missing = length - drops.shape[-1]
                curve[i, here] = F.pad(padded.unsqueeze(1), (0, missing), "replicate")[:, 0]
        return mean, curve

    def _chunks(
        self, index: Tensor, *, fused: bool = False, only: int | None = None
    ) -> Iterator[tuple[Tensor, list[Tensor], list[Tensor]]]:
        """``(index, betas, evidence)`` of one bounded part of the concepts after another.

        Args:
            fused: with contrast and evidence.
            only: the single layer to differentiate at; the other betas are zero.
        """
        h, bank = self.seen.embedding.detach(), self.bank
        # Without a pass through the classifier and without relevances, rows are cheap.
        room = self.setup.batch_size * (16 if self.seen.branch and only is not None else 1)
        chunk = max(1, room // len(h))
        derive = self.seen.derivatives(index.shape[1], chunk=chunk, evidence=fused, only=only)
        contrast = regions.CONTRAST if fused else 0.0
        for part in index.to(h.device).split(chunk, 1):
            yield (part, *derive(bank.slopes(h, part, contrast, regions.TEMPERATURE)))

    def _ranked(self, betas: Sequence[Tensor], only: int | None = None) -> Channels:
        """The channels to ablate per layer, strongest first; empty for layers other than ``only``."""
        setup = self.setup
        return [
            ablation.rank_channels(beta, z, setup.n_channels, setup.share)
            if only in (None, number)
            else torch.zeros((*beta.shape[:2], 0), dtype=torch.long)
            for number, (beta, z) in enumerate(zip(betas, self.seen.pooled, strict=True))
        ]

    def _relevance(self, ranked: Channels, index: Tensor) -> Tensor:
        return ablation.layer_relevance(self.setup.translator, self.seen.pooled, ranked, self.bank, index)

    def _fused(self, index: Tensor) -> Tensor:
        seen = self.seen
        order = list(seen.seen.order)
        grids = [layout.grid for layout in seen.seen.layouts]
        pixels = images_among(self.inputs)
        grid = regions.fused_grid(grids, None if pixels is None else (pixels.shape[2], pixels.shape[3]))
        affinity = regions.feature_affinity([seen.maps[number] for number in order], grid, pixels)
        local = read_locally(self.setup.translator, seen.maps, regions.fused_grid(grids), self.bank)
        parts = []
        for part, betas, evidence in self._chunks(index, fused=True):
            relevance = self._relevance(self._ranked(betas), part)[..., order] if len(order) > 1 else None
            ordered = [evidence[number] for number in order]
            parts.append(regions.fused_maps(ordered, affinity, grid, local.excess(part), relevance))
        return regions.of_strongest(torch.cat(parts, 1)).detach()


Channels = list[Tensor]
"""``(N, J, K_l)`` per layer: the channels to ablate, strongest first."""


def check_unused_target(part: Part, target: Any, rows: slice, batch: int) -> None:
    """Raise for an invalid target of a call that computes no contributions; None: there is nothing to check."""
    if target is not None:
        part.classes(target, rows, batch)
