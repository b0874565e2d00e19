"""What FAM is asked on: few-shot classes, two views of one image, and retrieval, on scenes, COCO and Caltech-101."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.record import best_device
from benchmarks.run.map_tables import Regions, pairs
from captum_concepts.datasets import CaptionedScenes, MaskFolder
from captum_concepts.images import find_images, load_image

#: COCO's things have ids up to 90, its stuff the ids above.
LAST_THING = 90
SIZE = 224
#: Where encoders are; images stay on the CPU until they are asked about.
DEVICE = best_device()


@dataclass(frozen=True)
class Task:
    """References made of support images, and what is asked about them.

    Args:
        support: ``(S, 3, H, W)``.
        members: for each reference the support images whose mean embedding it is.
        queries: targets index the references.
    """

    support: Tensor
    members: list[list[int]]
    queries: Regions

    @torch.no_grad()
    def bank(self, encoder: Callable[[Tensor], Tensor], batch: int = 16) -> Tensor:
        """``(K, D)`` references."""
        embedding = torch.cat([encoder(x.to(DEVICE)) for x in self.support.split(batch)])
        return torch.stack([embedding[rows].mean(0) for rows in self.members])


def scenes(n: int, shots: int, seed: int) -> Task:
    """Bundled scenes, ``shots`` support images a class: the class is the main object's, its exact mask the truth."""
    data = CaptionedScenes(n + 60 * shots, seed=seed, size=64)
    rows = [torch.nonzero(data.labels[n:] == c).flatten()[:shots] + n for c in range(len(data.classes))]
    queries = data.stack(range(n))
    items = [
        (image, [(int(c), objects[0])])
        for image, c, objects in zip(queries.image, queries.label, queries.object_masks, strict=True)
    ]
    members = [list(range(c * shots, (c + 1) * shots)) for c in range(len(rows))]
    return Task(data.stack(torch.cat(rows).tolist()).image, members, pairs(items, len(rows), seed))


def scene_words(n: int, seed: int) -> tuple[list[str], Regions]:
    """Bundled scenes: every word that is in the image, with its exact mask."""
    data = CaptionedScenes(n, seed=seed, size=64)
    items = []
    for scene in data:
        present = torch.nonzero(scene.presence).flatten().tolist()
        items.append((scene.image, [(t, scene.masks[t]) for t in present]))
    return list(data.concepts), pairs(items, len(data.concepts), seed)


def coco(root: Path) -> MaskFolder:
    """The things of the COCO images, squashed to 224 px, at least 2 % of the image each."""
    whole = MaskFolder(root)
    known = sorted(whole._known)
    things = [name for name, i in zip(whole.concepts, known, strict=True) if i <= LAST_THING]
    return MaskFolder(root, concepts=things, size=SIZE, resize="squash", min_area=0.02, unlabelled="background")


def coco_few_shot(data: MaskFolder, most: int, seed: int, each: int = 8) -> Task:
    """Leave one image out: the prototype of a thing is the mean of all other images that show it.

    Every reference belongs to one image and one thing in it; things on two images at least, at most ``each`` regions
    a thing, so that "person" is not the whole table.
    """
    items = list(data)
    shows = [set(torch.as_tensor(item.target).tolist()) for item in items]
    by_class = {t: [i for i, s in enumerate(shows) if t in s] for t in sorted(set().union(*shows))}
    counts = {t: 0 for t, images in by_class.items() if len(images) >= 2}
    order = [i for i, s in enumerate(shows) if s & set(counts)]
    random.Random(seed).shuffle(order)
    images, shown, index, target, masks, members, things = [], [], [], [], [], [], []
    for i in order[:most]:
        taken = False
        for t, mask in zip(torch.as_tensor(items[i].target).tolist(), items[i].masks, strict=True):
            if counts.get(t, each) < each:
                counts[t] += 1
                index.append(len(images))
                target.append(len(members))
                masks.append(mask)
                members.append([j for j in by_class[t] if j != i])
                things.append(t)
                taken = True
        if taken:
            images.append(items[i].image)
            shown.append(shows[i])
    draw = random.Random(seed)
    other = [draw.choice([k for k, t in enumerate(things) if t not in shown[n]]) for n in index]
    tensors = (torch.tensor(x) for x in (index, target, other))
    return Task(
        torch.stack([i.image for i in items]), members, Regions(torch.stack(images), *tensors, torch.stack(masks))
    )


