"""Scores of models that do not classify whole images: wrappers that every explainer and metric takes as its model.

A wrapper is an ``nn.Module`` whose child ``model`` is the user's, so its layers are ``"model.backbone.layer4"``; its
output is one score per column, and ``target=`` chooses the column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert, box_iou

from captum_concepts._captum import output_tensor
from captum_concepts._checks import one_of
from captum_concepts.errors import InputError

__all__ = ["Box", "SemanticSegmentation"]

_DETECTION = ("boxes", "labels", "scores")
_QUERIES = (("pred_logits", "pred_boxes"), ("logits", "pred_boxes"))


class SemanticSegmentation(nn.Module):
    r"""A segmentation network's logits ``(N, L, h, w)`` as one score per class: their mean over a region.

    .. math:: s_l = \frac{1}{|R_l|} \sum_{(i, j) \in R_l} y_{l, i, j}

    Args:
        model: returns ``(N, L, h, w)`` logits, alone, first in a tuple, under ``out`` or ``logits`` of a mapping or an
            object (torchvision, Hugging Face) or ``seg_logits`` (mmseg), or as its only tensor.
        region: ``"predicted"``: the pixels where the class is the highest (a class that no pixel has scores 0 and
            depends on nothing); ``"all"`` pixels; or a bool mask ``(H, W)`` of what is asked about, resized to
            the logits, the same for every image.

    Raises:
        InputError: ``region`` is something else; the output is not such logits.
        TargetError: the output holds no tensor, or several without a known name.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1))
        >>> SemanticSegmentation(net, region="all")(torch.rand(2, 3, 16, 16)).shape
        torch.Size([2, 4])
    """

    def __init__(self, model: nn.Module, region: str | Tensor = "predicted") -> None:
        super().__init__()
        if isinstance(region, Tensor):
            if region.ndim != 2 or region.dtype != torch.bool or not region.any():
                raise InputError(
                    f"region must be a bool mask (H, W) with a pixel that is True, got {tuple(region.shape)} "
                    f"{region.dtype}"
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
        if logits.ndim != 4:
            raise InputError(
                f"the model returns no logits (N, L, h, w), but {tuple(logits.shape)}; wrap it in a module"
            )
        if self.region == "all":
            return logits.mean((2, 3))
        if self.region == "mask":
            # A pixel of the logits belongs to the region by the part of it that does: a small region is never lost.
            part = nn.functional.interpolate(self.get_buffer("mask"), logits.shape[-2:], mode="area")
        else:
            part = torch.zeros_like(logits).scatter_(1, logits.detach().argmax(1, keepdim=True), 1)
        part = part.to(logits.dtype)
        return (logits * part).sum((2, 3)) / part.sum((2, 3)).clamp_min(torch.finfo(logits.dtype).tiny)


class Box(nn.Module):
    r"""A detector as one score per box that is asked about: is there such an object, at that place?

    .. math:: s_k = \max_j \; \mathrm{IoU}(b_k, \hat b_j) \; \hat p_j(l_k)

    over the detections :math:`j`: the similarity of D-RISE (Petsiuk et al., CVPR 2021) with the label's own
    probability. It is differentiable in boxes and probabilities, in [0, 1], and 0 where nothing like it is detected.

    Args:
        model: a torchvision detector (a list of ``{"boxes", "labels", "scores"}``), or one whose output has
            ``pred_logits`` or ``logits`` ``(N, Q, L + 1)``, the last class being "no object", and ``pred_boxes``
            ``(N, Q, 4)`` as center, width and height in shares of the image (DETR, its relatives, Hugging Face's).
        boxes: ``(K, 4)`` corners ``x0, y0, x1, y1`` in pixels of the input.
        labels: K class indices, or None: the box's most probable class.

    Raises:
        InputError: boxes or labels of another shape; a box without area; the output holds no detections.

    Note:
        torchvision's detectors resize and pad images before the backbone, so that a layer's grid covers the padded
        image: at most 31 pixels more at the right and the bottom.

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
        self, model: nn.Module, boxes: Tensor | Sequence[Sequence[float]], labels: Tensor | Sequence[int] | None = None
    ) -> None:
        super().__init__()
        corners = torch.as_tensor(boxes, dtype=torch.float32)
        if corners.ndim != 2 or corners.shape[1] != 4 or not len(corners) or not corners.isfinite().all():
            raise InputError(f"boxes must be (K, 4) corners x0, y0, x1, y1 in pixels, got {tuple(corners.shape)}")
        if not (corners[:, 2:] > corners[:, :2]).all():
            raise InputError("boxes must have x1 > x0 and y1 > y0: corners x0, y0, x1, y1 in pixels")
        wanted = None if labels is None else torch.as_tensor(labels)
        if wanted is not None and (wanted.shape != corners.shape[:1] or wanted.dtype.is_floating_point):
            raise InputError(f"labels must be {len(corners)} class indices, one per box, got {tuple(wanted.shape)}")
        self.model = model
        self.register_buffer("boxes", corners, persistent=False)
        self.register_buffer("labels", wanted, persistent=False)

    def forward(self, *inputs: Any) -> Tensor:
        """``(N, K)`` scores."""
        output = self.model(*inputs)
        if isinstance(output, (list, tuple)) and output and all(_has(one, _DETECTION) for one in output):
            return torch.stack([self._listed(one) for one in output])
        for logits, boxes in _QUERIES:
            if _has(output, (logits, boxes)):
                return self._queried(_get(output, logits), _get(output, boxes), inputs[0].shape[-2:])
        raise InputError(
            "the model returns no detections: expected a list of {'boxes', 'labels', 'scores'} as torchvision's, or "
            "'pred_logits' (or 'logits') and 'pred_boxes' as DETR's. Is the detector in evaluation mode?"
        )

    def _listed(self, found: Any) -> Tensor:
        boxes, labels, scores = (_get(found, name) for name in _DETECTION)
        if not len(boxes):
            return self.get_buffer("boxes").new_zeros(len(self.get_buffer("boxes")))
        similar = box_iou(self.get_buffer("boxes"), boxes) * scores
        if self.labels is not None:
            similar = similar * (labels == self.get_buffer("labels")[:, None])
        return similar.max(1).values

    def _queried(self, logits: Tensor, boxes: Tensor, size: torch.Size) -> Tensor:
        corners = box_convert(boxes, "cxcywh", "xyxy") * boxes.new_tensor([size[1], size[0]] * 2)
        similar = torch.stack([box_iou(self.get_buffer("boxes"), found) for found in corners])
        chances = logits.softmax(-1)[..., :-1]
        if self.labels is None:
            chance = chances.max(-1).values[:, None]
        else:
            chance = chances[..., self.get_buffer("labels")].transpose(1, 2)
        return (similar * chance).max(-1).values


def _get(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _has(output: Any, names: Sequence[str]) -> bool:
    return all(isinstance(_get(output, name), Tensor) for name in names)
