"""MkDocs hooks: tutorials become pages; records, commands and formulas are put into Markdown."""

from __future__ import annotations

import json
import sys
from typing import Any

import command_line
import formulas
import notebooks
import records
from mkdocs.structure.files import File, Files


def on_config(config: Any) -> Any:
    """Give every tutorial its place in the navigation."""
    sys.path.append(str(notebooks.ROOT))  # the command line page asks the package itself
    entries: list[Any] = [{"All tutorials": "tutorials/index.md"}]
    for path in notebooks.notebooks():
        heading = notebooks.title(json.loads(path.read_text(encoding="utf-8")))
        entries.append({heading: f"tutorials/{path.stem}.md"})
    for section in config.nav:
        if "Tutorials" in section:
            section["Tutorials"] = entries
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the tutorials, the changelog and the pictures of the records, which are not in docs/."""
    rows = []
    for path in notebooks.notebooks():
        markdown, pictures = notebooks.page(path)
        files.append(File.generated(config, f"tutorials/{path.stem}.md", content=markdown))
        for name, data in pictures.items():
            files.append(File.generated(config, f"tutorials/{name}", content=data))
        about = json.loads(path.read_text(encoding="utf-8"))
        seconds = about["metadata"].get("captum_concepts", {}).get("cpu_seconds", float("nan"))
        rows.append(f"| [{notebooks.title(about)}]({path.stem}.md) | {seconds:.0f} |")
    table = "\n".join(["| tutorial | CPU seconds |", "| --- | --- |", *rows])
    index = files.get_file_from_path("tutorials/index.md")
    index.content_string = index.content_string.replace("{{ tutorials }}", table)
    changelog = (notebooks.ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "changelog.md", content=changelog))
    for name, data in records.pictures().items():
        files.append(File.generated(config, name, content=data))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Records, commands, then formulas."""
    return formulas.render(command_line.render(records.render(markdown)))
