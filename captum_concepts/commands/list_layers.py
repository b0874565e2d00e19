"""`models`: layers of a model with a grid of positions, and the methods they suit."""

from __future__ import annotations

import fnmatch
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_concepts.activations import gradients_enabled, spatial_activations
from captum_concepts.activations.layers import any_reading
from captum_concepts.activations.survey import SurveyedLayer, suggest_layer, suggest_stages, survey_layers
from captum_concepts.commands.models import load_model
from captum_concepts.errors import InputError, InputWarning, LayerError


@dataclass(frozen=True)
class ModelsSettings:
    """Options of ``models``, which lists the layers of one model, or with ``find`` the names of models."""

    model: str | None = None
    find: str | None = None
    weights: str | None = None
    size: int | None = None
    num_classes: int | None = None
    all: bool = False


def find_models(pattern: str) -> dict[str, Any]:
    """Names for ``--model`` that match a shell pattern, by library.

    >>> find_models("resnet1?")["torchvision"]
    ['resnet18']
    """
    import timm
    import torchvision

    wanted = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    names = {
        "bundled": ["demo:classifier", "demo:vit"],
        "torchvision": torchvision.models.list_models(module=torchvision.models),
        "timm": timm.list_models(),
    }
    found = {source: fnmatch.filter(known, wanted) for source, known in names.items()}
    if not any(found.values()):
        raise InputError(f"no model matches {pattern!r}; try a part of the name, such as 'resnet'")
    return found


def list_layers(settings: ModelsSettings) -> dict[str, Any]:
    """Layers with their grid, channels, and the methods they suit.

    A layer *suits* a method if its positions affect the output (for FAM and contributions) and the method can use its
    grid. ``advice`` contains the recommended layer of each method; for SpatialACV, it is the last stage whose gradient
    differs between images. Without ``weights``, the network has random weights, which do not change layers, grids and
    channels.

    Returns:
        ``{"model", "input", "outputs", "layers": [{"name", "kind", "channels", "grid", "layout", "reaches_output",
        "suits"}], "advice": {method: layer or layers}}``.

    Raises:
        InputError: an unknown model.
    """
    if settings.model is None:
        raise InputError("pass a model name, or --find PATTERN to search for one")
    loaded = load_model(
        settings.model,
        weights=settings.weights,
        size=settings.size,
        num_classes=settings.num_classes,
        random_weights=True,
    )
    model = loaded.model
    noise = torch.rand(loaded.empty().shape, generator=torch.Generator().manual_seed(0))
    probe = loaded.prepare(noise)
    with torch.no_grad():
        output = model(probe)
    surveyed = survey_layers(model, probe)
    last, stages = suggest_layer(model, probe), suggest_stages(model, probe)
    try:
        sensitive = suggest_layer(model, probe, for_gradients=True)
    except LayerError:
        sensitive = last
    chosen = (last, sensitive, *stages)
    if not settings.all:
        surveyed = [layer for layer in surveyed if layer.name in _blocks(model) or layer.name in chosen]
    reaches = _reaching(model, probe, [layer.name for layer in surveyed])
    rows = [_row(layer, reaches[layer.name], last, sensitive, stages) for layer in surveyed]
    return {
        "model": settings.model,
        "input": [loaded.size, loaded.size],
        "outputs": list(output.shape[1:]) if isinstance(output, Tensor) else type(output).__name__,
        "layers": rows,
        "advice": {"FAM": last, "SpatialACV": sensitive, "CE-FAM": stages, "SALF-CBM": last},
    }


def _row(layer: SurveyedLayer, reaches: bool, last: str, sensitive: str, stages: list[str]) -> dict[str, Any]:
    suits = []
    if reaches:
        suits.append("FAM*" if layer.name == last else "FAM")
        suits.append("SpatialACV*" if layer.name == sensitive else "SpatialACV")
    else:
        suits.append("SpatialACV (relevance only)")
    suits.append("CE-FAM*" if layer.name in stages else "CE-FAM")
    if min(layer.layout.grid) >= 4:
        suits.append("SALF-CBM*" if layer.name == last else "SALF-CBM")
    return {
        "name": layer.name,
        "kind": layer.kind,
        "channels": layer.channels,
        "grid": list(layer.layout.grid),
        "layout": layer.layout.kind,
        "prefix_tokens": layer.layout.prefix_tokens,
        "reaches_output": reaches,
        "suits": suits,
    }


def _blocks(model: nn.Module) -> set[str]:
    """Children of the model and of its plain sequences, and those sequences; nothing inside a block."""
    plain = (nn.Sequential, nn.ModuleList)
    modules = dict(model.named_modules())
    found: set[str] = set()
    for name, module in modules.items():  # parents come first
        above = [name[:i] for i, letter in enumerate(name) if letter == "."]
        inside = any(one in found and type(modules[one]) not in plain for one in above)
        parent = modules[above[-1]] if above else model
        if name and not inside and (parent is model or type(parent) in plain or type(module) in plain):
            found.add(name)
    return found


def _reaching(model: Any, probe: Tensor, names: list[str]) -> dict[str, bool]:
    """Whether the positions of each layer affect the output, from one backward pass for all or, if needed, one each."""
    with gradients_enabled(), warnings.catch_warnings():
        warnings.simplefilter("ignore", InputWarning)
        try:
            seen = spatial_activations(model, probe, names, gradient=True)
            found = torch.autograd.grad(any_reading(seen.returned), seen.raw, allow_unused=True)
        except (LayerError, RuntimeError):
            if len(names) == 1:
                return {names[0]: False}
            return {name: reached for one in names for name, reached in _reaching(model, probe, [one]).items()}
        maps = [None if g is None else layout.maps(g) for layout, g in zip(seen.layouts, found, strict=True)]
        return {name: m is not None and bool(m.any()) for name, m in zip(names, maps, strict=True)}


def table(found: dict[str, Any]) -> str:
    """Human-readable table of the layers."""
    head = ["layer", "module", "channels", "grid", "layout", "suits (* recommended)"]
    cells = [head]
    for row in found["layers"]:
        layout = row["layout"] + (f", {row['prefix_tokens']} prefix" if row["prefix_tokens"] else "")
        grid = " x ".join(map(str, row["grid"]))
        cells.append([row["name"], row["kind"], str(row["channels"]), grid, layout, ", ".join(row["suits"])])
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    lines = ["  ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)).rstrip() for line in cells]
    lines.insert(1, "-" * max(map(len, lines)))
    advice = found["advice"]
    top = f"{found['model']}: input {found['input'][0]} x {found['input'][1]}, outputs {found['outputs']}"
    return "\n".join(
        [top, "", *lines, "", f"--layer {advice['FAM']} for FAM and SALF-CBM; --layer {advice['SpatialACV']} for "
         f"SpatialACV; --layers {','.join(advice['CE-FAM'])} for CE-FAM"]
    )  # fmt: skip
