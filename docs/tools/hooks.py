"""MkDocs hooks: tutorials and records become pages, directives of the reference are read, formulas are drawn."""

from __future__ import annotations

import json
import posixpath
from typing import Any

import formulas
import notebooks
import written
from mkdocs.structure.files import File, Files


def on_config(config: Any) -> Any:
    """Give every tutorial its place in the navigation."""
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
    for path in notebooks.notebooks():
        markdown, pictures = notebooks.page(path)
        files.append(File.generated(config, f"tutorials/{path.stem}.md", content=markdown))
        for name, data in pictures.items():
            files.append(File.generated(config, f"tutorials/{name}", content=data))
    changelog = (notebooks.ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "changelog.md", content=changelog))
    for name, data in written.pictures().items():
        files.append(File.generated(config, name, content=data))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """What the site has in other places than the repository, then formulas."""
    return formulas.render(written.for_site(markdown, page.file.src_uri))


SHIM = "https://unpkg.com/iframe-worker/shim"


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """The search reads its worker from the site: nothing is fetched from elsewhere."""
    here = posixpath.dirname(page.file.src_uri) or "."
    return output.replace(SHIM, posixpath.relpath("assets/iframe-worker.js", here))


def on_post_template(output: str, **_: Any) -> str:
    """The same on the page of what is not found, whose links are absolute."""
    return output.replace(SHIM, "/assets/iframe-worker.js")
