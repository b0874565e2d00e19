"""`fit-salf`: fits a SALFCBM from a configuration file, with a report, or the plan of a dry run."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captum_concepts._artifacts import open_safetensors, write_atomically
from captum_concepts.commands.fit_salf_config import fit_arguments, read_config
from captum_concepts.commands.outputs import check_outputs
from captum_concepts.commands.processes import is_first, processes
from captum_concepts.errors import ArtifactError, InputError, printable
from captum_concepts.images import read_json
from captum_concepts.models.salf_cbm.fit import fit_salf_cbm, plan_salf_cbm

#: Files in the output folder.
_FILES = ("config.json", "model.safetensors", "README.md", "report.json", "report.md")


@dataclass(frozen=True)
class FitSettings:
    """Options of ``fit-salf``.

    Args:
        config: a JSON file; see ``fit-salf --help``.
        dry_run: only plan, without writing files.
    """

    config: str
    dry_run: bool = False


def fit_salf(settings: FitSettings) -> dict[str, Any]:
    """Fit a model and write it and its report to the output folder, or only plan with ``dry_run``.

    Returns:
        ``{"plan": ...}`` for a dry run, else the report with output, concepts kept and dropped, and accuracies.

    Raises:
        InputError, ArtifactError: the configuration cannot be used.
    """
    config = read_config(settings.config)
    out = Path(str(config["output"]))
    if out.exists() and not out.is_dir():
        raise InputError(f"output {out} is a file; pass a folder")
    if not settings.dry_run:
        files = {f"output, file {name}:": out / name for name in _FILES}
        check_outputs({**config, "config": settings.config}, files, make_folders=False)
    _check_folders(config, out)
    with processes(str(config.get("device", "cpu"))) as device, _told():
        data, arguments, skipped = fit_arguments(config, device)
        if settings.dry_run:
            plan = plan_salf_cbm(**arguments, within_hours=config.get("within_hours", 24.0))
            return {"plan": plan.as_dict(), "text": str(plan), "skipped": skipped, "first": is_first()}
        model = fit_salf_cbm(**arguments, show_progress=True)
        report = _report(model, config, skipped)
        if is_first():
            model.metadata["configuration"] = {key: value for key, value in config.items() if key != "device"}
            model.metadata["preprocessing"] = data
            out.mkdir(parents=True, exist_ok=True)
            model.save_pretrained(out)
            write_atomically(out / "report.json", json.dumps(report, indent=2) + "\n")
            write_atomically(out / "report.md", report_text(report))
        return {**report, "text": report_text(report), "first": is_first()}


def _check_folders(config: Mapping[str, Any], out: Path) -> None:
    """Check that no file of the user would be replaced, and that nothing is written among images.

    Raises:
        InputError: a folder violates this; the message names it.
    """
    store = Path(str(config["store"]))
    if _inside(store, out) and _inside(out, store):
        raise InputError(f"output and store are the same folder, {printable(out)}; pass a separate folder for each")
    for name in ("train", "val"):
        images = Path(str(config.get(name)))
        for what, folder in (("output", out), ("store", store)):
            if images.is_dir() and _inside(folder, images):
                raise InputError(
                    f"{what} {printable(folder)} is inside the folder of {name}, whose subfolders are the classes; "
                    "pass another"
                )
    there = [name for name in _FILES if (out / name).exists()]
    if there and not _is_ours(out):
        raise InputError(
            f"output {printable(out)} contains a {there[0]} that does not belong to a SALF-CBM and would be "
            "overwritten; pass another folder"
        )


def _inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _is_ours(folder: Path) -> bool:
    """Whether the folder contains a saved model, of which a killed run may have left only the weights."""
    try:
        if (folder / "config.json").exists():
            found = read_json(folder / "config.json", dict).get("format", "")
        else:
            with open_safetensors(folder / "model.safetensors", "a saved model") as opened:
                found = (opened.metadata() or {}).get("format", "")
    except (InputError, ArtifactError, FileNotFoundError):
        return False
    return str(found).startswith("captum_concepts.SALFCBM")


def _report(model: Any, config: Mapping[str, Any], skipped: list[dict[str, str]]) -> dict[str, Any]:
    found = model.metadata
    vocabulary = found["vocabulary"]["report"]
    rules = model.class_names or [f"class {k}" for k in range(model.num_classes)]
    return {
        "output": str(config["output"]),
        "store": str(config["store"]),
        "concepts": {"kept": len(model.concepts), "started": vocabulary["started"], "dropped": vocabulary["counts"]},
        "validation_similarity": found["validation_similarity"],
        "pooled_similarity": found["pooled_similarity"],
        "accuracy": found["accuracy"],
        "head": found["head"],
        "trust": model.trust,
        "support": found["support"],
        "advice": found["advice"],
        "rules": {
            name: [[concept, round(weight, 4)] for concept, weight in model.decision_rules(k)[:5]]
            for k, name in enumerate(rules)
        },
        "skipped": skipped,
    }


def report_text(report: Mapping[str, Any]) -> str:
    """The report in Markdown, which is written next to the model and printed."""
    kept, scores = report["concepts"], report["accuracy"]
    dropped = ", ".join(f"{count} {reason}" for reason, count in kept["dropped"].items()) or "none"
    validation = "not measured (no val)" if scores["validation"] is None else f"{scores['validation']:.1%}"
    similarity = list(report["pooled_similarity"].values())
    of_maps = list(report["validation_similarity"].values())
    lines = [
        "# SALF-CBM",
        f"- accuracy: {scores['train']:.1%} on training images, {validation} on validation images",
        f"- concepts: {kept['kept']} of {kept['started']} kept; dropped: {dropped}",
        f"- validation similarity: {sum(similarity) / len(similarity):.3f} on average, {min(similarity):.3f} to "
        f"{max(similarity):.3f}; per grid cell of the maps {sum(of_maps) / len(of_maps):.3f}",
        f"- head: {report['head']['nonzeros_per_class']:.3g} weights per class, lam {report['head']['lam']:.3g}",
        f"- trust: {report['trust']}",
        *(["", "What to change:", "", *(f"- {line}" for line in report["advice"])] if report["advice"] else []),
        "",
        "Strongest rules of each class:",
        "",
        *(
            f"- {name}: " + ", ".join(f"{concept} {weight:+.2f}" for concept, weight in rules)
            for name, rules in report["rules"].items()
        ),
    ]
    if report["skipped"]:
        lines += ["", f"{len(report['skipped'])} images could not be read:", ""]
        lines += [f"- {entry['image']}: {entry['reason']}" for entry in report["skipped"]]
    return "\n".join(lines) + "\n"


@contextmanager
def _told() -> Iterator[None]:
    """A context in which log messages of the steps go to stderr."""
    logger, handler = logging.getLogger("captum_concepts"), logging.StreamHandler(sys.stderr)
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # the root logger of other libraries would repeat messages
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
