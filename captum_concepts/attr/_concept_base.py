"""The machinery of ConceptFusionMap: batches, chunks of concepts, the choice of a layer, checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_concepts._captum import LayerAttribution, target_indices
from captum_concepts.activations import resolve_layer
from captum_concepts.activations.capture import Inputs, Layer
from captum_concepts.attr import _concept_ablation as ablation, _concept_regions as regions
from captum_concepts.attr._concept_gradients import ConceptPass, TextSpace, concept_pass
from captum_concepts.attr._concept_local import read_locally
from captum_concepts.errors import InputError, LayerError, NotFittedError

_OPTIONS = ("logit_scale", "logit_bias", "probability", "gradient", "n_channels", "channel_share", "fill", "chunk_size",
            "layout")  # fmt: skip


class ConceptMaps(LayerAttribution):
    """What the public methods of ConceptFusionMap are made of."""

    layers: Sequence[Layer]
    translator: nn.Module
    concepts: Sequence[str] | None
    text_embeddings: Tensor | None
    logit_scale: float
    logit_bias: float
    probability: str
    gradient: str
    n_channels: int
    channel_share: float | None
    fill: str
    chunk_size: int
    layout: str
    prefix_tokens: int | None

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in (*_OPTIONS, "prefix_tokens")}

    def _share(self) -> float:
        if self.channel_share is not None:
            return self.channel_share
        return ablation.SHARE if self.n_channels == ablation.PUBLISHED else 1.0

    def _names(self) -> list[str]:
        if self.concepts is None:
            raise NotFittedError("there are no concepts yet; take .with_concepts(names, encoder)")
        return list(self.concepts)

    def _space(self, like: Tensor) -> TextSpace:
        self._names()
        text = F.normalize(self.text_embeddings.detach().to(like), dim=1)  # type: ignore[union-attr]
        return TextSpace(text, float(self.logit_scale), float(self.logit_bias), self.probability == "softmax")

    def _probability(self, logits: Tensor) -> Tensor:
        return logits.softmax(1) if self.probability == "softmax" else logits.sigmoid()

    def _columns(self, concepts: Sequence[str | int] | str | int | None) -> list[int]:
        names = self._names()
        if concepts is None:
            return list(range(len(names)))
        chosen = [concepts] if isinstance(concepts, (str, int)) else list(concepts)
        if not chosen:
            raise InputError("concepts is empty; name at least one, or leave it out for all")
        return target_indices(chosen, len(chosen), len(names), names).tolist()

    def _concept_index(self, target: Any, batch: int) -> Tensor:
        """``(N, J)``: all T concepts, or the one asked of each example."""
        names = self._names()
        if target is None:
            return torch.arange(len(names)).expand(batch, -1)
        return target_indices(target, batch, len(names), names).unsqueeze(1)

    def _layer_index(self) -> int | None:
        """The chosen layer's place in ``layers``; None for "auto" and "fused"."""
        if isinstance(self.layer, str) and self.layer in ("auto", "fused"):
            return None
        count = len(self.layers)
        if isinstance(self.layer, int) and not isinstance(self.layer, bool):
            if not -count <= self.layer < count:
                raise InputError(f"layer={self.layer} is out of range for {count} layers")
            return self.layer % count
        try:
            wanted = resolve_layer(self.forward_func, self.layer)
        except LayerError as error:
            raise InputError(f"layer must be 'auto', 'fused', or one of layers; {error}") from error
        places = [resolve_layer(self.forward_func, layer) for layer in self.layers]
        if wanted not in places:
            raise InputError(f"layer={self.layer!r} is none of layers; give its index, 'auto' or 'fused'")
        return places.index(wanted)

    def _passes(
        self, inputs: Inputs, extra: Any, of_input: bool = False, *, gradient: bool = True
    ) -> Iterator[tuple[int, Inputs, Any, ConceptPass]]:
        """``(start, inputs, extra, pass)`` for one part of at most ``chunk_size`` examples after another."""
        first = inputs[0] if isinstance(inputs, tuple) else inputs
        batch = len(first)
        for start in range(0, batch, self.chunk_size):
            stop = min(start + self.chunk_size, batch)
            own = ablation.take_rows(inputs, start, stop, batch)
            own_extra = ablation.take_rows(extra, start, stop, batch)
            seen = concept_pass(
                self.forward_func,
                own,
                list(self.layers),
                self.translator,
                branch=self.gradient == "branch" or not gradient,
                additional_forward_args=own_extra,
                attribute_to_layer_input=of_input,
                layout=self.layout,
                prefix_tokens=self.prefix_tokens,
            )
            if self.text_embeddings is not None and seen.embedding.shape[1] != self.text_embeddings.shape[1]:
                raise InputError(
                    f"text_embeddings have width {self.text_embeddings.shape[1]}, but the translator gives "
                    f"{seen.embedding.shape[1]}; use texts of the image-text model it was fitted to"
                )
            yield start, own, own_extra, seen

    def _chunks(
        self, seen: ConceptPass, index: Tensor, *, fused: bool = False, only: int | None = None
    ) -> Iterator[tuple[Tensor, list[Tensor], list[Tensor]]]:
        """``(index, betas, evidence)`` of one bounded part of the concepts after another.

        Args:
            fused: with contrast, and with evidence.
            only: the one layer to differentiate at; the other betas are zero.
        """
        h = seen.embedding.detach()
        space = self._space(h)
        # Without a pass through the classifier, and without relevances, a row costs hardly anything.
        room = self.chunk_size * 16 if seen.branch and only is not None else self.chunk_size
        chunk = max(1, room // len(h))
        derive = seen.derivatives(index.shape[1], chunk=chunk, evidence=fused, only=only)
        contrast = regions.CONTRAST if fused else 0.0
        for part in index.to(h.device).split(chunk, 1):
            yield (part, *derive(space.slopes(h, part, contrast, regions.TEMPERATURE)))

    def _relevance(self, seen: ConceptPass, betas: Sequence[Tensor], index: Tensor) -> Tensor:
        space = self._space(seen.embedding)
        return ablation.layer_relevance(
            self.translator, seen.pooled, betas, space, index, self.n_channels, self._share()
        )

    def _choice(self, seen: ConceptPass, betas: Sequence[Tensor], index: Tensor) -> Tensor:
        """``(N, J)`` the layer of each concept; of equally relevant ones the last."""
        fixed = self._layer_index()
        if fixed is not None or len(self.layers) == 1:
            return torch.full(index.shape, fixed or 0, device=index.device)
        relevance = self._relevance(seen, betas, index)
        return relevance.shape[-1] - 1 - relevance.flip(-1).argmax(-1)

    def _maps(self, seen: ConceptPass, index: Tensor, inputs: Inputs) -> Tensor:
        """``(N, J, h, w)`` regions."""
        if isinstance(self.layer, str) and self.layer == "fused":
            return self._fused(seen, index, inputs)
        return self._channels(seen, index, maps=True, ranks=False)[0]

    def _fused(self, seen: ConceptPass, index: Tensor, inputs: Inputs) -> Tensor:
        order = list(seen.seen.order)
        grids = [layout.grid for layout in seen.seen.layouts]
        first = inputs[0] if isinstance(inputs, tuple) else inputs
        pixels = first if first.ndim == 4 else None
        grid = regions.fused_grid(grids, None if pixels is None else (pixels.shape[2], pixels.shape[3]))
        maps = [seen.maps[number] for number in order]
        affinity = regions.feature_affinity(maps, grid, pixels)
        space = self._space(seen.embedding.detach())
        local = read_locally(self.translator, seen.maps, regions.fused_grid(grids), space)
        parts = []
        for part, betas, evidence in self._chunks(seen, index, fused=True):
            relevance = self._relevance(seen, betas, part)[..., order] if len(order) > 1 else None
            ordered = [evidence[number] for number in order]
            parts.append(regions.fused_maps(ordered, affinity, grid, local.excess(part), relevance))
        return regions.of_strongest(torch.cat(parts, 1)).detach()

    def _channels(
        self, seen: ConceptPass, index: Tensor, *, maps: bool, ranks: bool
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Published maps (if asked), the layer of each concept, and its ranked channels at every layer (if asked)."""
        fixed = self._layer_index()
        grids = [layout.grid for layout in seen.seen.layouts]
        grid = regions.finest_grid(grids) if fixed is None else grids[fixed]
        found, choices, rankings = [], [], []
        for part, betas, _ in self._chunks(seen, index, only=fixed):
            choices.append(self._choice(seen, betas, part))
            if maps:
                choice = choices[-1].to(seen.maps[0].device)
                found.append(regions.published_maps(betas, seen.maps, choice, grid))
            if ranks:
                each = zip(betas, seen.pooled, strict=True)
                rankings.append([ablation.rank_channels(beta, z, self.n_channels, self._share()) for beta, z in each])
        made = torch.cat(found, 1).detach() if maps else torch.zeros(())
        return made, torch.cat(choices, 1), [torch.cat(parts, 1) for parts in zip(*rankings, strict=True)]

    def _curves(
        self, seen: ConceptPass, inputs: Inputs, extra: Any, choice: Tensor, ranked: Sequence[Tensor], classes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``(N, J)`` contributions and ``(N, J, K + 1)`` curves."""
        curve = seen.maps[0].new_zeros((*choice.shape, self.n_channels + 1))
        mean = seen.maps[0].new_zeros(choice.shape)
        sizes = [maps[0].numel() for maps in seen.maps]
        batch = len(choice)
        for i in range(batch):
            for number in choice[i].unique().tolist():
                here = choice[i] == number
                drops = ablation.contribution_curves(
                    self.forward_func,
                    ablation.take_rows(inputs, i, i + 1, batch),
                    ablation.take_rows(extra, i, i + 1, batch),
                    self.layers[number],
                    seen.seen.layouts[number],
                    seen.seen.names[number],
                    seen.pooled[number][i],
                    ranked[number][i][here],
                    int(classes[i]),
                    seen.seen.output[i : i + 1],
                    fill=self.fill,
                    # A small layer may have more copies for the same memory as the largest with chunk_size.
                    rows=self.chunk_size * max(1, max(sizes) // sizes[number]),
                ).to(curve)
                mean[i, here] = drops.mean(-1)
                padded = F.pad(drops, (1, 0))
                curve[i, here] = F.pad(padded.unsqueeze(1), (0, self.n_channels - drops.shape[-1]), "replicate")[:, 0]
        return mean, curve


def class_indices(target: Any, output: Any, start: int, stop: int, batch: int) -> Tensor:
    """``(N,)`` the class to explain of the examples ``start`` to ``stop``; None takes the predicted one."""
    if not isinstance(output, Tensor) or output.ndim not in (1, 2):
        what = f"a tensor {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise InputError(f"contributions need logits (N, classes) from forward_func, got {what}")
    count = 1 if output.ndim == 1 else output.shape[1]
    if target is None:
        return torch.zeros(len(output), dtype=torch.long) if output.ndim == 1 else output.detach().argmax(1).cpu()
    return target_indices(target, batch, count, what="class")[start:stop]


def check_layers(forward_func: Callable[..., Any], layers: Sequence[Layer]) -> None:
    """Refuse no layers, a bare string, and the same layer twice."""
    if isinstance(layers, (str, nn.Module)) or not len(layers):
        raise InputError(
            f"layers must be a non-empty list of modules or names, got {layers!r}"
            + (f"; give [{layers!r}]" if isinstance(layers, str) and layers else "")
        )
    found = [resolve_layer(forward_func, layer) for layer in layers]
    if len(set(found)) != len(found):
        raise InputError("each layer may be given once; layers names one of them twice")


def check_concepts(concepts: Sequence[str] | None, text: Tensor | None, width: int | None) -> None:
    """Refuse lists and text matrices that fit neither each other nor the translator."""
    if concepts is None:
        if text is not None:
            raise InputError("text_embeddings were given without concepts; name their rows")
        return
    if isinstance(concepts, str):
        raise InputError(f"concepts must be a list of names, got the string {concepts!r}")
    names = list(concepts)
    if not names:
        raise InputError("concepts is empty; give at least one name (or None, and words later by with_concepts)")
    if not all(isinstance(name, str) and name for name in names):
        raise InputError(f"concepts must be non-empty strings, got {names!r}")
    if len(set(names)) != len(names):
        raise InputError(f"concepts must be unique; given twice: {sorted({n for n in names if names.count(n) > 1})}")
    if text is None:
        return
    if not isinstance(text, Tensor) or text.ndim != 2 or not text.is_floating_point() or len(text) != len(names):
        what = f"a {text.dtype} tensor {tuple(text.shape)}" if isinstance(text, Tensor) else type(text).__name__
        raise InputError(f"text_embeddings must be floating point ({len(names)}, D) for {len(names)} names, got {what}")
    if width is not None and text.shape[1] != width:
        raise InputError(
            f"text_embeddings have width {text.shape[1]}, but the translator gives {width}; use texts of the "
            "image-text model it was fitted to"
        )
    if not text.isfinite().all() or not text.any(1).all():
        raise InputError("text_embeddings hold a row that is zero, NaN or infinite, which has no direction")
