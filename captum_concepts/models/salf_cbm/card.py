"""The fields of ``card.md``, the model card of a SALFCBM."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from captum_concepts.models.salf_cbm.salf_cbm import SALFCBM

_MOST = 200  # maximum lines per list; the rest is in config.json
_RULES, _CLASSES = 6, 30
_LIMITS = (
    "A concept's name is the text passed to the vision-language model; check what its map responds to "
    "(`most_activating`, `explain_region`). Contributions are exact for the logit, given the concepts. A rule may "
    "use a concept for more than its name says. Maps are only as local as the layer they are read from. Biases of "
    "the data, the backbone and the vision-language model remain."
)
#: Entries that `fit_salf_cbm` records, in the order of the card; others follow.
_FIRST = ("accuracy", "data", "encoder", "prompt", "bottleneck", "head", "settings")
_OWN = ("vocabulary", "drops", "history", "validation_similarity", "reliability")  # shown elsewhere, or too long


def card_fields(model: SALFCBM, config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The fields of ``card.md``; all text is escaped."""
    metadata: Mapping[str, Any] = config["metadata"]
    backbone = config["backbone"]
    stored = "stored with the model" if backbone["stored"] else "not stored; pass them (they are checked)"
    facts = {
        "backbone": f"{backbone['class']} (fingerprint {backbone['fingerprint']}), its weights {stored}",
        "layer": f"{config['layer'] or 'the output'}, {config['feature_dim']} channels"
        + (" (patch and CLS tokens)" if config["cls_token"] else ""),
        "grid": " x ".join(map(str, config["grid"])),
        "concepts": len(config["concepts"]),
        "classes": f"{config['num_classes']}{' (independent)' if config['multi_label'] else ''}",
        "nonzero weights of the head": config["nonzeros"],
        **({} if model.preprocessing is None else {"preprocessing": str(model.preprocessing)}),
    }
    sections = [
        (_text(key.replace("_", " ").capitalize()), _listed(metadata[key]))
        for key in [*(k for k in _FIRST if k in metadata), *(k for k in metadata if k not in (*_FIRST, *_OWN))]
    ]
    sections += [
        (key.capitalize(), f"Not stated (`model.metadata[{key!r}]`).")
        for key in ("accuracy", "data")
        if key not in metadata
    ]
    alone = backbone["stored"] and "recipe" in backbone
    given = ")" if alone else f", backbone=backbone)  # the {_text(backbone['class'])} it was trained with"
    return {
        "name": _text(name),
        "repository": name,
        "backbone_argument": given,
        "trust": _text(model.trust),
        "model_facts": _listed(facts),
        "sections": sections,
        "rules": _rules(model),
        "concepts": _concepts(model, metadata),
        "drops": _drops(metadata),
        "limits": _LIMITS,
    }


def _rules(model: SALFCBM) -> str:
    if not isinstance(model.head, nn.Linear):
        return "The head is not linear."
    lines = []
    for target in range(min(model.num_classes, _CLASSES)):
        rules = model.decision_rules(target, _RULES)
        name = f"class {target}" if model.class_names is None else model.class_names[target]
        said = ", ".join(f"{_text(concept)} {weight:+.2f}" for concept, weight in rules) or "no concept"
        lines.append(f"- {_text(name)}: {said}")
    more = model.num_classes - len(lines)
    return "\n".join(lines) + (f"\n\n{more} more classes: `model.decision_rules(target)`." if more > 0 else "")


def _concepts(model: SALFCBM, metadata: Mapping[str, Any]) -> str:
    similarity = metadata.get("validation_similarity")
    similarity = similarity if isinstance(similarity, Mapping) else {}
    agreement = {name: one.agreement for name, one in model.reliability_.items()}
    lines = []
    for concept in model.concepts[:_MOST]:
        known = [_text(values[concept]) for values in (similarity, agreement) if concept in values]
        lines.append(f"- {_text(concept)}" + (f" ({', '.join(known)})" if known else ""))
    what = [
        *(["similarity to the vision-language model's maps on validation images"] if similarity else []),
        *(["AUROC of agreement"] if agreement else []),
    ]
    if what:
        lines.insert(0, f"In parentheses: {', '.join(what)}.\n")
    return _shortened(lines, len(model.concepts))


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
        fields = drop if isinstance(drop, Mapping) else {"concept": drop}
        cells = (_text(fields.get(k)) for k in ("concept", "reason", "value", "limit", "other"))
        rows.append("| " + " | ".join(cells) + " |")
    return _shortened(rows, len(drops))


def _shortened(lines: Sequence[str], total: int) -> str:
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
    """``value`` as one line, escaped for Markdown."""
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
