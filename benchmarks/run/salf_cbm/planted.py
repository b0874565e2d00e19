"""A planted error and its repair: a classifier that leans on the ground, corrected through its concepts."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.data.salf_cbm import scenes
from benchmarks.peers.salf_cbm import dense_head, sparse_head
from benchmarks.run.salf_cbm.heads import install
from benchmarks.run.salf_cbm.maps import accuracy_interval
from benchmarks.run.salf_cbm.scenes import CLASSES, PROMPT, batched, fit
from captum_concepts import demo

#: What the bottleneck, which needs no label, was trained on. The head always sees biased scenes.
BOTTLENECKS = {"the biased scenes": "biased", "other scenes, unlabelled, grounds independent": "train"}


def planted_error(
    cache: Path, images: int, test_images: int, epochs: int, most: Sequence[int] = (2, 4, 10)
) -> dict[str, Any]:
    """Repair a model whose classes have a planted ground, and count on unseen scenes where they have none.

    The head is trained on scenes where the class's planted ground is there with probability 0.9, over the bundled
    ``classifier-spurious``, so nothing but the user's word says that the ground is no reason. Heads of few weights a
    class show the grounds in their rules; heads of many hide them in other concepts. No repair knows a label:

    - *the planted weight*: the weight of each class's planted ground becomes 0 (six numbers);
    - *all ground weights*: the six grounds lose their weights in every class;
    - *refitted*: the head is fitted again, on the same biased scenes, without the six grounds;
    - *intervene, one concept*: for each image ``explain_region`` on the ground's mask names the ground seen there (the
      strongest of the six words); ``intervene`` takes that concept back to its training mean in that region;
    - *intervene, the region*: the same with all concepts: nothing that is seen in the ground shall count.

    ``ground_from_other_concepts`` says why weights alone may not do: how often the ground can be read, linearly, off
    the activations of the fifteen concepts that describe objects (chance: 1/6).
    """
    data, biased = scenes("biased", images, 0.9)
    _, test = scenes("test", test_images)
    backbone = demo.load("classifier-spurious")
    record: dict[str, Any] = {
        "images": images,
        "test_images": test_images,
        "epochs": epochs,
        "most_nonzeros_a_class": list(most),
        "backbone": right(batched(backbone, test.image), test.label),
        "bottlenecks": {},
    }
    for name, split in BOTTLENECKS.items():
        known = scenes(split, images, 0.9 if split == "biased" else 0.0)[1]
        options = {"nonzeros_per_class": 10, "bottleneck": {"max_epochs": epochs}}
        model = fit(
            cache, "biased" if split == "biased" else "scenes", backbone, known, data.concepts, PROMPT, **options
        )
        record["bottlenecks"][name] = {}
        for count in most:
            print(f"{name}, at most {count} weights a class", flush=True)
            record["bottlenecks"][name][str(count)] = repairs(model, biased, test, data, count)
    return record


def repairs(model: Any, biased: Any, test: Any, data: Any, most: int) -> dict[str, Any]:
    """The head on biased scenes, and every repair of it."""
    words = data.concept_groups["ground"]
    grounds = [model.concepts.index(word) for word in words]
    rest = [j for j in range(len(model.concepts)) if j not in grounds]
    x, y = (batched(model.concept_activations, part.image) for part in (biased, test))
    install(model, sparse_head(x, biased.label, (y, test.label), most=most, num_classes=CLASSES))
    before = batched(model, test.image)
    after = {}
    edited = copy.deepcopy(model)
    with torch.no_grad():
        for label, ground in enumerate(data.planted_grounds):
            edited.head.weight[label, model.concepts.index(data.concepts[ground])] = 0
        after["the planted weight removed"] = batched(edited, test.image)
        edited.head.weight[:, grounds] = 0
        after["all ground weights removed"] = batched(edited, test.image)
    refitted = sparse_head(x[:, rest], biased.label, (y[:, rest], test.label), most=most, num_classes=CLASSES)
    after["head refitted without the grounds"] = refitted.result.decision_function(y[:, rest])
    one, region, named = by_intervention(model, test, words)
    after["intervene: the ground seen there"] = one
    after["intervene: all that is seen in the ground"] = region
    true = [data.concepts[int(k)] == word for k, word in zip(test.ground, named, strict=True)]
    own = [torch.tensor([words.index(data.concepts[int(k)]) for k in part.ground]) for part in (biased, test)]
    leak = dense_head(x[:, rest], own[0], (y[:, rest], own[1]), num_classes=len(words))
    planted = torch.tensor([data.planted_grounds.index(int(k)) for k in test.ground])
    found = {
        "before": right(before, test.label),
        "ground_named_right": sum(true) / len(true),
        "share_of_weight_on_grounds": share_on(model.head.weight, grounds),
        "ground_from_other_concepts": leak.accuracy,
        "rules": {name: model.decision_rules(c, 5) for c, name in enumerate(data.classes)},
        "repairs": {name: repaired(before, logits, test.label, planted) for name, logits in after.items()},
    }
    for name, row in found["repairs"].items():
        print(f"  {name}: " + ", ".join(f"{k} {v[0]:.3f}" for k, v in row.items() if v), flush=True)
    return found


@torch.no_grad()
def by_intervention(model: Any, test: Any, grounds: list[str]) -> tuple[Tensor, Tensor, list[str]]:
    """Logits after editing the ground's concept, after editing all concepts there, and which ground was named."""
    one, every, named = [], [], []
    for image, ground, masks in zip(test.image, test.ground, test.masks, strict=True):
        x, mask = image[None], masks[int(ground)]
        seen = model.explain_region(x, mask=mask, top_k=None)
        score = dict(zip(seen.concepts, seen.scores[0].tolist(), strict=True))
        word = max(grounds, key=score.__getitem__)
        one.append(model.intervene(x, word, mask=mask, beta=-score[word], units="std")[1])
        betas = [-score[concept] for concept in model.concepts]
        every.append(model.intervene(x, list(model.concepts), mask=mask, beta=betas, units="std")[1])
        named.append(word)
    return torch.cat(one), torch.cat(every), named


def right(logits: Tensor, label: Tensor) -> list[float]:
    """Accuracy and its interval."""
    return accuracy_interval((logits.argmax(1) == label).tolist())


def repaired(before: Tensor, after: Tensor, label: Tensor, planted: Tensor) -> dict[str, Any]:
    """Accuracy afterwards, and shares of the predictions before.

    Args:
        before, after: ``(N, K)`` logits.
        label: ``(N,)``.
        planted: ``(N,)`` the class whose planted ground each scene has.

    Returns:
        ``accuracy``; ``planted_errors_repaired``, of the wrong predictions that named the ground's class, the share
        made right; ``wrong_repaired``, of all wrong ones; ``right_broken``, of the right ones the share made wrong.
    """
    said = before.argmax(1)
    was, now = said == label, after.argmax(1) == label
    fooled = ~was & (said == planted)
    return {
        "accuracy": accuracy_interval(now.tolist()),
        "planted_errors_repaired": accuracy_interval(now[fooled].tolist()) if fooled.any() else None,
        "wrong_repaired": accuracy_interval(now[~was].tolist()),
        "right_broken": accuracy_interval((~now[was]).tolist()),
    }


def share_on(weight: Tensor, columns: list[int]) -> float:
    """Share of the head's absolute weight that lies on these columns."""
    size = weight.detach().abs()
    return float(size[:, columns].sum() / size.sum())
