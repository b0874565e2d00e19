"""What several benchmarks on scenes share: guidance images of objects, and a network trained on scenes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_concepts.datasets import Scene

Network = TypeVar("Network", bound=nn.Module)
BATCH = 64


def crops(known: Scene, concept: int, most: int = 30) -> Tensor:
    """The inner squares of objects that show ``concept``, half the scene's size: nothing else is in them."""
    size = known.image.shape[-1]
    images = []
    for image, objects, boxes in zip(known.image, known.objects, known.boxes, strict=True):
        for words, (x0, y0, x1, y1) in zip(objects.tolist(), boxes.tolist(), strict=True):
            if concept in words:
                dx, dy = (x1 - x0) / 4, (y1 - y0) / 4
                part = image[:, round(y0 + dy) : round(y1 - dy) + 1, round(x0 + dx) : round(x1 - dx) + 1]
                images.append(F.interpolate(part[None], (size // 2, size // 2), mode="bilinear")[0])
    return torch.stack(images[:most])


def trained(
    network: Network,
    images: Tensor,
    labels: Tensor,
    epochs: int,
    *,
    lr: float = 3e-3,
    weight_decay: float = 0.05,
    augment: Callable[[Tensor], Tensor] = lambda x: x,
) -> Network:
    """The network, trained on batches of 64 in a random order (the caller seeds), and in evaluation mode.

    Args:
        network: images to logits; in training mode.
        images, labels: ``(N, 3, H, W)``, ``(N,)``; an epoch leaves out what does not fill a batch.
        epochs: passes over the images.
        lr: the highest of one cycle.
        weight_decay: AdamW's.
        augment: a batch of images to what the network sees of it.
    """
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=weight_decay)
    whole = len(images) // BATCH * BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * (whole // BATCH))
    for _ in range(epochs):
        for rows in torch.randperm(len(images))[:whole].split(BATCH):
            loss = F.cross_entropy(network(augment(images[rows])), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()
