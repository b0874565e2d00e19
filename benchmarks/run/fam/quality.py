"""FAM's quality: few-shot, contrastive and retrieval rows beside their peers, and the paper's open questions.

    python -m benchmarks.run.fam.quality                              # bundled models and scenes; needs no data
    python -m benchmarks.run.fam.quality --data ../shared/data        # and MobileNetV2 on COCO and Caltech-101
    python -m benchmarks.run.fam.quality --parts coco-few-shot --images 40

DATA is a folder with ``real_models.py``, ``images/coco`` and ``images/caltech101``. No model without labels can be had
offline: the encoder is an ImageNet classifier without its head, whose embedding is the pooled last layer. IoU is that
of the map above half of its range. Intervals: 95 % bootstrap over images.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.data.photographs import real_models
from benchmarks.peers import maps as peers
from benchmarks.record import RESULTS, environment, median_times, table, write
from benchmarks.report.cells import COLUMNS
from benchmarks.run.fam import tasks
from benchmarks.run.map_tables import Explainer, Regions, Table, measure
from captum_concepts import FeatureActivationMap, demo

SEED = 0
measured = partial(measure, device=tasks.DEVICE)


def fam(encoder: Any, layer: Any, bank: Tensor, **options: Any) -> Explainer:
    method = FeatureActivationMap(encoder, layer, bank, **options)
    return lambda x, target: method.attribute(x, target=target)


def similarity_peers(
    encoder: nn.Module, layer: nn.Module, bank: Tensor, *, score_cam: bool, reshape: Callable[..., Any] | None = None
) -> dict[str, Explainer]:
    """What else could explain the similarity: the peers, each given the cosines to the references as its classes."""
    model = peers.Similarity(encoder, bank)
    options = {} if reshape is None else {"reshape_transform": reshape}
    found = {}
    if reshape is None:
        found["captum LayerGradCam of the similarity"] = peers.captum_grad_cam(model, layer)
        found["captum LayerIntegratedGradients"] = peers.captum_integrated_gradients(model, layer)
    found["pytorch-grad-cam GradCAM of the similarity"] = peers.pytorch_grad_cam("GradCAM", model, layer, **options)
    if score_cam:
        found["pytorch-grad-cam ScoreCAM"] = peers.pytorch_grad_cam("ScoreCAM", model, layer, **options)
    if reshape is None:
        scores = lambda c: F.normalize(c, dim=1) @ model.references.cpu().T  # noqa: E731
        found["pytorch-grad-cam deep_feature_factorization"] = peers.deep_feature_factorization(model, layer, scores)
    read = peers.activations(encoder, layer)

    def strongest(x: Tensor, target: Tensor) -> Tensor:
        maps = read(x)
        share = maps.mean((2, 3)) * model.references[target.to(maps.device)]
        return maps[torch.arange(len(x)), share.argmax(1)]

    if reshape is None:
        found["single channel of the largest contribution"] = strongest
    return found


def compare(title: str, note: str, encoder: Any, layer: Any, task: tasks.Task, more: dict[str, Explainer]) -> Table:
    """FAM first, then its peers, then the maps that know nothing.

    Made worse on purpose is the refined map: it knows its target best.
    """
    bank = task.bank(encoder)
    score = peers.Similarity(encoder, bank).eval()
    own = {
        "FAM": fam(encoder, layer, bank),
        "FAM, gradient": fam(encoder, layer, bank, weights="gradient"),
        "FAM, refined": fam(encoder, layer, bank, refine=True),
    }
    options = {"energy": peers.activations(encoder, layer), "blind": refined_energy(encoder, layer)}
    return measured(title, note, {**own, **more}, task.queries, score=score, degrade="FAM, refined", **options)


def refined_energy(encoder: nn.Module, layer: Any) -> dict[str, Explainer]:
    return {"activation energy, refined": peers.refined_energy(encoder, layer)}


def tokens(maps: Tensor) -> Tensor:
    """pytorch-grad-cam's reshape of tokens behind one class token."""
    n, count, channels = maps.shape
    side = round((count - 1) ** 0.5)
    return maps[:, 1:].reshape(n, side, side, channels).permute(0, 3, 1, 2)


