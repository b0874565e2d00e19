"""The model card of a SALFCBM: what it was made from, what was dropped and why, how good it is."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

_MOST = 200  # lines of one list; the rest is in config.json
_CODE = """```python
from captum_concepts import SALFCBM

model = SALFCBM.from_pretrained("{name}", backbone=backbone)  # the {backbone} it was made with
logits = model(images)
print(model.explain(images))
print(model.decision_rules(0))
```"""
_ABOUT = (
    "An image classifier whose only way to its decision leads through maps of named concepts (SALF-CBM): it says which "
    "concepts it saw, where, and how much each moved the decision. The concepts were learnt from an image-text model, "
    "not from labels. Method: Benou and Riklin Raviv, *Show and Tell: Visually Explainable Deep Neural Nets via "
    "Spatially-Aware Concept Bottleneck Models*, arXiv:2502.20134; made with `captum_concepts`."
)
_LIMITS = (
    "A concept's name is what the image-text model was asked for; what its map responds to should be checked "
    "(`most_activating`, `explain_region`). Contributions are exact for the logit, given the concepts. Biases of the "
    "data, the backbone and the image-text model remain."
)
#: What `fit_salf_cbm` records, in the order of the card; other entries follow.
_FIRST = ("accuracy", "data", "encoder", "prompt", "bottleneck", "head", "settings")
_OWN = ("vocabulary", "drops", "history", "validation_similarity")  # shown otherwise, or too long


def card_text(config: Mapping[str, Any], name: str, yaml: str) -> str:
    """Markdown with a YAML head, from what ``config.json`` holds."""
    metadata: Mapping[str, Any] = config["metadata"]
    backbone = config["backbone"]
    parts = [
        f"---\n{yaml}\n---",
        f"# {_text(name)}",
        _ABOUT,
        "## Use",
        _CODE.format(name=name, backbone=backbone["class"]),
    ]
    parts.append("## Model")
    stored = "stored with the model" if backbone["stored"] else "not stored; it must be given, and is checked"
    facts = {
        "backbone": f"{backbone['class']} (fingerprint {backbone['fingerprint']}), its weights {stored}",
        "layer": f"{config['layer'] or 'the output'}, {config['feature_dim']} channels"
        + (" (patch and CLS tokens)" if config["cls_token"] else ""),
        "grid": " x ".join(map(str, config["grid"])),
        "concepts": len(config["concepts"]),
        "classes": config["num_classes"],
        "weights of the head that are not zero": config["nonzeros"],
    }
    parts.append(_listed(facts))
    for key in [*(k for k in _FIRST if k in metadata), *(k for k in metadata if k not in (*_FIRST, *_OWN))]:
        parts += [f"## {_text(key.replace('_', ' ').capitalize())}", _listed(metadata[key])]
    for key in ("accuracy", "data"):
        if key not in metadata:
            parts += [f"## {key.capitalize()}", f"Not stated (`model.metadata[{key!r}]`)."]
    similarity = metadata.get("validation_similarity")
    parts += ["## Concepts", _concepts(config["concepts"], similarity if isinstance(similarity, Mapping) else {})]
    parts += ["## Dropped concepts", _drops(metadata)]
    parts += ["## Limits", _LIMITS]
    return "\n\n".join(parts) + "\n"


def _concepts(concepts: Sequence[str], similarity: Mapping[str, Any]) -> str:
    lines = [f"- {_text(c)}" + (f" ({_text(similarity[c])})" if c in similarity else "") for c in concepts[:_MOST]]
    if similarity:
        lines.insert(0, "In brackets: similarity to the image-text model's maps on validation images.\n")
    return _shortened(lines, len(concepts))


def _drops(metadata: Mapping[str, Any]) -> str:
    vocabulary = metadata.get("vocabulary")
    report = vocabulary.get("report", vocabulary) if isinstance(vocabulary, Mapping) else {}
    drops = metadata.get("drops", report.get("drops") if isinstance(report, Mapping) else None)
    if drops is None:
        return "Not stated (`model.metadata['drops']`)."
    if isinstance(drops, Mapping):
        drops = [{"concept": concept, "reason": reason} for concept, reason in drops.items()]
    if not drops:
        return "None."
    rows = ["| concept | reason | value | limit | like |", "|---|---|---|---|---|"]
    for drop in drops[:_MOST]:
        if not isinstance(drop, Mapping):
            drop = {"concept": drop}
        rows.append(
            "| " + " | ".join(_text(drop.get(k)) for k in ("concept", "reason", "value", "limit", "other")) + " |"
        )
    return _shortened(rows, len(drops))


def _shortened(lines: list[str], total: int) -> str:
    return "\n".join(lines) + (f"\n\n{total - _MOST} more in `config.json`." if total > _MOST else "")


def _listed(value: Any, depth: int = 0) -> str:
    if isinstance(value, Mapping):
        lines = []
        for key, item in value.items():
            nested = isinstance(item, Mapping) and item and depth < 3
            end = "\n" + _listed(item, depth + 1) if nested else f" {'none' if item is None else _text(item)}"
            lines.append(f"{'  ' * depth}- {_text(key)}:{end}")
        return "\n".join(lines)
    return f"{'  ' * depth}{_text(value)}"


def _text(value: Any) -> str:
    """One line that Markdown shows as it is."""
    if value is None:
        return ""
    if isinstance(value, float):
        value = f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(item) for item in value[:20]) + (", ..." if len(value) > 20 else "")
    escaped = html.escape(" ".join(str(value).split()), quote=False)
    for mark in ("\\", "|", "`", "[", "]", "*", "_"):
        escaped = escaped.replace(mark, "\\" + mark)
    return escaped
