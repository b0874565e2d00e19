"""Networks of the model zoos, as they are, with random weights: what each method says to each.

``python tests/activations/architectures.py`` writes ``docs/architectures.md``; ``test_architectures.py`` runs the same
again. A network is one line.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from captum_concepts import SALFCBM, ConceptFusionMap, ConceptTranslator, FeatureActivationMap, SpatialACV
from captum_concepts.activations import Layers
from captum_concepts.activations.survey import suggest_layer, suggest_stages, survey_layers
from captum_concepts.errors import CaptumConceptsError

#: A warning that is true of most networks' last stage.
LINEAR = "only linear operations follow"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"

#: ``library name`` -> height and width of the images (square only where it takes nothing else), constructor's options.
NETWORKS: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {
    "torchvision alexnet": ((96, 128), {}),
    "torchvision vgg11_bn": ((64, 96), {}),
    "torchvision squeezenet1_1": ((96, 128), {}),
    "torchvision googlenet": ((96, 128), {"init_weights": False, "aux_logits": False}),
    "torchvision resnet18": ((96, 128), {}),
    "torchvision resnet50": ((96, 128), {}),
    "torchvision densenet121": ((96, 128), {}),
    "torchvision shufflenet_v2_x0_5": ((96, 128), {}),
    "torchvision mnasnet0_5": ((96, 128), {}),
    "torchvision mobilenet_v2": ((96, 128), {}),
    "torchvision mobilenet_v3_small": ((96, 128), {}),
    "torchvision efficientnet_b0": ((96, 128), {}),
    "torchvision regnet_y_400mf": ((96, 128), {}),
    "torchvision convnext_tiny": ((96, 128), {}),
    "torchvision swin_t": ((96, 128), {}),
    "torchvision swin_v2_t": ((96, 128), {}),
    "torchvision vit_b_16": ((64, 64), {"image_size": 64}),
    "timm vit_tiny_patch16_224": ((64, 96), {"img_size": (64, 96)}),
    "timm deit_tiny_distilled_patch16_224": ((64, 96), {"img_size": (64, 96)}),
    "timm vit_small_patch14_reg4_dinov2": ((56, 84), {"img_size": (56, 84), "num_classes": 10}),
    "timm vit_small_patch14_dinov2": ((56, 84), {"img_size": (56, 84), "num_classes": 10}),
    "timm eva02_tiny_patch14_224": ((56, 84), {"img_size": (56, 84)}),
    "timm cait_xxs24_224": ((64, 96), {"img_size": (64, 96)}),
    "timm xcit_nano_12_p16_224": ((64, 96), {}),
    "timm mixer_s16_224": ((64, 96), {"img_size": (64, 96)}),
    "timm swin_tiny_patch4_window7_224": ((64, 96), {"img_size": (64, 96), "window_size": 2}),
    "timm pvt_v2_b0": ((64, 96), {}),
    "timm coat_lite_tiny": ((64, 96), {"img_size": (64, 96)}),
    "timm levit_128s": ((224, 224), {}),
    "timm mobilevit_xxs": ((64, 96), {}),
    "timm poolformer_s12": ((64, 96), {}),
    "timm convnextv2_atto": ((64, 96), {}),
    "timm efficientformer_l1": ((224, 224), {}),
    "timm fastvit_t8": ((64, 96), {}),
    "timm resnetv2_50": ((64, 96), {}),
    "timm repvgg_a0": ((64, 96), {}),
    "timm ghostnet_100": ((64, 96), {}),
    "timm edgenext_xx_small": ((64, 96), {}),
    "open_clip RN50": ((64, 64), {"image_size": 64}),
    "open_clip ViT-B-32": ((96, 128), {"image_size": (96, 128)}),
    "open_clip convnext_base": ((64, 96), {"image_size": (64, 96)}),
}


def build(name: str) -> nn.Module:
    """The network with random weights; the image tower where it is a CLIP."""
    library, kind = name.split()
    options = NETWORKS[name][1]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if library == "torchvision":
            import torchvision

            return awake(getattr(torchvision.models, kind)(weights=None, **options))
        if library == "timm":
            import timm

            return awake(timm.create_model(kind, pretrained=False, **options))
        import open_clip

        config = open_clip.get_model_config(kind)["vision_cfg"] | options
        config = {key: value for key, value in config.items() if key not in ("timm_model_pretrained", "heads")}
        from open_clip.model import _build_vision_tower

        vision = _build_vision_tower(open_clip.get_model_config(kind)["embed_dim"], config)
        return awake(vision)


def awake(net: nn.Module) -> nn.Module:
    """Some heads begin at zero, and nothing would reach the output before training."""
    for module in net.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.02)
    return net.eval()


def fam(net: nn.Module, layer: str, images: Tensor, width: int) -> Tensor:
    return FeatureActivationMap(net, layer, torch.randn(3, width)).attribute(images, target=1)


def sacv(net: nn.Module, layer: str, images: Tensor, width: int) -> Tensor:
    fitted = SpatialACV(net, layer).fit({"bright": images + 1}, images)
    return fitted.attribute(images, target=1)


def ce_fam(net: nn.Module, layer: str, images: Tensor, width: int) -> Tensor:
    layers = suggest_stages(net, images[:1])
    channels = {found.name: found.channels for found in survey_layers(net, images[:1])}
    translator = ConceptTranslator([channels[name] for name in layers], 16, hidden=(32, 32))
    explainer = ConceptFusionMap(net, layers, translator, ["a", "b", "c"], torch.randn(3, 16), map_layer="fused")
    found = explainer.explain(images, target=0)
    assert found.contributions is not None
    assert found.contributions.isfinite().all()
    return explainer.attribute(images, target=1)


def salf(net: nn.Module, layer: str, images: Tensor, width: int) -> Tensor:
    model = SALFCBM(net, layer, ["a", "b", "c"], 2, grid=(3, 3), input_size=(images.shape[-2], images.shape[-1]))
    assert model(images).isfinite().all()
    return model.concept_maps(images)


METHODS: dict[str, Callable[[nn.Module, str, Tensor, int], Tensor]] = {
    "FAM": fam,
    "SpatialACV": sacv,
    "CE-FAM": ce_fam,
    "SALF-CBM": salf,
}


def outcome(name: str) -> list[str]:
    """One row of the table: network, layer chosen by the package, its grid, and what each method says."""
    net, size = build(name), NETWORKS[name][0]
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        width = net(images).shape[1]
    layer = suggest_layer(net, images[:1])
    grid = next(found.layout.grid for found in survey_layers(net, images[:1]) if found.name == layer)
    cells = []
    for method in METHODS.values():
        torch.manual_seed(1)
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("error")
                warnings.filterwarnings("always", message=LINEAR)
                maps = method(net, layer, images, width)
            good = maps.isfinite().all() and maps.abs().sum() > 0 and maps.shape[-2:].numel() > 1
            works = "works; linear above" if said else "works"
            cells.append(works if good else f"empty map {tuple(maps.shape)}")
        except (CaptumConceptsError, UserWarning) as error:
            cells.append(str(error).split(";")[0].split("\n")[0])
        if any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in net.modules()):
            cells[-1] += " (hooks left)"
    return [name.replace(" ", " `") + "`", f"`{layer}`", f"{grid[0]} x {grid[1]}", *cells]


def misplaced(name: str) -> int:
    """How many cells a bright patch in a corner of the image appears from that corner, in the first stage, at most."""
    net, (height, width) = build(name), NETWORKS[name][0]
    image = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(1))
    layers = Layers.resolve(net, suggest_stages(net, image)[0])
    before = layers.run(image)
    h, w = before.layouts[0].grid
    distance = 0
    for i, j in ((0, 0), (0, w - 1), (h - 1, 0), (h - 1, w - 1)):
        bright = image.clone()
        bright[:, :, i * height // h : (i + 1) * height // h, j * width // w : (j + 1) * width // w] += 2
        change = (layers.run(bright).maps[0] - before.maps[0])[0].norm(dim=0)
        row, column = divmod(int(change.argmax()), w)
        distance = max(distance, abs(row - i), abs(column - j))
    return distance


def line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def page() -> str:
    """The whole page."""
    head = ["network", "layer that is chosen", "grid", *METHODS]
    rows = []
    for name in NETWORKS:
        rows.append(line(outcome(name)))
        print(rows[-1], flush=True)
    text = (
        "# Architectures\n\nEvery method on networks of the model zoos as they are, with random weights and no hint: "
        "the layer is the one that `suggest_layer` finds (`suggest_stages` for CE-FAM). Images are "
        "small here (56 x 84 to 96 x 128 pixels, 224 where the network takes nothing else), so grids are small. "
        "*Linear above*: only linear operations follow that layer, and SpatialACV warns that contributions are the "
        "same for every image; `python -m captum_concepts models` stars an earlier layer for it.\n\n"
        "This page is written by `python tests/activations/architectures.py`; "
        "`tests/activations/test_architectures.py` runs it again and compares.\n\n"
    )
    return text + "\n".join([line(head), "|" + "---|" * len(head), *rows]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
