"""The peers of SALF-CBM: a sparse head on the backbone's features, P-CBM, LF-CBM, and maps that know no concept.

P-CBM (Yuksekgonul et al., ICLR 2023) for a backbone that is not CLIP: a linear classifier of the backbone's features
for each concept, whose signed distances are the concepts. Its examples are the training images that the image-text
model scores highest, as SALF-CBM's paper has it, since no data set is annotated with these concepts.

LF-CBM (Oikarinen et al., ICLR 2023) in its own terms: one embedding an image, pooled features, a linear layer trained
by the cubic cosine similarity over the whole training set, early stopping on validation images, an interpretability
cutoff, standardised activations, the same head solver. It has no maps of its own; what comes nearest is each concept
unit's class activation map, its weights at every position of the feature map before it is pooled.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from captum.attr import LayerGradCam
from torch import Tensor, nn

from captum_concepts.errors import InputWarning
from captum_concepts.metrics import activation_energy, center_gaussian
from captum_concepts.solvers import ElasticNetResult, elastic_net_path, fit_elastic_net

CUTOFF = 0.45
#: Ridge strengths of dense heads, strongest first.
DENSE_LAMS = (1e-1, 3e-2, 1e-2, 1e-3, 1e-4)
#: Strengths of a path from all-zero down to 1e-4 of that; bisection then finds the number of weights.
LAMS = 30


def cubic_similarity(q: Tensor, p: Tensor) -> Tensor:
    """Cubic cosine similarity over the samples (dimension 0), for every other entry."""
    q, p = (x - x.mean(0) for x in (q, p))
    return F.cosine_similarity(q**3, p**3, dim=0)


@dataclass
class LFCBM:
    """Concept units ``(M, D)`` over pooled features, standardised, and which concepts stayed."""

    weight: Tensor
    mean: Tensor
    std: Tensor
    concepts: list[str]
    similarity: Tensor

    def activations(self, pooled: Tensor) -> Tensor:
        """``(N, M)``, standardised."""
        return (pooled @ self.weight.T - self.mean) / self.std

    def maps(self, features: Tensor) -> Tensor:
        """``(N, M, h, w)``: the class activation map of every concept unit."""
        return F.conv2d(features, self.weight[:, :, None, None])


def fit_lf_cbm(
    pooled: Tensor,
    similarity: Tensor,
    concepts: list[str],
    val: tuple[Tensor, Tensor],
    *,
    steps: int = 1000,
    lr: float = 1e-3,
    cutoff: float = CUTOFF,
    seed: int = 0,
) -> LFCBM:
    """Train concept units to follow ``similarity`` (N, M) of the training images' global embeddings.

    The best step on the validation images is kept, looked at every 50 steps, and training ends at the first that is
    worse, as in the published code. Features are divided by their spread first: Adam's step is the same for all.
    """
    spread = pooled.std(0).clamp(min=1e-6)
    torch.manual_seed(seed)
    layer = nn.Linear(pooled.shape[1], similarity.shape[1], bias=False)
    optimizer = torch.optim.Adam(layer.parameters(), lr=lr)
    best, kept = -torch.inf, layer.weight.detach().clone()
    for step in range(steps):
        if step % 50 == 0:
            with torch.no_grad():
                now = float(cubic_similarity(layer(val[0] / spread), val[1]).mean())
            if now < best:
                break
            best, kept = now, layer.weight.detach().clone()
        loss = -cubic_similarity(layer(pooled / spread), similarity).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weight = kept / spread
    found = cubic_similarity(val[0] @ weight.T, val[1])
    chosen = found > cutoff
    weight = weight[chosen]
    raw = pooled @ weight.T
    names = [name for name, yes in zip(concepts, chosen.tolist(), strict=True) if yes]
    return LFCBM(weight, raw.mean(0), raw.std(0), names, found)


def fit_p_cbm(
    pooled: Tensor, similarity: Tensor, concepts: list[str], *, examples: int = 50, strength: float = 0.1, seed: int = 0
) -> LFCBM:
    """Concept activation vectors of ``similarity`` (N, M): P-CBM's bank, standardised for the head as the others are.

    Args:
        pooled: ``(N, D)`` features of the training images.
        similarity: of the images' global embeddings and the words.
        concepts: M names.
        examples: positive images (of highest similarity), and as many random others; the published code takes 50, and a
            quarter of the images where there are not so many.
        strength: C of the support vector machine, one of the published code's grid.
        seed: of the negative images.
    """
    from sklearn.svm import LinearSVC

    generator = torch.Generator().manual_seed(seed)
    count = max(1, min(examples, len(pooled) // 4))
    rows = []
    for column in similarity.T:
        order = column.argsort(descending=True)
        rest = order[count:][torch.randperm(len(order) - count, generator=generator)[:count]]
        x, y = torch.cat([pooled[order[:count]], pooled[rest]]), [1] * count + [0] * count
        machine = LinearSVC(C=strength, max_iter=10_000).fit(x.double().numpy(), y)
        vector = torch.as_tensor(machine.coef_[0]).float()
        rows.append(vector / vector.norm().clamp_min(1e-12))
    weight = torch.stack(rows)
    raw = pooled @ weight.T
    found = cubic_similarity(raw, similarity)
    return LFCBM(weight, raw.mean(0), raw.std(0).clamp_min(1e-12), list(concepts), found)


@dataclass
class Head:
    """A linear head and how it did."""

    result: ElasticNetResult
    accuracy: float
    hits: list[bool]
    nonzeros_mean: float
    nonzeros_most: int


def sparse_head(
    x: Tensor,
    y: Tensor,
    test: tuple[Tensor, Tensor],
    *,
    most: int,
    num_classes: int,
    on_average: bool = False,
    lams: int = LAMS,
) -> Head:
    """The densest elastic-net head (alpha 0.99) of a path whose every class has at most ``most`` nonzero weights.

    Args:
        x, y: activations and labels.
        test: the same of unseen images.
        most: see above.
        num_classes: K.
        on_average: ``most`` is the mean over the classes instead (within 10 %), as LF-CBM and the paper count.
        lams: points of the path.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InputWarning)  # fewer are reached than asked for: the row says how many
        path: Any = elastic_net_path(
            x, y, nonzeros_per_class=float(min(most, x.shape[1])), num_classes=num_classes, standardize=True, tol=1e-3,
            n_lams=lams, lam_ratio=1e-4,
        )  # fmt: skip
    if on_average:
        return scored(path.selected, test)
    fitting = [r for r in path if int(r.nonzeros.max()) <= most]
    return scored(max(fitting, key=lambda r: float(r.nonzeros.sum())), test)


