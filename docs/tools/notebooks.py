"""The tutorials as pages: each executed notebook becomes Markdown and its pictures."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TUTORIALS = ROOT / "tutorials"


def notebooks() -> list[Path]:
    """The executed notebooks, in order."""
    return sorted(TUTORIALS.glob("[0-9]*.ipynb"))


def title(notebook: dict[str, Any]) -> str:
    """The first heading."""
    found = re.search(r"^# (.+)$", "".join(notebook["cells"][0]["source"]), flags=re.MULTILINE)
    if found is None:
        raise ValueError("a tutorial begins with a heading")
    return found[1]


def page(path: Path) -> tuple[str, dict[str, bytes]]:
    """Markdown of a notebook and its pictures, by file name."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(re.sub(r"\]\((\d\w+)\.ipynb\)", r"](\1.md)", source))
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            parts.append(_output(output, path.stem, pictures, _alt(cell, parts)))
    seconds = notebook["metadata"].get("captum_concepts", {}).get("cpu_seconds")
    where = f"[`tutorials/{path.stem}.py`](https://github.com/captum-concepts/captum_concepts/tree/main/tutorials)"
    note = f"*Takes {seconds:.0f} CPU seconds. Source: {where}.*" if seconds else f"*Source: {where}.*"
    parts.insert(1, note)
    return "\n\n".join(part for part in parts if part) + "\n", pictures


def _alt(cell: dict[str, Any], parts: list[str]) -> str:
    """What a picture shows: the cell's own words, or the last sentence in front of it."""
    given = cell["metadata"].get("alt")
    if given:
        return str(given)
    texts = [part for part in parts[:-1] if not part.startswith(("```", "![", "<"))]
    words = re.sub(r"[`*#\[\]]|\(http[^)]*\)", "", texts[-1]) if texts else "figure"
    return " ".join(words.split())[-160:]


def _output(output: dict[str, Any], stem: str, pictures: dict[str, bytes], alt: str) -> str:
    if output["output_type"] == "stream":
        return f"```text\n{''.join(output['text']).rstrip()}\n```"
    if output["output_type"] == "error":
        raise ValueError(f"tutorial {stem} holds an error: {output['evalue']}")
    data = output["data"]
    for kind, suffix in (("image/png", "png"), ("image/jpeg", "jpg")):
        if kind in data:
            name = f"{stem}_{len(pictures) + 1}.{suffix}"
            pictures[name] = base64.b64decode("".join(data[kind]))
            return f"![{alt}]({name})"
    if "text/markdown" in data:
        return "".join(data["text/markdown"])
    if "text/html" in data:
        return "".join(data["text/html"])
    return f"```text\n{''.join(data['text/plain'])}\n```"
