"""Check the built site: ``python docs/tools/check_site.py site``. Prints what is wrong; the exit code is 1 then.

Nothing is fetched from elsewhere (fonts, scripts, styles, pictures), every picture has a description, every link inside
the site leads to a file and an anchor that exist, and every heading is spelt as codespell would have it.
"""

from __future__ import annotations

import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

FETCHED = {"script": "src", "img": "src", "source": "src", "iframe": "src", "link": "href"}
#: Kinds of <link> that load nothing.
STILL = {"canonical", "prev", "next", "alternate", "edit"}


class Page(HTMLParser):
    """Links, anchors, headings and faults of one page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.headings: list[str] = []
        self.faults: list[str] = []
        self._in_heading = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Called by the parser."""
        found = {name: value or "" for name, value in attributes}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        address = found.get(FETCHED.get(tag, ""), "")
        if address.startswith(("http:", "https:", "//")) and found.get("rel") not in STILL:
            self.faults.append(f"<{tag}> is fetched from {address}")
        if tag == "img" and not found.get("alt", "").strip():
            self.faults.append(f"picture {found.get('src')} has no description")
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        elif address:
            self.links.append(address)
        if tag in ("h1", "h2", "h3", "h4"):
            self._in_heading += 1
            self.headings.append("")

    def handle_endtag(self, tag: str) -> None:
        """Called by the parser."""
        if tag in ("h1", "h2", "h3", "h4"):
            self._in_heading -= 1

    def handle_data(self, data: str) -> None:
        """Called by the parser."""
        if self._in_heading:
            self.headings[-1] += data


def check(site: Path) -> list[str]:
    """What is wrong, one line each."""
    pages = {path.resolve(): Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    faults = [] if pages else [f"no page in {site}"]
    for path, page in pages.items():
        name = path.relative_to(site.resolve())
        faults += [f"{name}: {fault}" for fault in page.faults]
        if name.name == "404.html":  # its links are absolute, for any address
            continue
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                faults.append(f"{name}: {link} leads nowhere")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                faults.append(f"{name}: {link}: there is no such place on the page")
    headings = "\n".join(sorted({" ".join(text.split()) for page in pages.values() for text in page.headings}))
    done = subprocess.run(
        [sys.executable, "-m", "codespell_lib", "-"], input=headings, capture_output=True, text=True, check=False
    )
    faults += [f"heading: {line}" for line in done.stdout.splitlines() if "==>" in line]
    if done.returncode not in (0, 65) and not done.stdout:  # 65: it found something
        faults.append(f"codespell did not run: {done.stderr.strip()}")
    return faults


def main() -> int:
    """Check the folder that is given."""
    faults = check(Path(sys.argv[1]))
    print("\n".join(faults) or f"{sys.argv[1]}: links, pictures and headings are as they should be")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