def dense_head(x: Tensor, y: Tensor, test: tuple[Tensor, Tensor], *, num_classes: int, seed: int = 0) -> Head:
    """A ridge head, its strength chosen by the accuracy on a tenth of the training images."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    held, rest = order[: len(x) // 10], order[len(x) // 10 :]
    options: Any = {"alpha": 0.0, "num_classes": num_classes, "standardize": True, "tol": 1e-3}
    path = elastic_net_path(x[rest], y[rest], lams=DENSE_LAMS, **options)
    hits = [int((r.decision_function(x[held]).argmax(1) == y[held]).sum()) for r in path]
    best = max(range(len(path)), key=hits.__getitem__)  # the strongest of equal ones
    return scored(fit_elastic_net(x, y, DENSE_LAMS[best], warm_start=path[best], **options), test)


def scored(result: ElasticNetResult, test: tuple[Tensor, Tensor]) -> Head:
    hits = result.decision_function(test[0]).argmax(1) == test[1]
    count = result.nonzeros.double()
    return Head(result, float(hits.double().mean()), hits.tolist(), float(count.mean()), int(count.max()))


def grad_cam(model: nn.Module, layer: nn.Module, images: Tensor, target: Tensor, batch_size: int = 50) -> Tensor:
    """``(N, h, w)`` Captum's Grad-CAM, rectified as published."""
    method = LayerGradCam(model, layer)
    parts = [
        method.attribute(x.requires_grad_(), t, relu_attributions=True).detach()[:, 0]
        for x, t in zip(images.clone().split(batch_size), target.split(batch_size), strict=True)
    ]
    return torch.cat(parts)


def blind_maps(features: Tensor, concepts: int, seed: int = 0) -> dict[str, Tensor]:
    """Maps that know no concept, the same for all (but the random ones)."""
    n, _, h, w = features.shape
    generator = torch.Generator().manual_seed(seed)
    energy = activation_energy(features)
    return {
        "activation energy": energy[:, None].expand(-1, concepts, -1, -1),
        "centre Gaussian": center_gaussian(n, (32, 32))[:, None].expand(-1, concepts, -1, -1),
        "random": torch.rand(n, concepts, h, w, generator=generator),
    }
