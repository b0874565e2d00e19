"""The steps of `fit_salf_cbm` in order: what each takes from the ones before, and under which name it is kept."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from captum_concepts.activations import evaluation_mode, layer_name
from captum_concepts.activations.capture import Layer
from captum_concepts.concepts import Vocabulary
from captum_concepts.errors import InputError
from captum_concepts.models._salf_bottleneck_fit import BottleneckFit, fit_bottleneck
from captum_concepts.models._salf_concepts import (
    TOP_IMAGES,
    WHOLE,
    concept_presence,
    interpretable_concepts,
    places_of,
    present_concepts,
)
from captum_concepts.models._salf_data import FEWEST, LabelledImages
from captum_concepts.models._salf_feature_cache import GridFeatures, LiveFeatures, open_features
from captum_concepts.models._salf_head import HeadFit, accuracy, compute_activations, fit_head
from captum_concepts.models._salf_objective import Samples
from captum_concepts.models._salf_options import FitOptions, input_size, transform_fingerprint
from captum_concepts.models._salf_steps import StepFolder, StepResult, digest, share_of
from captum_concepts.models.salf_cbm import SALFCBM
from captum_concepts.store import RegionEmbeddingStore
from captum_concepts.store.manifest import fingerprint_module, fingerprint_tensor
from captum_concepts.vlm import RegionPrompt


class Split:
    """One data set on its way: images, regions, features."""

    def __init__(self, name: str, images: LabelledImages, live: LiveFeatures) -> None:
        self.name, self.images, self.live = name, images, live
        self.features: GridFeatures = live
        self.regions: Any = None
        self.made_from: dict[str, Any] = {}

    def samples(self, rows: Tensor) -> Samples:
        """Some of its images."""
        return Samples(self.features, self.regions, rows)


class FitRun:
    """One fit: construct it, which checks what can be checked without long work, then :meth:`run`."""

    def __init__(
        self,
        backbone: nn.Module,
        layer: Layer,
        encoder: Any,
        train: LabelledImages,
        val: LabelledImages | None,
        vocabulary: Vocabulary,
        num_classes: int,
        path: Path,
        options: FitOptions,
    ) -> None:
        self.encoder, self.num_classes, self.path, self.options = encoder, num_classes, path, options
        self.layer = layer_name(backbone, layer)
        self.backbone = copy.deepcopy(backbone) if options.train_backbone else backbone
        self.place: Layer = self.layer if options.train_backbone else layer
        self.vocabulary = vocabulary
        self.text = vocabulary.encode(encoder)  # fails now, not after hours, where a concept has no text
        self.input_size = input_size(train, options.model_transform)
        self.model = self._model(vocabulary)
        parts = [("train", train), *([("val", val)] if val is not None else [])]
        self.splits = [
            Split(name, images, LiveFeatures(self.model, images.pictures, options.model_transform, options.batch_size))
            for name, images in parts
        ]
        self.rows = self._rows()
        self.device = self.splits[0].live.device
        self.text = self.text.to(self.device)

    def run(self) -> SALFCBM:
        """All steps."""
        steps = StepFolder(self.path)
        vocabulary = self._present(steps)  # first: it needs one pass of the encoder per image
        for split in self.splits:
            self._embed(split)
        for split in self.splits:
            self._features(split)
        fit, made_from = self._bottleneck(steps)
        kept = interpretable_concepts(vocabulary, fit.validation_similarity.cpu(), self.options.interpretability_cutoff)
        chosen = torch.tensor(places_of(kept, vocabulary))
        weight = fit.weight[chosen.to(fit.weight.device)].contiguous()
        head, accuracies = self._head(steps, weight, made_from)
        model = self._model(kept)
        with torch.no_grad():
            model.bottleneck.weight.copy_(weight[:, :, None, None])
            model.head.weight.copy_(head.weight)
            model.head.bias.copy_(head.bias)
        model.set_standardization(head.mean, head.std)
        model.metadata.update(self._metadata(kept, fit, chosen, head, accuracies))
        return model.eval()

    def _model(self, vocabulary: Vocabulary) -> SALFCBM:
        o = self.options
        with torch.random.fork_rng(devices=[]):  # its first weights are replaced
            model = SALFCBM(
                self.backbone,
                self.place,
                list(vocabulary),
                self.num_classes,
                o.prompt.grid,
                cls_token=o.cls_token,
                class_names=None if o.class_names is None else list(o.class_names),
                layout=o.layout,
                prefix_tokens=o.prefix_tokens,
                freeze_backbone=not o.train_backbone,
                input_size=self.input_size,
            )
        parameter = next(self.backbone.parameters(), None)
        return model if parameter is None else model.to(parameter.device)

    def _store(self, name: str, split: Split, prompt: RegionPrompt) -> RegionEmbeddingStore:
        o = self.options
        return RegionEmbeddingStore.build(
            self.path / f"{name}-{split.name}",
            split.images.pictures.source,
            self.encoder,
            prompt,
            batch_size=o.prompt_batch_size,
            num_workers=o.num_workers,
            show_progress=o.show_progress,
        )

    def _embed(self, split: Split) -> None:
        split.regions = self._store("regions", split, self.options.prompt)
        split.regions.similarity(self.text)  # refuses a text of another width
        split.made_from = _origin(split.regions)

    def _present(self, steps: StepFolder) -> Vocabulary:
        cutoff = self.options.presence_cutoff
        if cutoff is None:
            return self.vocabulary
        images = self._store("images", self.splits[0], WHOLE)
        found = steps.run(
            "presence",
            {**_origin(images), "text": fingerprint_tensor(self.text.cpu()), "k": TOP_IMAGES},
            lambda: StepResult({"presence": concept_presence(images, self.text).cpu()}, {}),
        )
        kept = present_concepts(self.vocabulary, found.tensors["presence"], cutoff)
        self.text = self.text[torch.tensor(places_of(kept, self.vocabulary), device=self.text.device)]
        return kept

    def _features(self, split: Split) -> None:
        o = self.options
        split.made_from |= {"features": digest(self._features_from(split))}
        if o.train_backbone:
            return
        split.features = open_features(
            self.path,
            f"features-{split.name}",
            split.live,
            self._features_from(split),
            cache=o.cache_features,
            max_bytes=o.max_cache_bytes,
            dtype=o.feature_dtype,
            show_progress=o.show_progress,
        )

    def _features_from(self, split: Split) -> dict[str, Any]:
        o = self.options
        return {
            "images": split.made_from["images"],
            "backbone": fingerprint_module(self.backbone),
            "layer": self.layer,
            "grid": list(o.prompt.grid),
            "cls_token": o.cls_token,
            "layout": o.layout,
            "prefix_tokens": o.prefix_tokens,
            "transform": transform_fingerprint(o.model_transform, split.images.pictures[0]),
            "dtype": str(o.feature_dtype).removeprefix("torch."),
        }

    def _rows(self) -> tuple[Tensor, Tensor]:
        """Which images train the bottleneck, and which validate it: those of val_data, or some held out."""
        everything = torch.arange(len(self.splits[0].images))
        if len(self.splits) > 1:
            return everything, torch.arange(len(self.splits[1].images))
        generator = torch.Generator().manual_seed(self.options.bottleneck.seed)
        order = torch.randperm(len(everything), generator=generator)
        held = max(FEWEST, round(len(order) * self.options.validation_fraction))
        if len(order) - held < FEWEST:
            raise InputError(
                f"train_data has {len(order)} images, too few to hold {held} out for validation; give val_data, or "
                "more images"
            )
        return order[held:].sort().values, order[:held].sort().values

    def _bottleneck(self, steps: StepFolder) -> tuple[BottleneckFit, dict[str, Any]]:
        o = self.options
        train, validation = self.splits[0].samples(self.rows[0]), self.splits[-1].samples(self.rows[1])
        made_from = {
            **{split.name: split.made_from for split in self.splits},
            "rows": fingerprint_tensor(torch.cat([train.rows, torch.tensor([-1]), validation.rows])),
            "text": fingerprint_tensor(self.text.cpu()),
            "settings": asdict(o.bottleneck),
            "train_backbone": o.train_backbone,
        }
        backbone = self.backbone if o.train_backbone else None

        def compute() -> StepResult:
            fit = fit_bottleneck(
                train,
                validation,
                self.text,
                o.bottleneck,
                backbone=backbone,
                resume=steps.load("bottleneck.progress", made_from),
                checkpoint=lambda state: steps.save("bottleneck.progress", made_from, state),
                show_progress=o.show_progress,
            )
            tensors = {"weight": fit.weight, "similarity": fit.validation_similarity}
            tensors |= {f"backbone.{name}": value for name, value in fit.backbone.items()}
            notes = {"history": fit.history, "best_epoch": fit.best_epoch, "stopped": fit.stopped}
            return StepResult(tensors, notes | {"start_similarity": fit.start_similarity})

        with evaluation_mode(self.backbone):
            found = steps.run("bottleneck", made_from, compute)
        steps.remove("bottleneck.progress", made_from)
        trained = {n.removeprefix("backbone."): v for n, v in found.tensors.items() if n.startswith("backbone.")}
        if trained:
            self.backbone.load_state_dict(trained, strict=False)
        weight, similarity = (found.tensors[name].to(self.device) for name in ("weight", "similarity"))
        return BottleneckFit(weight, similarity, **found.notes, backbone=trained), made_from

    def _head(
        self, steps: StepFolder, weight: Tensor, bottleneck_from: Mapping[str, Any]
    ) -> tuple[HeadFit, dict[str, float | None]]:
        o = self.options
        made_from = {"weight": fingerprint_tensor(weight.cpu()), "bottleneck": digest(bottleneck_from)}
        found = [
            compute_activations(
                self.path,
                f"activations-{split.name}",
                split.features,
                weight,
                {**made_from, "data": split.made_from},
                show_progress=o.show_progress,
            )
            for split in self.splits
        ]
        labels = [split.images.labels[torch.tensor(share_of(len(split.images)))] for split in self.splits]
        head_from = {
            **made_from,
            "labels": [fingerprint_tensor(split.images.labels) for split in self.splits],
            "head": [o.head, o.lam, o.nonzeros_per_class, o.alpha, o.head_tol, self.num_classes],
        }

        def compute() -> StepResult:
            fit = fit_head(
                found[0].rows(),
                labels[0],
                self.num_classes,
                lam=o.lam,
                nonzeros_per_class=o.nonzeros_per_class,
                head=o.head,
                alpha=o.alpha,
                tol=o.head_tol,
                show_progress=o.show_progress,
            )
            scores = [accuracy(a, y, fit) for a, y in zip(found, labels, strict=True)]
            tensors = {"weight": fit.weight, "bias": fit.bias, "mean": fit.mean, "std": fit.std}
            return StepResult(tensors, {"fit": fit.notes, "accuracy": scores})

        kept = steps.run("head", head_from, compute)
        t, scores = kept.tensors, kept.notes["accuracy"]
        head = HeadFit(t["weight"], t["bias"], t["mean"], t["std"], kept.notes["fit"])
        return head, {"train": scores[0], "validation": scores[1] if len(scores) > 1 else None}

    def _metadata(
        self, kept: Vocabulary, fit: BottleneckFit, chosen: Tensor, head: HeadFit, accuracies: Mapping[str, Any]
    ) -> dict[str, Any]:
        o = self.options
        settings = {**asdict(replace(o, model_transform=None)), "feature_dtype": str(o.feature_dtype)}
        unsaid = ("prompt", "model_transform", "class_names", "num_workers", "show_progress", "max_cache_bytes")
        similarity = fit.validation_similarity.cpu()[chosen].tolist()
        return {
            "data": {split.name: {"count": len(split.images), **split.made_from} for split in self.splits},
            "encoder": type(self.encoder).__name__,
            "prompt": o.prompt.as_dict(),
            "settings": {key: value for key, value in settings.items() if key not in unsaid},
            "vocabulary": kept.as_dict(),
            "validation_similarity": dict(zip(kept, similarity, strict=True)),
            "bottleneck": {"start": fit.start_similarity, "best_epoch": fit.best_epoch, "stopped": fit.stopped},
            "history": fit.history,
            "head": head.notes,
            "accuracy": dict(accuracies),
        }


def _origin(store: RegionEmbeddingStore) -> dict[str, Any]:
    """What a store was computed from."""
    return {
        "images": fingerprint_tensor(store.digests()),
        "encoder": store.fingerprint["encoder"],
        "prompt": store.prompt.as_dict(),
    }
