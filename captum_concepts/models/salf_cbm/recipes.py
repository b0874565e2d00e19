"""Recipes that rebuild backbones of model libraries by name; they are detected on saving and used on loading."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from captum_concepts._artifacts import check_json, integer, list_of, nothing_or, table, text
from captum_concepts.activations import evaluation_mode, read_layer
from captum_concepts.errors import ArtifactError
from captum_concepts.models.salf_cbm.reading import input_channels
from captum_concepts.vlm import build_tower, tower_names

_SIDE = integer(1, 2**16)
_RECIPE = table(
    {"library": text("torchvision", "timm", "open_clip"), "name": text(longest=200, pattern=r"[\w.:/@+-]+")},
    {
        "num_classes": integer(0, 2**31),
        "in_chans": integer(1, 4096),
        "img_size": nothing_or(list_of(_SIDE, length=2)),
        "identity": list_of(text(longest=200), most=100),
    },
)


def recipe_of(backbone: nn.Module, layer: str, image_size: tuple[int, int] | None) -> dict[str, Any] | None:
    """The recipe to rebuild ``backbone``; None if no library's model computes the same.

    A candidate counts only if, with the backbone's weights, ``layer`` has the same output on a random image.

    Args:
        backbone: without wrappers.
        layer: the layer that provides the features.
        image_size: of an image that the backbone takes. With None nothing can be compared, so there is no recipe.
    """
    if image_size is None:
        return None
    for recipe in _candidates(backbone):
        if _computes_the_same(recipe, backbone, layer, image_size):
            return recipe
    return None


def build_backbone(recipe: Any, folder: Path, stored: Mapping[str, tuple[int, ...]]) -> nn.Module:
    """The network of a recipe, with random weights; nothing is downloaded.

    Args:
        recipe: the result of :func:`recipe_of`.
        folder: of the model, for messages.
        stored: names and shapes of the stored tensors, which must match those of the network.

    Raises:
        ArtifactError: the recipe is damaged, the installed library cannot build it, or the result does not match.
    """
    checked = check_json(recipe, _RECIPE, f"the recipe of the backbone in {folder}")
    try:
        if checked["library"] != "open_clip":  # not on "meta", because it moves the model; each name has one size
            with torch.device("meta"):  # nothing is allocated before the sizes in the file match the tensors
                shapes = {name: tuple(value.shape) for name, value in _built(checked).state_dict().items()}
            if shapes != dict(stored):
                raise ArtifactError("the stored weights do not match this network")
        return _built(checked).eval()
    except Exception as error:  # libraries may raise anything for unknown names and sizes
        raise ArtifactError(
            f"the backbone of the model in {folder}, {checked['library']}'s {checked['name']!r}, cannot be built here "
            f"({type(error).__name__}: {str(error)[:200]}); pass backbone="
        ) from error


def _built(recipe: Mapping[str, Any]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        model = _BUILDERS[recipe["library"]](recipe)
    for name in recipe.get("identity", ()):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, nn.Identity())
    return model


def _torchvision(recipe: Mapping[str, Any]) -> nn.Module:
    import torchvision

    classes = {"num_classes": recipe["num_classes"]} if "num_classes" in recipe else {}
    options = {"weights_backbone": None} if "." in recipe["name"] else {}
    return torchvision.models.get_model(recipe["name"], weights=None, **classes, **options)


def _timm(recipe: Mapping[str, Any]) -> nn.Module:
    import timm

    options = {key: recipe[key] for key in ("num_classes", "in_chans") if key in recipe}
    if recipe.get("img_size"):
        options["img_size"] = tuple(recipe["img_size"])
    return timm.create_model(recipe["name"], pretrained=False, **options)


def _open_clip(recipe: Mapping[str, Any]) -> nn.Module:
    return build_tower(recipe["name"])


_BUILDERS: dict[str, Callable[[Mapping[str, Any]], nn.Module]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "open_clip": _open_clip,
}


def _candidates(backbone: nn.Module) -> Iterator[dict[str, Any]]:
    module = type(backbone).__module__
    if module.startswith("torchvision.models"):
        import torchvision

        identity = [name for name, part in backbone.named_modules() if isinstance(part, nn.Identity) and name]
        layers = [m for m in backbone.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        last = layers[-1] if layers else None
        classes = [] if last is None else [last.out_features if isinstance(last, nn.Linear) else last.out_channels]
        for name in torchvision.models.list_models():
            if torchvision.models.get_model_builder(name).__module__ == module:
                for count in dict.fromkeys([1000, *classes]):
                    yield {"library": "torchvision", "name": name, "num_classes": count, "identity": identity}
    elif module.startswith("timm."):
        config = getattr(backbone, "pretrained_cfg", None) or getattr(backbone, "default_cfg", None) or {}
        name = config.get("architecture")
        if name:
            recipe: dict[str, Any] = {"library": "timm", "name": name, "in_chans": input_channels(backbone)}
            classes_of = getattr(backbone, "num_classes", None)
            if isinstance(classes_of, int):
                recipe["num_classes"] = classes_of
            yield recipe
            size = getattr(getattr(backbone, "patch_embed", None), "img_size", None)
            if size is not None:
                yield {**recipe, "img_size": [int(side) for side in size]}
    elif "open_clip" in sys.modules and module.startswith(("open_clip.", "timm.")):
        for name in tower_names(backbone):
            yield {"library": "open_clip", "name": name}


@torch.no_grad()
def _computes_the_same(recipe: Mapping[str, Any], backbone: nn.Module, layer: str, image_size: tuple[int, int]) -> bool:
    state = {name: value for name, value in backbone.state_dict().items() if isinstance(value, Tensor)}
    try:
        shapes = {name: value.shape for name, value in state.items()}
        if recipe["library"] != "open_clip":  # not on "meta", because it moves the model; candidates are few
            with torch.device("meta"):
                if {name: value.shape for name, value in _built(recipe).state_dict().items()} != shapes:
                    return False
        twin = _built(recipe)
        like = next((p for p in backbone.parameters() if p.is_floating_point()), torch.empty(0))
        twin.to(device=like.device, dtype=like.dtype).load_state_dict(state)
        generator = torch.Generator().manual_seed(0)
        image = torch.rand(1, input_channels(backbone), *image_size, generator=generator).to(like)
        with evaluation_mode(backbone), evaluation_mode(twin):
            expected, found = (read_layer(one, layer, image) for one in (backbone, twin))
        return found.shape == expected.shape and torch.equal(found, expected)
    except Exception:  # the builder refuses, or the network lacks this layer
        return False
