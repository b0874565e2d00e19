"""Fit, new words, save and load of ConceptFusionMap."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from captum_concepts.activations.capture import Layer
from captum_concepts.attr.concept_fusion import file as concept_file
from captum_concepts.attr.concept_fusion.base import ConceptMaps, check_concepts, check_layers
from captum_concepts.attr.concept_fusion.fit import encode_words, train_translator
from captum_concepts.errors import InputError


class ConceptLifecycle(ConceptMaps):
    """How a ConceptFusionMap comes to be, changes its words, and is kept."""

    history_: dict[str, list[float]] | None

    @classmethod
    def fit(
        cls,
        forward_func: Callable[..., Any],
        layers: Sequence[Layer],
        encoder: Any,
        data: Any,
        concepts: Sequence[str] | None = None,
        *,
        similarity_weight: float = 1e-3,
        hidden: Sequence[int] | None = None,
        batch_size: int = 32,
        image_size: int = 224,
        model_transform: Callable[[Tensor], Tensor] | None = None,
        encoder_transform: Callable[[Tensor], Tensor] | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        memory_budget: int = 2**30,
        training: dict[str, Any] | None = None,
        show_progress: bool = False,
        **options: Any,
    ) -> Any:
        """Train a translator from the classifier to ``encoder``, without labels.

        Args:
            forward_func, layers: as in the constructor.
            encoder: any object with ``encode_image(images) -> (N, D)``, ``encode_text(list) -> (T, D)``,
                ``logit_scale`` and ``logit_bias``.
            data: images: a tensor ``(n, 3, H, W)``, a Dataset or DataLoader of images or tuples that begin with one,
                or a folder. Rows are read in the data set's order.
            concepts: words that the similarity loss uses and the result starts with; None trains on embeddings alone
                and leaves the words to :meth:`with_concepts`.
            similarity_weight: of the similarity loss, where embeddings are 10 long as CLIP's are (balanced alike for
                others, see :func:`~captum_concepts.models.fit_translator`); 0 leaves it out.
            hidden: of the translator.
            batch_size: images a forward pass.
            image_size: side to which files of a folder are cut.
            model_transform, encoder_transform: applied to each batch of images for the classifier, for the encoder,
                where they want different preprocessing.
            cache_dir: keep activations and embeddings there; a killed run goes on, another fit reuses them. A cache of
                another model, encoder, layer or data is refused.
            memory_budget: bytes of cached rows above which they go to disk by themselves.
            training: arguments of :func:`~captum_concepts.models.fit_translator`: ``optimizer``, ``epochs``,
                ``batch_size``, ``lr``, ``seed``, ...
            options: of the constructor.

        Under ``torchrun`` every process reads its share of the data, and all take the same steps.

        Returns:
            The fitted map, with ``history_``.

        Raises:
            InputError: no data, or a word the encoder does not know (named).
            ArtifactError: a foreign cache.

        Warns:
            ConvergenceWarning: the loss became NaN; the best weights so far are kept.
        """
        needed = ["encode_image"] if concepts is None else ["encode_image", "encode_text"]
        absent = [name for name in needed if not callable(getattr(encoder, name, None))]
        if absent:
            raise InputError(
                f"encoder must be an image-text model with {' and '.join(needed)} (vlm.ImageTextEncoder, for example "
                f"vlm.OpenCLIPEncoder); {type(encoder).__name__} has no {' and no '.join(absent)}"
            )
        for name in ("logit_scale", "logit_bias"):
            if name not in options and hasattr(encoder, name):
                options[name] = float(getattr(encoder, name))
        options.setdefault("probability", "sigmoid" if options.get("logit_bias") else "softmax")
        check_layers(forward_func, layers)
        names = None if concepts is None else _listed(concepts)
        text = None if names is None else encode_words(encoder, names)
        translator, history = train_translator(
            forward_func,
            layers,
            encoder,
            data,
            text,
            logit_scale=options.get("logit_scale", 100.0),
            similarity_weight=similarity_weight,
            hidden=hidden,
            training={**(training or {}), "show_progress": show_progress},
            batch_size=batch_size,
            image_size=image_size,
            model_transform=model_transform,
            encoder_transform=encoder_transform,
            cache_dir=cache_dir,
            memory_budget=memory_budget,
            layout=options.get("layout", "auto"),
            prefix_tokens=options.get("prefix_tokens"),
            show_progress=show_progress,
        )
        made = cls(forward_func, layers, translator, names, text, **options)
        made.history_ = history
        return made

    def with_concepts(self, names: Sequence[str], encoder: Any) -> Any:
        """The same translator with other words, without training.

        Args:
            names: unique names; the encoder may know any text.
            encoder: the one the translator was fitted to.

        Raises:
            InputError: a word the encoder does not know (named), an empty or duplicate list, another width.
        """
        words = _listed(names)
        text = encode_words(encoder, words)
        made = type(self)(
            self.forward_func, self.layers, self.translator, words, text, **self._options(), layer=self.layer
        )
        made.history_ = self.history_
        return made

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write translator, words and settings into one safetensors file, atomically."""
        return concept_file.save(path, self)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        forward_func: Callable[..., Any],
        layers: Sequence[Layer] | None = None,
    ) -> Any:
        """Read what :meth:`save` wrote.

        Args:
            path: the file.
            forward_func: the same classifier.
            layers: only where the saved names do not lead to them (modules of a plain function).

        Raises:
            FileNotFoundError: there is no such file.
            ArtifactError: broken, or saved for another classifier or other layers.
        """
        return concept_file.load(path, cls, forward_func, layers)


def _listed(names: Sequence[str]) -> list[str]:
    """A list of unique names; one string is not taken for its letters."""
    listed = names if isinstance(names, str) else list(names)
    check_concepts(listed, None, None)
    return list(listed)
