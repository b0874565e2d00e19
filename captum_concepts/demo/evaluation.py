"""Evaluation of the bundled models on held-out scenes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_concepts.datasets import CaptionedScenes
from captum_concepts.demo.prompting import draw_circles
from captum_concepts.vlm import ImageTextEncoder


@torch.no_grad()
def accuracy(model: nn.Module, data: CaptionedScenes, batch_size: int = 250) -> float:
    """Fraction of scenes that are classified correctly."""
    hits = 0
    for i in range(0, len(data), batch_size):
        batch = data.stack(range(i, min(i + batch_size, len(data))))
        hits += int((model(batch.image).argmax(1) == torch.as_tensor(batch.label)).sum())
    return round(hits / len(data), 4)


@torch.no_grad()
def ground_reliance(model: nn.Module, data: CaptionedScenes, n: int = 300) -> float:
    """Fraction of scenes whose predicted class changes when only the ground is replaced."""
    n = min(n, len(data))
    grounds = data.concept_groups["ground"]
    before = model(torch.stack([data.draw(i, ground=grounds[i % 6]).image for i in range(n)])).argmax(1)
    after = model(torch.stack([data.draw(i, ground=grounds[(i + 1 + i // 6 % 5) % 6]).image for i in range(n)])).argmax(
        1
    )
    return round(float((before != after).float().mean()), 4)


@torch.no_grad()
def circle_reaction(
    encoder: ImageTextEncoder, data: CaptionedScenes, *, width: float = 2 / 224
) -> dict[str, dict[str, float]]:
    """How often an object's attributes rank first among the concepts of their kind, with and without a circle.

    Only scenes with two or three objects are used, with one random object each; the circle is 1.15 times its bounding
    circle, and its line is ``width`` of the image side. ``"ground_circled"`` is how often the ground ranks first if the
    circle contains no object.
    """
    generator = torch.Generator().manual_seed(0)
    plain, circled, picked, spots, grounds = [], [], [], [], []
    size = data.size
    for scene in data:
        count = int((scene.objects[:, 0] >= 0).sum())
        if count < 2:
            continue
        k = int(torch.randint(count, (1,), generator=generator))
        box = scene.boxes[k]
        plain.append(scene.image)
        circled.append(torch.cat([(box[:2] + box[2:]) / 2, (box[2:3] - box[:1]) * 0.575]))
        picked.append(scene.objects[k])
        centres = torch.rand(200, 2, generator=generator) * size
        boxes = scene.boxes[:count]
        gap = torch.cdist(centres, (boxes[:, :2] + boxes[:, 2:]) / 2) - (boxes[:, 2] - boxes[:, 0]) / 2
        free = gap.amin(1)
        spots.append(torch.cat([centres[free.argmax()], free.max().clamp(0.05 * size, 32 / 224 * size)[None] * 0.9]))
        grounds.append(scene.ground)
    images, objects = torch.stack(plain), torch.stack(picked)
    rings, places = torch.stack(circled), torch.stack(spots)
    text = F.normalize(encoder.encode_text(data.concepts), dim=1)

    def scores(x: Tensor) -> Tensor:
        return torch.cat([F.normalize(encoder.encode_image(part), dim=1) @ text.T for part in x.split(250)])

    line = max(width * size, 0.5)
    with_circle = scores(draw_circles(images, rings[:, :2], rings[:, 2], line))
    without = scores(images)
    on_ground = scores(draw_circles(images, places[:, :2], places[:, 2], line))
    out: dict[str, dict[str, float]] = {"with_circle": {}, "without_circle": {}}
    for column, kind in enumerate(("shape", "colour", "texture")):
        words = [data.concepts.index(word) for word in data.concept_groups[kind]]
        for key, value in (("with_circle", with_circle), ("without_circle", without)):
            first = torch.tensor(words)[value[:, words].argmax(1)]
            out[key][kind] = round(float((first == objects[:, column]).float().mean()), 4)
    ground = torch.tensor(grounds)
    words = [data.concepts.index(word) for word in data.concept_groups["ground"]]
    out["without_circle"]["ground"] = round(
        float((torch.tensor(words)[without[:, words].argmax(1)] == ground).float().mean()), 4
    )
    out["ground_circled"] = {
        "ground_ranked_first_of_all": round(float((on_ground.argmax(1) == ground).float().mean()), 4)
    }
    return out