def caltech_few_shot(root: Path, classes: int, shots: int, queries: int, seed: int) -> Task:
    """Classes of Caltech-101 drawn at random. Nobody drew masks: only the columns that change the image."""
    names = sorted(p.name for p in root.iterdir() if p.is_dir() and p.name != "Faces_easy")
    random.Random(seed).shuffle(names)
    names = sorted(names[:classes])
    guides, items = [], []
    for label, name in enumerate(names):
        files = sorted(find_images([root / name]))
        random.Random(f"{seed} {name}").shuffle(files)
        guides += [load_image(f, SIZE, resize="squash") for f in files[:shots]]
        items += [(load_image(f, SIZE, resize="squash"), [(label, None)]) for f in files[shots : shots + queries]]
    members = [list(range(c * shots, (c + 1) * shots)) for c in range(len(names))]
    return Task(torch.stack(guides), members, pairs(items, len(names), seed))


def view(images: Tensor, seed: int) -> Tensor:
    """A second view as contrastive learning draws it: a crop of 40 to 100 % of the area, flipped half of the time,
    brightness and contrast changed by up to 40 %."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for image in images:
        _, height, width = image.shape
        side = float(0.4 + 0.6 * torch.rand((), generator=generator)) ** 0.5
        h, w = round(side * height), round(side * width)
        top = int(torch.randint(height - h + 1, (), generator=generator))
        left = int(torch.randint(width - w + 1, (), generator=generator))
        crop = image[:, top : top + h, left : left + w][None]
        crop = F.interpolate(crop, (height, width), mode="bilinear", antialias=True)[0]
        crop = crop.flip(2) if torch.rand((), generator=generator) < 0.5 else crop
        bright, contrast = (0.6 + 0.8 * torch.rand(2, generator=generator)).tolist()
        crop = (crop * bright - crop.mean()) * contrast + crop.mean()
        out.append(crop.clamp(0, 1))
    return torch.stack(out)


def _own(images: Tensor, masks: Tensor | None, references: Tensor) -> Task:
    """Query i against reference i; the other target is another query's reference."""
    n = len(images)
    own = torch.arange(n)
    members = [[i] for i in range(n)]
    return Task(references, members, Regions(images, own, own, (own + n // 2) % n, masks))


def coco_foregrounds(data: MaskFolder, most: int, seed: int) -> tuple[Tensor, Tensor, list[set[int]]]:
    """Images with things, the union of their masks, and which things they show."""
    items = [item for item in data if len(item.masks)]
    random.Random(seed).shuffle(items)
    items = items[:most]
    masks = torch.stack([item.masks.any(0) for item in items])
    return torch.stack([i.image for i in items]), masks, [set(torch.as_tensor(i.target).tolist()) for i in items]


def contrastive(images: Tensor, masks: Tensor | None, seed: int) -> Task:
    """Each image against another view of itself; the truth is its foreground."""
    return _own(images, masks, view(images, seed))


@torch.no_grad()
def retrieval(encoder: nn.Module, data: MaskFolder, most: int, seed: int) -> Task:
    """Each image against the most similar other image that shares a thing; the truth is the shared things."""
    items = [item for item in data if len(item.masks)]
    images = torch.stack([item.image for item in items])
    embedding = torch.cat([F.normalize(encoder(x.to(DEVICE)), dim=1).cpu() for x in images.split(16)])
    targets = [torch.as_tensor(item.target).tolist() for item in items]
    similarity = (embedding @ embedding.T).fill_diagonal_(-2)
    for i, own in enumerate(targets):
        for j, theirs in enumerate(targets):
            if not set(own) & set(theirs):
                similarity[i, j] = -2
    best = similarity.max(1)
    order = [i for i in range(len(items)) if float(best.values[i]) > -2]
    random.Random(seed).shuffle(order)
    order = order[:most]
    masks = []
    for i in order:
        shared = set(targets[i]) & set(targets[int(best.indices[i])])
        masks.append(torch.stack([m for t, m in zip(targets[i], items[i].masks, strict=True) if t in shared]).any(0))
    return _own(images[order], torch.stack(masks), images[best.indices[order]])


def caltech_retrieval(root: Path, encoder: nn.Module, classes: int, each: int, seed: int) -> Task:
    """Each image against the most similar other image; without masks."""
    images = caltech_few_shot(root, classes, 1, each, seed).queries.images
    with torch.no_grad():
        embedding = torch.cat([F.normalize(encoder(x.to(DEVICE)), dim=1).cpu() for x in images.split(16)])
    nearest = (embedding @ embedding.T).fill_diagonal_(-2).argmax(1)
    return _own(images, None, images[nearest])
