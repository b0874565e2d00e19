"""The peers of the methods, each as ``(images, targets) -> maps``, and the rules that give a word one channel.

Embedding models have no classes for a peer to explain, so :class:`Similarity` gives them: its outputs are the cosines
to every reference, and a peer explains one of these as it would explain a class.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_concepts.activations import Layers, spatial_activations
from captum_concepts.attr import refinement


class Similarity(nn.Module):
    """Cosines of an encoder's embeddings to K references."""

    def __init__(self, encoder: nn.Module, references: Tensor) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("references", F.normalize(references, dim=1))

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.encoder(images), dim=1) @ self.references.T


def activations(model: nn.Module, layer: Any) -> Callable[[Tensor], Tensor]:
    """images -> ``(N, C, h, w)`` of the layer."""

    def run(images: Tensor) -> Tensor:
        with torch.no_grad():
            return spatial_activations(model, images, [layer]).maps[0].float()

    return run


def refined_energy(model: nn.Module, layer: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """Activation energy with everything that refined maps have but the reference: stages, an image without content,
    spreading. What a refined map shows beyond this, it knows of the reference."""

    found, known = Layers.resolve(model, layer), {}

    def run(images: Tensor, target: Tensor) -> Tensor:  # noqa: ARG001
        with torch.no_grad():
            layers = refinement.with_stages(found, True, known, images[:1], None)
            sharper = refinement.prepare(layers, layers.run(images), images, None, False)
            return sharper.maps([content.norm(dim=1, keepdim=True) for content in sharper.content])

    return run


def captum_grad_cam(model: nn.Module, layer: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """Captum's ``LayerGradCam`` with its ReLU. It reads NCHW layers only."""
    from captum.attr import LayerGradCam

    method = LayerGradCam(model, layer)
    return lambda x, target: method.attribute(x, target=target, relu_attributions=True).sum(1)


def captum_integrated_gradients(
    model: nn.Module, layer: nn.Module, steps: int = 16
) -> Callable[[Tensor, Tensor], Tensor]:
    """Captum's ``LayerIntegratedGradients`` from the black image, summed over the layer's channels."""
    from captum.attr import LayerIntegratedGradients

    method = LayerIntegratedGradients(model, layer)
    return lambda x, target: method.attribute(
        x, torch.zeros_like(x), target=target, n_steps=steps, internal_batch_size=16
    ).sum(1)


def pytorch_grad_cam(
    kind: str, model: nn.Module, layer: nn.Module, **options: Any
) -> Callable[[Tensor, Tensor], Tensor]:
    """A method of pytorch-grad-cam by its class name, e.g. ``GradCAM`` or ``ScoreCAM``. Maps come at image size."""
    import pytorch_grad_cam as package
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    method = getattr(package, kind)(model, [layer], **options)

    def run(x: Tensor, target: Tensor) -> Tensor:
        x = x.detach().clone().requires_grad_()  # it fails where all weights are frozen
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bars cannot be turned off
            return torch.from_numpy(method(x, [ClassifierOutputTarget(int(t)) for t in target]))

    return run


def deep_feature_factorization(
    model: nn.Module, layer: nn.Module, scores: Callable[[Tensor], Tensor], components: int = 5
) -> Callable[[Tensor, Tensor], Tensor]:
    """pytorch-grad-cam's factorization, an image at a time; the component that scores the target highest is its map.

    ``scores`` gives ``(components, K)`` for the channel vectors of the components: the package's
    ``computation_on_concepts``.
    """
    from pytorch_grad_cam.feature_factorization.deep_feature_factorization import dff

    read = activations(model, layer)

    def run(x: Tensor, target: Tensor) -> Tensor:
        out = []
        for image, t in zip(x, target.tolist(), strict=True):
            concepts, heat = dff(read(image[None]).cpu().numpy().copy(), n_components=components)
            with torch.no_grad():
                best = int(scores(torch.from_numpy(concepts.T).float())[:, t].argmax())
            out.append(torch.from_numpy(heat[0, best]).float())
        return torch.stack(out)

    return run


def soft_wpmi(channels: Tensor, similarity: Tensor, *, top: int = 100, temperature: float = 10.0) -> Tensor:
    """CLIP-Dissect's soft pointwise mutual information, ``(C, T)``: which word names a channel.

    For each channel, over its ``top`` most activating probe images, with p falling evenly from 0.998 towards 0.97 along
    their ranks: the sum of log(1 + p (P(t | x) - 1)), less the logarithm of the mean over channels of its exponential.
    P is the softmax over words of ``temperature`` times the similarity. Oikarinen and Weng, ICLR 2023, and its code.

    Args:
        channels: ``(n, C)`` pooled activations of the probe images.
        similarity: ``(n, T)`` image-text similarities.
        top: at most all probe images.
        temperature: the published 10, for CLIP's cosines.
    """
    top = min(top, len(channels))
    prob = (temperature * similarity).softmax(1)
    order = channels.topk(top, dim=0).indices  # (top, C)
    inclusion = (0.998 - torch.arange(top) / top * (0.998 - 0.97))[:, None]
    rows = [(1 + inclusion * (prob[order[:, c]] - 1) + 1e-7).log().sum(0) for c in range(channels.shape[1])]
    scores = torch.stack(rows)
    return scores - (scores.logsumexp(0) - math.log(len(scores)))


def adaptive_cosine(channels: Tensor, similarity: Tensor, template: Tensor, *, top: int = 40) -> Tensor:
    """WWW's concept matching, ``(C, T)``: cosines of a channel's ``top`` images to a word, less those to a template.

    Ahn et al., CVPR 2024, and its code: 40 example images, "A photo of a" as the bare template.

    Args:
        channels: ``(n, C)`` pooled activations of the probe images.
        similarity: ``(n, T)`` cosines to the words.
        template: ``(n,)`` cosines to the bare template.
        top: at most all probe images.
    """
    order = channels.topk(min(top, len(channels)), dim=0).indices
    return (similarity - template[:, None])[order].mean(0)


@torch.no_grad()
def channel_tables(
    reads: list[Callable[[Tensor], Tensor]],
    encoder: Any,
    probe: Any,
    words: list[str],
    device: str,
) -> dict[str, list[Tensor]]:
    """CLIP-Dissect's and WWW's scores of every channel and word, ``(C, T)`` for each layer.

    ``probe`` is a tensor of images, or a data set of them.
    """
    pooled: list[list[Tensor]] = [[] for _ in reads]
    embedded = []
    for start in range(0, len(probe), 32):
        x = torch.stack([probe[i] for i in range(start, min(start + 32, len(probe)))]).to(device)
        for read, into in zip(reads, pooled, strict=True):
            into.append(read(x).mean((2, 3)).cpu())
        embedded.append(F.normalize(encoder.encode_image(x), dim=1).float().cpu())
    channels, images = [torch.cat(parts) for parts in pooled], torch.cat(embedded)

    def cosines(texts: list[str]) -> Tensor:
        return images @ F.normalize(encoder.encode_text(texts), dim=1).float().cpu().T

    similarity = cosines(words)
    try:
        template = cosines(["a photo of a"])[:, 0]
    except (KeyError, ValueError):  # an image-text model of few words: the mean word takes the template's place
        template = similarity.mean(1)
    return {
        "CLIP-Dissect": [soft_wpmi(own, similarity) for own in channels],
        "WWW": [adaptive_cosine(own, similarity, template) for own in channels],
    }


def single_channel(read: Callable[[Tensor], Tensor], table: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Each word's map is that of the one channel that ``table`` (C, T) gives the highest value."""
    channel = table.argmax(0)

    def run(x: Tensor, target: Tensor) -> Tensor:
        maps = read(x)
        return maps[torch.arange(len(x)), channel.to(maps.device)[target.to(maps.device)]]

    return run
