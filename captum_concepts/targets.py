"""Wrappers of segmentation networks and detectors, which every explainer and metric accepts as a model.

A wrapper is an ``nn.Module`` with the user's model as its child ``model``, so layers are named like
``"model.backbone.layer4"``. Its output has one score per column, and ``target=`` selects the column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_convert, box_iou

from captum_concepts._captum import output_tensor
from captum_concepts._checks import one_of
from captum_concepts.errors import InputError, shortened

__all__ = ["Box", "SemanticSegmentation"]

_DETECTION = ("boxes", "labels", "scores")
_QUERIES = (("pred_logits", "pred_boxes"), ("logits", "pred_boxes"))


class SemanticSegmentation(nn.Module):
    r"""Wrapper of a segmentation network with one score per class, the mean of its logits over a region.

    .. math:: s_l = \frac{1}{|R_l|} \sum_{(i, j) \in R_l} y_{l, i, j}

    Args:
        model: returns ``(N, L, h, w)`` logits, alone, first in a tuple, under ``out`` or ``logits`` of a mapping or an
            object (torchvision, Hugging Face) or ``seg_logits`` (mmseg), or as its only tensor.
        region: ``"predicted"``: the pixels that are predicted as the class (a class without pixels scores a constant
            0); ``"all"`` pixels; or a bool mask ``(H, W)`` for all images, which has their aspect ratio and is resized
            to the logits.

    Raises:
        InputError: an invalid ``region`` or another aspect ratio, or an output that is not such logits.
        TargetError: the output contains no tensor, or several without a known name.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1))
        >>> SemanticSegmentation(net, region="all")(torch.rand(2, 3, 16, 16)).shape
        torch.Size([2, 4])
    """

    def __init__(self, model: nn.Module, region: str | Tensor | np.ndarray = "predicted") -> None:
        super().__init__()
        if isinstance(region, np.ndarray):
            region = torch.as_tensor(region)
        if isinstance(region, Tensor):
            if region.ndim != 2 or region.dtype != torch.bool or not region.any():
                raise InputError(
                    "region must be a bool mask (H, W) with at least one pixel that is True, got "
                    f"{tuple(region.shape)} {region.dtype}"
                )
            self.register_buffer("mask", region[None, None].float(), persistent=False)
        else:
            one_of("region", region, ("predicted", "all"), "a bool mask (H, W)")
        self.model = model
        self.region = "mask" if isinstance(region, Tensor) else region

    def forward(self, *inputs: Any) -> Tensor:
        """``(N, L)`` scores."""
        output = self.model(*inputs)
        logits = output_tensor(output[0] if type(output) in (tuple, list) and output else output)
        if logits.ndim != 4 or not logits.is_floating_point():
            raise InputError(
                f"the model returns no logits (N, L, h, w), but {tuple(logits.shape)} {logits.dtype}; wrap it in a "
                "module that does"
            )
        logits = _at_least_single(logits)  # a sum over pixels overflows half precision
        if self.region == "all":
            return logits.mean((2, 3))
        if self.region == "mask":
            mask = self.get_buffer("mask")
            _check_aspect(mask.shape[-2:], _image_size(inputs))
            # Pixels of the logits are weighted by how much of them the region covers, so small regions are kept.
            part = F.interpolate(mask, logits.shape[-2:], mode="area").to(logits)
        else:
            part = torch.zeros_like(logits).scatter_(1, logits.detach().argmax(1, keepdim=True), 1)
        return (logits * part).sum((2, 3)) / part.sum((2, 3)).clamp_min(torch.finfo(logits.dtype).tiny)


class Box(nn.Module):
    r"""Wrapper of a detector with one score per queried box, for whether such an object is detected there.

    .. math:: s_k = \max_j \; \mathrm{IoU}(b_k, \hat b_j) \; \hat p_j(l_k)

    over the detections :math:`j`, the similarity of D-RISE (Petsiuk et al., CVPR 2021) with the label's own
    probability. The score lies in [0, 1], is differentiable in boxes and probabilities, and is 0 if nothing similar is
    detected. It is computed as the sigmoid of its log odds, so that contributions of ``ConceptFusionMap`` are relative
    changes of the score itself, not of its softmax over the boxes.

    Args:
        model: a torchvision detector (a list of ``{"boxes", "labels", "scores"}``), or one whose output has
            ``pred_logits`` or ``logits`` ``(N, Q, L)`` and ``pred_boxes`` ``(N, Q, 4)`` as center, width and height in
            fractions of the image (DETR and its variants, Hugging Face).
        boxes: ``(K, 4)`` corners ``x0, y0, x1, y1`` in pixels of the input, at most one pixel beyond its border.
        labels: K class indices; None: the most probable class of each detection.
        no_object: whether the last of the L logits is "no object", so that probabilities are the softmax (DETR, YOLOS),
            or all are classes, each with a sigmoid (Deformable, Conditional and RT-DETR). None: inferred from
            ``num_labels`` of the model's ``config`` (Hugging Face); True without one.

    Raises:
        InputError: boxes or labels with another shape; a box without area, outside the image or in fractions of it; a
            label that the model does not have; an output without detections.

    Note:
        Detectors of torchvision resize and pad images before the backbone, so a layer's grid covers the padded image,
        which has up to 31 more pixels at the right and the bottom.

    Example:
        >>> class Detector(nn.Module):
        ...     def forward(self, images):
        ...         found = {"boxes": torch.tensor([[0., 0., 8., 8.]]), "labels": torch.tensor([1]),
        ...                  "scores": images.mean((1, 2, 3))[:1]}
        ...         return [found] * len(images)
        >>> Box(Detector(), [[0, 0, 8, 4]], [1])(torch.ones(2, 3, 16, 16))
        tensor([[0.5000],
                [0.5000]])
    """

    def __init__(
        self,
        model: nn.Module,
        boxes: Tensor | Sequence[Sequence[float]],
        labels: Tensor | Sequence[int] | None = None,
        *,
        no_object: bool | None = None,
    ) -> None:
        super().__init__()
        corners = _numbers("boxes", boxes, "(K, 4) corners x0, y0, x1, y1 in pixels").float()
        if corners.ndim != 2 or corners.shape[1] != 4 or not len(corners) or not corners.isfinite().all():
            raise InputError(
                f"boxes must be (K, 4) corners x0, y0, x1, y1 in pixels, finite and at least one box, got "
                f"{shortened(corners.tolist())}"
            )
        if not (corners[:, 2:] > corners[:, :2]).all():
            raise InputError("boxes must have x1 > x0 and y1 > y0: corners x0, y0, x1, y1 in pixels")
        wanted = None if labels is None else _numbers("labels", labels, "class indices, one per box")
        if wanted is not None and (
            wanted.shape != corners.shape[:1]
            or wanted.dtype.is_floating_point
            or wanted.dtype == torch.bool
            or bool((wanted < 0).any())
        ):
            raise InputError(
                f"labels must be {len(corners)} class indices of 0 or more, one per box, got {shortened(labels)}"
            )
        one_of("no_object", no_object, (None, True, False))
        self.model = model
        self.no_object = no_object
        self.register_buffer("boxes", corners, persistent=False)
        self.register_buffer("labels", None if wanted is None else wanted.long(), persistent=False)

    def forward(self, *inputs: Any) -> Tensor:
        """``(N, K)`` scores."""
        size = _image_size(inputs)
        if size is not None:
            self._check_boxes(size)
        output = self.model(*inputs)
        if isinstance(output, (list, tuple)) and all(_has(one, _DETECTION) for one in output):
            score = [self._listed(one) for one in output]
            return _as_probability(torch.stack(score) if score else self.get_buffer("boxes").new_zeros(0, self._k))
        for logits, boxes in _QUERIES:
            if _has(output, (logits, boxes)):
                if size is None:
                    raise InputError("a detector with 'pred_boxes' needs images (N, C, H, W) as its first input")
                return _as_probability(self._queried(_get(output, logits), _get(output, boxes), size))
        raise InputError(
            "the model returns no detections: expected a list of {'boxes', 'labels', 'scores'} as torchvision's, or "
            "'pred_logits' (or 'logits') and 'pred_boxes' as DETR's. Is the detector in evaluation mode?"
        )

    @property
    def _k(self) -> int:
        return len(self.get_buffer("boxes"))

    def _check_boxes(self, size: tuple[int, int]) -> None:
        height, width = size
        boxes = self.get_buffer("boxes")
        beyond = torch.cat([-boxes, boxes - boxes.new_tensor([width, height] * 2)], 1).amax(1) > 1
        if bool(beyond.any()):
            raise InputError(
                f"box {tuple(boxes[beyond][0].tolist())} extends outside of the image, which is {width} wide and "
                f"{height} high; boxes are in pixels of the model's input"
            )
        if bool((boxes <= 1).all()) and max(size) > 1:
            raise InputError(
                f"boxes {shortened(boxes.tolist())} look like fractions of the image; they are pixels: multiply x by "
                f"{width} and y by {height}"
            )

    def _listed(self, found: Any) -> Tensor:
        boxes, labels, scores = (_get(found, name) for name in _DETECTION)
        if not len(boxes):
            # Zero, but connected to the model's graph, so that images without detections can be explained alone.
            return self.get_buffer("boxes").new_zeros(self._k) + boxes.sum() + scores.sum()
        similar = box_iou(self.get_buffer("boxes"), boxes) * scores
        if self.labels is not None:
            similar = similar * (labels == self.get_buffer("labels")[:, None])
        return similar.max(1).values

    def _queried(self, logits: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        logits, boxes = _at_least_single(logits), _at_least_single(boxes)
        corners = box_convert(boxes, "cxcywh", "xyxy") * boxes.new_tensor([size[1], size[0]] * 2)
        n, queries = corners.shape[:2]
        similar = box_iou(self.get_buffer("boxes"), corners.flatten(0, 1)).unflatten(1, (n, queries)).transpose(0, 1)
        chances = logits.softmax(-1)[..., :-1] if self._has_no_object(logits.shape[-1]) else logits.sigmoid()
        if self.labels is None:
            chance = chances.max(-1).values[:, None]
        else:
            wanted = self.get_buffer("labels")
            if int(wanted.max()) >= chances.shape[-1]:
                raise InputError(
                    f"label {int(wanted.max())} is not among the {chances.shape[-1]} classes that the model returns"
                )
            chance = chances[..., wanted].transpose(1, 2)
        return (similar * chance).max(-1).values

    def _has_no_object(self, columns: int) -> bool:
        classes = getattr(getattr(self.model, "config", None), "num_labels", None)
        if self.no_object is not None or classes is None:
            return self.no_object is not False
        if columns not in (classes, classes + 1):
            raise InputError(
                f"the model returns {columns} logits per box, but its config has num_labels={classes}; pass no_object="
                "True if the last one is 'no object', or False if all are classes"
            )
        return columns == classes + 1


def _as_probability(score: Tensor) -> Tensor:
    """``score`` as the sigmoid of its log odds, which methods detect (``class_probability="auto"``)."""
    score = _at_least_single(score)
    limits = torch.finfo(score.dtype)
    odds = score.clamp(limits.tiny, 1 - limits.eps).logit()
    return odds.masked_fill(score <= 0, -torch.inf).sigmoid()


def _at_least_single(values: Tensor) -> Tensor:
    return values if values.element_size() >= 4 else values.float()


def _numbers(name: str, values: Any, allowed: str) -> Tensor:
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} must be {allowed}, got {shortened(values)}") from error


def _image_size(inputs: Sequence[Any]) -> tuple[int, int] | None:
    """``(H, W)`` of the images, if they are one tensor."""
    first = inputs[0] if inputs else None
    return (first.shape[2], first.shape[3]) if isinstance(first, Tensor) and first.ndim == 4 else None


def _check_aspect(mask: Sequence[int], image: tuple[int, int] | None) -> None:
    if image is None:
        return
    (h, w), (height, width) = mask, image
    if max(abs(h - height * w / width), abs(w - width * h / height)) > 1:
        raise InputError(
            f"region is a mask of {h} x {w} pixels, which is not a resized version of images of {height} x {width}"
        )


def _get(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _has(output: Any, names: Sequence[str]) -> bool:
    return all(isinstance(_get(output, name), Tensor) for name in names)