def headless(model: nn.Module, head: str) -> nn.Module:
    """The network without its classifier."""
    setattr(model, head, nn.Identity())
    return model


def imagenet_encoder(data: Path, name: str = "mobilenet_v2") -> nn.Module:
    model = getattr(real_models(data), name)()
    if name == "squeezenet1_0":
        model.net.classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1))
    else:
        model.net.classifier = nn.Identity()
    return model.eval().to(tasks.DEVICE)


# ---------------------------------------------------------------------------------------------- on bundled scenes


def scenes_few_shot(args: argparse.Namespace) -> list[Table]:
    """Six classes, five shots; the bundled CNN's trunk and the bundled ViT's, with every peer."""
    task = tasks.scenes(args.images or 60, 5, SEED)
    out = []
    for name, head, layer in (("classifier", "fc", "layer4"), ("vit", "head", "blocks.3")):
        encoder = headless(demo.load(name), head).to(tasks.DEVICE)
        module = encoder.get_submodule(layer)
        more = similarity_peers(
            encoder, module, task.bank(encoder), score_cam=True, reshape=tokens if name == "vit" else None
        )
        kind = "a CNN" if name == "classifier" else "a vision transformer"
        note = f"Six classes, 5 shots, prototypes; {layer} of the bundled {name}; truth: the main object's exact mask."
        out.append(compare(f"few-shot, scenes, {kind}", note, encoder, module, task, more))
    return out


