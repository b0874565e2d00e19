"""`OpenCLIPEncoder`: any open_clip model as an :class:`ImageTextEncoder`. Only this file imports open_clip."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_concepts.errors import ArtifactError, InputError, InputWarning, did_you_mean
from captum_concepts.vlm import _texts
from captum_concepts.vlm._preprocessing import check_images, check_preprocess, resize_and_normalize
from captum_concepts.vlm._pretrained import check_file, failure, first_line, published_preprocess
from captum_concepts.vlm.dense import DenseRegions, encode_cells
from captum_concepts.vlm.towers import open_clip_tower

Tokenizer = Callable[[list[str]], Tensor]


class OpenCLIPEncoder(nn.Module):
    """An open_clip model as a frozen vision-language encoder of image tensors and texts.

    Images are RGB tensors in [0, 1] of any size, so the same batch can be passed to a classifier and this encoder. They
    are resized, cropped and normalized as by the model's own PIL transform (bicubic or bilinear with anti-aliasing;
    "shortest", "longest" or "squash"). Before normalization the result is within 2/255 of PIL's, which rounds to 8 bits
    between its two passes. (Pillow 13 and later swap the passes for some images squashed in height; a few pixels at
    hard edges then differ by more.)

    The encoder is frozen and always in evaluation mode. ``encode_image`` respects autograd's mode: gradients flow to
    ``images`` (or to a hooked layer) that require them, never to the weights. The encoder is an ``nn.Module`` whose
    ``forward`` is ``encode_image``, so it can be explained like any network, with layers such as
    ``"model.visual.transformer.resblocks.10"``.

    Args:
        model: an open_clip model (``CLIP``, ``CustomTextCLIP``, ``CoCa``), or any module with ``encode_image``,
            ``encode_text`` and ``logit_scale`` (a logarithm, as in open_clip).
        tokenizer: maps a list of strings to token ids ``(T, context_length)``.
        preprocess: ``size`` (int or (H, W)), ``mean``, ``std``, ``interpolation`` ("bicubic" or "bilinear"),
            ``resize_mode`` ("shortest", "longest", "squash", or "patches" with ``max_patches``) and ``fill_color``;
            missing keys come from ``model.visual.preprocess_cfg``, which open_clip's factory sets.
        templates: texts with ``{}``, for example ``("a photo of a {}.", "a picture of a {}.")``. The embedding of a
            text is then the normalized mean of its unit embeddings in the templates; None embeds the text unchanged.
        text_batch_size: texts per forward pass.

    Raises:
        InputError: an invalid template, or unknown preprocessing.

    Example:
        >>> import torch
        >>> from captum_concepts import demo
        >>> encoder = demo.load("clip")
        >>> encoder.encode_image(torch.rand(2, 3, 80, 64)).shape, encoder.encode_text(["red", "a circle"]).shape
        (torch.Size([2, 128]), torch.Size([2, 128]))
        >>> encoder.probability
        'softmax'
    """

    model: Any

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        preprocess: Mapping[str, Any] | None = None,
        *,
        templates: Sequence[str] | None = None,
        text_batch_size: int = 256,
    ) -> None:
        super().__init__()
        self.preprocess = check_preprocess(
            getattr(getattr(model, "visual", None), "preprocess_cfg", None) or {}, preprocess or {}
        )
        self.templates = _check_templates(templates)
        self.text_batch_size = int(text_batch_size)
        if self.text_batch_size < 1:
            raise InputError(f"text_batch_size={text_batch_size!r} must be at least 1")
        self.model = model.requires_grad_(False)
        self.tokenizer = tokenizer
        super().train(False)

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        pretrained: str | os.PathLike[str] | None = None,
        *,
        device: str | torch.device = "cpu",
        precision: str = "fp32",
        templates: Sequence[str] | None = None,
        preprocess: Mapping[str, Any] | None = None,
        tokenizer: Tokenizer | None = None,
        text_batch_size: int = 256,
        **options: Any,
    ) -> OpenCLIPEncoder:
        """The encoder of an open_clip model with pretrained weights.

        Args:
            name: a model of ``open_clip.list_models()`` such as "ViT-B-32"; or "hf-hub:org/repo"; or
                "local-dir:/path", a folder with ``open_clip_config.json`` and weights.
            pretrained: a tag such as "laion2b_s34b_b79k" (downloaded once, then cached), or a local file:
                ``.safetensors``, or a state dict in ``.pt``/``.bin``/``.pth``, which is loaded without executing code
                (``weights_only=True``). Leave None with "hf-hub:" and "local-dir:", which include weights; with a plain
                name None means random weights, and a warning.
            device: device of the model.
            precision: as in open_clip, "fp32", "fp16", "bf16", "pure_fp16" or "pure_bf16".
            templates: see the class.
            preprocess: overrides of the preprocessing. A local file uses that of the model's published weights, or, if
                those differ from each other, open_clip's default with a warning.
            tokenizer: replaces the model's own (open_clip downloads some of them, for example SigLIP's).
            text_batch_size: see the class.
            options: passed to ``open_clip.create_model``, for example ``cache_dir`` or ``force_quick_gelu``.

        Raises:
            InputError: an unknown model, tag or file (the message suggests the nearest names).
            ArtifactError: the weights cannot be downloaded or read, or do not fit the model.
        """
        import open_clip

        plain = ":" not in name
        known = open_clip.list_models()
        if plain and name.replace("/", "-") not in known:
            raise InputError(
                f"open_clip has no model {name!r}.{did_you_mean(name, known)} open_clip.list_models() lists all "
                "names; for a folder with its own config pass 'local-dir:/path', for a Hugging Face repository "
                "'hf-hub:org/repo'"
            )
        source = None if pretrained is None else os.fspath(pretrained)
        overrides = dict(preprocess or {})
        if source is None:
            if plain and options.get("load_weights", True):
                warnings.warn(
                    f"{name!r} has random weights: pass pretrained= one of "
                    f"{open_clip.list_pretrained_tags_by_model(name)} or a local file",
                    InputWarning,
                    stacklevel=2,
                )
        elif not plain:
            raise InputError(f"{name!r} includes its own weights; leave out pretrained={source!r}")
        elif not open_clip.get_pretrained_cfg(name, source) or Path(source).is_file():
            check_file(name, source, open_clip.list_pretrained_tags_by_model(name))
            overrides = {**published_preprocess(open_clip, name, overrides), **overrides}
        must_load = (source is not None or not plain) and options.get("load_weights", True)
        try:
            model = open_clip.create_model(
                name, pretrained=source, device=device, precision=precision, require_pretrained=must_load, **options
            )
        except Exception as error:
            raise ArtifactError(failure(name, source, error)) from error
        if tokenizer is None:
            try:
                tokenizer = open_clip.get_tokenizer(name, cache_dir=options.get("cache_dir"))
            except Exception as error:
                raise ArtifactError(
                    f"the tokenizer of {name!r} could not be loaded ({first_line(error)}). It may need to be "
                    "downloaded; connect to the network once so that it is cached, or pass tokenizer=, a function "
                    "from a list of texts to token ids"
                ) from error
        return cls(model, tokenizer, overrides, templates=templates, text_batch_size=text_batch_size)

    @property
    def logit_scale(self) -> float:
        """The factor of the cosine, exponentiated."""
        return float(self.model.logit_scale.detach().float().exp())

    @property
    def logit_bias(self) -> float:
        """The bias added to the scaled cosine; 0 if the model has none."""
        bias = getattr(self.model, "logit_bias", None)
        return 0.0 if bias is None else float(bias.detach())

    @property
    def probability(self) -> str:
        """ "sigmoid" for models trained with a sigmoid loss (they have a bias: SigLIP), else "softmax"."""
        return "softmax" if getattr(self.model, "logit_bias", None) is None else "sigmoid"

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        device: torch.device = self.model.logit_scale.device
        return device

    @property
    def image_dtype(self) -> torch.dtype:
        """The dtype of the image tower's input, that of its first convolution or else its first weight matrix."""
        visual = self.model.visual
        convolutions = (m.weight.dtype for m in visual.modules() if isinstance(m, nn.Conv2d))
        return next(convolutions, next((p.dtype for p in visual.parameters() if p.ndim > 1), torch.float32))

    def transform(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """RGB images in [0, 1], resized, cropped and normalized as in the model's training.

        Args:
            images: ``(N, 3, H, W)``, or a list of ``(3, H, W)`` of any sizes.

        Returns:
            ``(N, 3, size, size)`` float32 on the device of ``images``; differentiable.

        Raises:
            InputError: not floating point, not RGB, or an empty batch.
        """
        if not isinstance(images, Tensor):
            if not len(images):
                raise InputError("the list of images is empty; pass at least one")
            return torch.cat([self.transform(check_images(image[None])) for image in images])
        return resize_and_normalize(check_images(images), self.preprocess)

    def encode_image(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """Embeddings of images; see :meth:`transform` for the accepted inputs.

        Returns:
            ``(N, D)`` float32, not normalized, on the device of the weights.
        """
        pixels = self.transform(images).to(self.device, self.image_dtype)
        embedding: Tensor = self.model.encode_image(pixels)
        return embedding.float()

    def forward(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """:meth:`encode_image`, called when the encoder's own layers are explained.

        Warns:
            InputWarning: the transform crops the images, so maps of a layer do not cover the whole image.
        """
        if isinstance(images, Tensor) and images.ndim == 4 and self.preprocess["resize_mode"] == "shortest":
            (h, w), (height, width) = self.preprocess["size"], images.shape[2:]
            if max(abs(height * w - width * h) / w, abs(height * w - width * h) / h) >= 0.02 * max(height, width):
                warnings.warn(
                    f"the encoder sees only the center of images of {height} x {width}, so maps of its layers cover "
                    f"only that: crop images to the aspect ratio of {h} x {w} first (images.open_images(..., size=)), "
                    "or build it with preprocess={'resize_mode': 'squash'}",
                    InputWarning,
                    stacklevel=2,
                )
        return self.encode_image(images)

    def encode_regions(
        self,
        images: Tensor,
        grid: int | Sequence[int],
        *,
        attention: str = "value",
        remove_outliers: bool = True,
    ) -> Tensor:
        """Embeddings of all cells of a grid from one forward pass; see :class:`~captum_concepts.vlm.DenseRegions`.

        If the model's transform would crop the image, it is squashed instead, so that the grid covers the whole image.

        Returns:
            ``(N, h*w, D)`` float32, not normalized, cells in row-major order.

        Raises:
            InputError: an image tower of unknown structure, or an option that does not apply to it.
        """
        regions = DenseRegions(grid, attention=attention, remove_outliers=remove_outliers)
        options: dict[str, Any] = {"attention": regions.attention, "remove_outliers": remove_outliers}
        own = getattr(self.model, "dense_tower", None)
        tower = own(**options) if own is not None else open_clip_tower(getattr(self.model, "visual", None), **options)
        mode = self.preprocess["resize_mode"]
        whole = mode if mode == "patches" else "squash"
        pixels = resize_and_normalize(check_images(images), {**self.preprocess, "resize_mode": whole})
        return encode_cells(tower, pixels.to(self.device, self.image_dtype), regions.grid)

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of texts, filled into the templates if there are any.

        Returns:
            ``(T, D)`` float32 on the device of the weights; unit length with templates, else as the model returns it.

        Raises:
            InputError: no texts, or not a list of strings.
        """
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise InputError(f"texts must be a list of strings, got {texts!r}")
        texts = list(texts)
        if not texts:
            raise InputError("texts is empty; pass at least one string")
        if self.templates is None:
            return self._embed(texts)
        filled = [template.replace("{}", text) for text in texts for template in self.templates]
        unit = F.normalize(self._embed(filled), dim=1)
        return F.normalize(unit.view(len(texts), len(self.templates), -1).mean(1), dim=1)

    def _embed(self, texts: list[str]) -> Tensor:
        tokens = self.tokenizer(texts)
        _texts.check_length(self.tokenizer, texts, tokens)
        parts = [self.model.encode_text(part.to(self.device)).float() for part in tokens.split(self.text_batch_size)]
        return torch.cat(parts)

    def train(self, mode: bool = True) -> OpenCLIPEncoder:
        """Do nothing; a frozen encoder stays in evaluation mode, even inside a model in training."""
        del mode
        return self

    def extra_repr(self) -> str:
        """The settings shown by ``print``."""
        return f"preprocess={json.dumps(self.preprocess)}, templates={self.templates}, probability={self.probability!r}"


def _check_templates(templates: Sequence[str] | None) -> tuple[str, ...] | None:
    if templates is None:
        return None
    found = (templates,) if isinstance(templates, str) else tuple(templates)
    if not found or not all(isinstance(t, str) and "{}" in t for t in found):
        raise InputError(f"templates={templates!r} must be strings with a placeholder, such as 'a photo of a {{}}'")
    return found


def tower_names(tower: nn.Module) -> Iterator[str]:
    """The names of open_clip's models whose image tower has the sizes of ``tower``; weights are not compared."""
    import open_clip

    stem = getattr(tower, "conv1", None)
    blocks = getattr(getattr(tower, "transformer", None), "resblocks", None)
    own = {
        "image_size": _pair(getattr(tower, "image_size", None)),
        "width": getattr(stem, "out_channels", None) if blocks is not None else None,
        "patch_size": None if stem is None or blocks is None else _pair(stem.kernel_size),
        "layers": None if blocks is None else len(blocks),
    }
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name) or {}
        vision = {"image_size": 224, **config.get("vision_cfg", {})}
        wanted = {key: _pair(vision[key]) if "size" in key else vision[key] for key in own if key in vision}
        same_width = getattr(tower, "output_dim", config.get("embed_dim")) == config.get("embed_dim")
        if same_width and all(own[key] in (None, value) for key, value in wanted.items()):
            yield name


def build_tower(name: str) -> nn.Module:
    """The image tower of an open_clip model, with random weights; nothing is downloaded."""
    import logging

    import open_clip

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # silences the warning about random weights, which are replaced
    try:
        return open_clip.create_model(name, load_weights=False).visual
    finally:
        logging.disable(before)


def _pair(size: Any) -> tuple[int, int] | None:
    return None if size is None else (size, size) if isinstance(size, int) else tuple(size)