def scenes_pairs(args: argparse.Namespace) -> list[Table]:
    """Two views of one scene under the bundled image-text model, and the scene's words as references."""
    n = args.images or 60
    clip = demo.load("clip").to(tasks.DEVICE)
    layer = clip.model.visual.trunk.layer4
    few = tasks.scenes(n, 1, SEED + 1)
    objects = torch.stack([scene.object_masks.any(0) for scene in tasks.CaptionedScenes(n, seed=SEED + 1, size=64)])
    two = tasks.contrastive(few.queries.images, objects, SEED)
    note = "The bundled image-text model (contrastively trained); truth: all objects of the scene."
    out = [compare("contrastive, scenes: two views of one image", note, clip.encode_image, layer, two, {})]
    words, regions = tasks.scene_words(max(8, n // 3), SEED + 2)
    bank = clip.encode_text(words)
    score = lambda x: F.normalize(clip.encode_image(x), dim=1) @ F.normalize(bank, dim=1).T  # noqa: E731
    explainers = {f"FAM, {w}": fam(clip.encode_image, layer, bank, weights=w) for w in ("contribution", "gradient")}
    explainers["FAM, refined"] = fam(clip.encode_image, layer, bank, refine=True)
    note = "References are the texts of the 21 words; truth: each word's exact mask."
    energy = peers.activations(clip.encode_image, layer)
    title, known = "image-text, scenes: words", "FAM, refined"
    options = {"energy": energy, "blind": refined_energy(clip.encode_image, layer)}
    out.append(measured(title, note, explainers, regions, score=score, degrade=known, **options))
    return out


# ---------------------------------------------------------------------------------------------- on photographs


def coco_few_shot(args: argparse.Namespace) -> list[Table]:
    task = tasks.coco_few_shot(tasks.coco(args.data / "images" / "coco"), args.images or 45, SEED)
    note = "Leave one image out: the prototype of a thing is the mean of the other images that show it."
    out = []
    for name in ("mobilenet_v2", "squeezenet1_0"):
        encoder = imagenet_encoder(args.data, name)
        layer = encoder.net.features
        every = similarity_peers(encoder, layer, task.bank(encoder), score_cam=False)
        more = every if name == "mobilenet_v2" else {}
        out.append(compare(f"few-shot, COCO, {name}", note, encoder, layer, task, more))
    return out


def coco_pairs(args: argparse.Namespace) -> list[Table]:
    data, n = tasks.coco(args.data / "images" / "coco"), args.images or 40
    encoder = imagenet_encoder(args.data)
    layer = encoder.net.features
    images, masks, _ = tasks.coco_foregrounds(data, n, SEED)
    found = []
    for title, note, task in (
        ("contrastive, COCO", "Two views of one image; truth: all things.", tasks.contrastive(images, masks, SEED)),
        ("retrieval, COCO", "The most similar other image that shares a thing; truth: the shared things.",
         tasks.retrieval(encoder, data, n, SEED)),
    ):  # fmt: skip
        few = similarity_peers(encoder, layer, task.bank(encoder), score_cam=False)
        kept = {k: f for k, f in few.items() if "GradCAM" in k or "LayerGradCam" in k or "factorization" in k}
        found.append(compare(title, f"{note} MobileNetV2.", encoder, layer, task, kept))
    return found


def caltech(args: argparse.Namespace) -> list[Table]:
    root, n = args.data / "images" / "caltech101", args.images or 40
    encoder = imagenet_encoder(args.data)
    layer = encoder.net.features
    few = tasks.caltech_few_shot(root, 20, 5, max(1, n // 20), SEED)
    found = []
    for title, note, task in (
        ("few-shot, Caltech-101", "20 classes, 5 shots.", few),
        ("contrastive, Caltech-101", "Two views of one image.", tasks.contrastive(few.queries.images, None, SEED)),
        ("retrieval, Caltech-101", "The most similar other image.",
         tasks.caltech_retrieval(root, encoder, 20, max(2, n // 20), SEED)),
    ):  # fmt: skip
        bank = task.bank(encoder)
        model = peers.Similarity(encoder, bank)
        more = {"captum LayerGradCam of the similarity": peers.captum_grad_cam(model, layer)}
        found.append(compare(title, f"{note} MobileNetV2; no masks are to be had.", encoder, layer, task, more))
    return found


# ---------------------------------------------------------------------------------------------- open questions


def learned_similarity(support: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """A metric learnt from the support embeddings: cosine after centring and dividing by each feature's spread."""
    mean, spread = support.mean(0), support.std(0).clamp(min=1e-3)
    return lambda f, r: F.cosine_similarity((f - mean) / spread, (r - mean) / spread, dim=1)


@torch.no_grad()
def _embeddings(encoder: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return torch.cat([encoder(x.to(tasks.DEVICE)) for x in images.split(16)])


def questions(args: argparse.Namespace) -> list[Table]:
    """Other similarities, normalisations and weights, other poolings, and the layers of a ViT, on scenes."""
    few = tasks.scenes(args.images or 60, 5, SEED)
    bundled = headless(demo.load("classifier"), "fc").to(tasks.DEVICE)
    out = [similarities("scenes", bundled, bundled.layer4, few), poolings("scenes", bundled, bundled.layer4, few)]
    vit = headless(demo.load("vit"), "head").to(tasks.DEVICE)
    rows: dict[str, Explainer] = {}
    for block in (3, 2, 1, 0):
        module = vit.get_submodule(f"blocks.{block}")
        for weights in ("contribution", "gradient"):
            rows[f"blocks.{block}, {weights}"] = fam(vit, module, few.bank(vit), weights=weights)
    energy = peers.activations(vit, vit.get_submodule("blocks.3"))
    note = "Few-shot, the bundled ViT (patch tokens averaged); contributions as published, or the gradient alone."
    known, title = "blocks.3, gradient", "which layer of a vision transformer, scenes"
    out.append(measured(title, note, rows, few.queries, energy=energy, degrade=known))
    return out


def coco_questions(args: argparse.Namespace) -> list[Table]:
    """The same of MobileNetV2 on photographs."""
    encoder, name = imagenet_encoder(args.data), "COCO, MobileNetV2"
    task = tasks.coco_few_shot(tasks.coco(args.data / "images" / "coco"), args.images or 45, SEED)
    return [
        similarities(name, encoder, encoder.net.features, task),
        poolings(name, encoder, encoder.net.features, task),
    ]


def similarities(name: str, encoder: nn.Module, layer: Any, task: tasks.Task) -> Table:
    """FAM under other similarities, normalisations and weights."""
    bank = task.bank(encoder)
    learned = learned_similarity(_embeddings(encoder, task.support))
    rows: dict[str, Explainer] = {}
    for label, similarity in (("cosine", "cosine"), ("dot", "dot"), ("euclidean", "euclidean"),
                              ("learned (whitened cosine)", learned)):  # fmt: skip
        rows[label] = fam(encoder, layer, bank, similarity=similarity)
    for normalize in ("l1", "none"):
        rows[f"cosine, normalize {normalize}"] = fam(encoder, layer, bank, normalize=normalize)
    for label, similarity in (("cosine", "cosine"), ("euclidean", "euclidean"), ("learned", learned)):
        rows[f"{label}, weights gradient"] = fam(encoder, layer, bank, similarity=similarity, weights="gradient")
    note = "Few-shot; the paper's setting is the first row (cosine, contributions scaled to [0, 1])."
    energy, known = peers.activations(encoder, layer), "cosine, weights gradient"
    return measured(f"which similarity, {name}", note, rows, task.queries, energy=energy, degrade=known)


class Pooled(nn.Module):
    """A trunk's maps under another pooling."""

    def __init__(self, trunk: Callable[[Tensor], Tensor], pool: Callable[[Tensor], Tensor], owner: nn.Module) -> None:
        super().__init__()
        self.owner, self._trunk, self._pool = owner, trunk, pool

    def forward(self, images: Tensor) -> Tensor:
        return self._pool(self._trunk(images))


def attention_pool(maps: Tensor) -> Tensor:
    """Mean over positions, weighted by the softmax of their cosine to the plain mean (no learned parameter)."""
    positions = maps.flatten(2)
    mean = positions.mean(2, keepdim=True)
    weight = (10 * F.cosine_similarity(positions, mean, dim=1)).softmax(1)
    return (positions * weight[:, None]).sum(2)


POOLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "average (GAP)": lambda maps: maps.mean((2, 3)),
    "maximum (GMP)": lambda maps: maps.amax((2, 3)),
    "generalised mean (GeM, p = 3)": lambda maps: maps.clamp(min=1e-6).pow(3).mean((2, 3)).pow(1 / 3),
    "attention": attention_pool,
}


def poolings(name: str, encoder: nn.Module, layer: Any, task: tasks.Task) -> Table:
    """The same trunk under other poolings, prototypes made anew under each."""
    if hasattr(encoder, "net"):
        trunk = lambda x: encoder.net.features(x * encoder.scale + encoder.shift)  # noqa: E731
    else:
        trunk = encoder.forward_features
    rows: dict[str, Explainer] = {}
    for label, pool in POOLINGS.items():
        model = Pooled(trunk, pool, encoder).eval()
        rows[label] = fam(model, layer, task.bank(model))
    note = "Few-shot, cosine, contributions; the trunk was trained with average pooling."
    rows["average, weights gradient"] = fam(encoder, layer, task.bank(encoder), weights="gradient")
    energy = peers.activations(encoder, layer)
    known = "average, weights gradient"
    return measured(f"which pooling, {name}", note, rows, task.queries, energy=energy, degrade=known)


def with_head(args: argparse.Namespace) -> list[Table]:
    """Against Grad-CAM where a classifier head exists: FAM's references are then the rows of the head."""
    model = demo.load("classifier").to(tasks.DEVICE)
    task = tasks.scenes(args.images or 60, 5, SEED)
    return [head_table("scenes", model, model.layer4, model.fc.weight, task.queries, headless_of(model, "fc"))]


def coco_with_head(args: argparse.Namespace) -> list[Table]:
    """The same of MobileNetV2 on photographs: things that are ImageNet classes."""
    found = coco_classes(args.data, args.images or 30)
    full, trunk = real_models(args.data).mobilenet_v2().to(tasks.DEVICE), imagenet_encoder(args.data)
    weight = full.net.classifier[1].weight
    trunk.net.features = full.net.features
    return [head_table("COCO, MobileNetV2", full, full.net.features, weight, found, trunk)]


def headless_of(model: nn.Module, head: str) -> nn.Module:
    """Another module object around the same layers, without the head."""
    import copy

    other = copy.copy(model)
    other._modules = dict(model._modules)
    other._modules[head] = nn.Identity()
    return other


def head_table(
    name: str, model: nn.Module, layer: nn.Module, weight: Tensor, regions: Regions, trunk: nn.Module
) -> Table:
    """FAM with the head's rows as references (dot product: the logit), beside class activation methods."""
    bank = weight.detach()
    scores = lambda c: c @ bank.cpu().T  # noqa: E731
    explainers: dict[str, Explainer] = {
        "FAM, dot, contribution": fam(trunk, layer, bank, similarity="dot"),
        "FAM, dot, gradient (= CAM)": fam(trunk, layer, bank, similarity="dot", weights="gradient"),
        "FAM, cosine, contribution": fam(trunk, layer, bank),
        "captum LayerGradCam": peers.captum_grad_cam(model, layer),
        "captum LayerIntegratedGradients": peers.captum_integrated_gradients(model, layer),
        "pytorch-grad-cam GradCAM": peers.pytorch_grad_cam("GradCAM", model, layer),
        "pytorch-grad-cam GradCAM++": peers.pytorch_grad_cam("GradCAMPlusPlus", model, layer),
    }
    if weight.shape[1] < 200:  # one forward pass for every channel
        explainers["pytorch-grad-cam ScoreCAM"] = peers.pytorch_grad_cam("ScoreCAM", model, layer)
    explainers["pytorch-grad-cam deep_feature_factorization"] = peers.deep_feature_factorization(model, layer, scores)
    note = "The class is in the image; scores for the drop are softmax probabilities. References: rows of the head."
    score = lambda x: model(x).softmax(1)  # noqa: E731
    energy = peers.activations(model, layer)
    title = f"a classifier with a head, {name}"
    known = "FAM, dot, gradient (= CAM)"
    return measured(title, note, explainers, regions, score=score, energy=energy, degrade=known)


def coco_classes(data: Path, most: int) -> Regions:
    """COCO things that are ImageNet classes by name (through the LVIS vocabulary), and the likeliest such class."""
    from benchmarks.run.ce_fam.regions import ALIASES

    encoder = real_models(data).ConSE()
    lvis = json.loads((data / "clip_text" / "lvis_vocabulary.json").read_text())["imagenet_to_lvis"]
    things = tasks.coco(data / "images" / "coco")
    images, index, target, other, masks = [], [], [], [], []
    generator = torch.Generator().manual_seed(SEED)
    for item in things:
        taken = False
        for name, mask in zip(item.concepts, item.masks, strict=True):
            row = next((encoder._index[n] for n in (name, name.replace(" ", "_"), ALIASES.get(name, name))
                        if n in encoder._index), None)  # fmt: skip
            classes = [c for c, t in enumerate(lvis) if t == row and row is not None]
            if not classes or len(images) >= most:
                continue
            with torch.no_grad():
                logits = encoder.classifier(item.image[None])[0]
            index.append(len(images))
            target.append(max(classes, key=lambda c: float(logits[c])))
            other.append(int(torch.randint(1000, (1,), generator=generator)))
            masks.append(mask)
            taken = True
        if taken:
            images.append(item.image)
    rows = (torch.tensor(x) for x in (index, target, other))
    return Regions(torch.stack(images), *rows, torch.stack(masks))


def cost(args: argparse.Namespace) -> list[dict[str, Any]]:
    """FAM beside Captum's Grad-CAM and a bare forward pass, for other sizes of network and image."""
    import torchvision

    rows = []
    for name, layer, width in (("mobilenet_v2", "features", 1280), ("resnet50", "layer4", 2048)):
        for size in (112, 224, 448):
            torch.manual_seed(SEED)
            model = getattr(torchvision.models, name)().eval().to(args.device)
            encoder = getattr(torchvision.models, name)().eval().to(args.device)
            headless(encoder, "classifier" if name == "mobilenet_v2" else "fc")
            x = torch.rand(1, 3, size, size, device=args.device)
            bank = torch.rand(10, width, device=args.device)
            ours = FeatureActivationMap(encoder, layer, bank)
            theirs = peers.captum_grad_cam(model, model.get_submodule(layer))
            target = torch.zeros(1, dtype=torch.long, device=args.device)
            seconds = median_times(
                {
                    "forward": lambda m=encoder, x=x: _forward(m, x),
                    "FAM": lambda f=ours, x=x: f.attribute(x, target=0),
                    "captum LayerGradCam": lambda f=theirs, x=x, t=target: f(x, t),
                },
                repeats=args.repeats,
            )
            millions = sum(p.numel() for p in model.parameters()) / 1e6
            rows.append({"network": name, "pixels": size, "parameters_m": millions,
                         "forward_s": seconds["forward"], "FAM_x_forward": seconds["FAM"] / seconds["forward"],
                         "LayerGradCam_x_forward": seconds["captum LayerGradCam"] / seconds["forward"]})  # fmt: skip
            print(rows[-1], flush=True)
    return [
        {
            "title": "cost by size of network and image",
            "note": "Random weights, one image; in bare forward passes of the same network, median, in turn.",
            "rows": rows,
        }
    ]


def _forward(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        model(x)


PARTS: dict[str, Callable[[argparse.Namespace], list[Any]]] = {
    "scenes-few-shot": scenes_few_shot,
    "scenes-pairs": scenes_pairs,
    "coco-few-shot": coco_few_shot,
    "coco-pairs": coco_pairs,
    "caltech": caltech,
    "questions": questions,
    "coco-questions": coco_questions,
    "with-head": with_head,
    "coco-with-head": coco_with_head,
    "cost": cost,
}
NEEDS_DATA = ("coco-few-shot", "coco-pairs", "caltech", "coco-questions", "coco-with-head")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="each replaces its own record")
    parser.add_argument("--images", type=int, help="fewer or more images than each part's own number")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default=tasks.DEVICE, help="of the part cost")
    args = parser.parse_args()
    torch.set_grad_enabled(True)
    for part in args.parts:
        if part in NEEDS_DATA and args.data is None:
            print(f"{part}: skipped, it needs --data with photographs")
            continue
        start = time.perf_counter()
        made = PARTS[part](args)
        record(part, made, {"images": args.images, "seed": SEED, "data": args.data is not None}, start)


def record(part: str, made: list[Any], arguments: dict[str, Any], start: float) -> None:
    """Put a part's tables into the record, each part with its own environment, and leave the other parts alone."""
    path = RESULTS / "fam_quality.json"
    kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"parts": {}}
    kept["parts"][part] = {
        "environment": environment("torchvision", "timm", "grad-cam", device=tasks.DEVICE),
        "arguments": arguments,
        "seconds": time.perf_counter() - start,
        "tables": [t.record() if isinstance(t, Table) else t for t in made],
    }
    order = [*PARTS, *(name for name in kept["parts"] if name not in PARTS)]
    kept["parts"] = {name: kept["parts"][name] for name in order if name in kept["parts"]}
    write("fam_quality", kept)
    for one in kept["parts"][part]["tables"]:
        if "method" not in one["rows"][0]:
            continue
        columns = [c for c in COLUMNS if any(row.get(c) for row in one["rows"])]
        lines = [[row["method"], *("" if not row.get(c) else row[c][0] for c in columns)] for row in one["rows"]]
        print(f"\n{one['title']}\n{table(['method', *columns], lines)}")


if __name__ == "__main__":
    main()
