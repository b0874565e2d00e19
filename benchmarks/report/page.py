"""The results page, the README's table and the plots, made of the recorded JSONs and of nothing else.

    python -m benchmarks.report.page               # benchmarks/results/README.md, its plots, the table in README.md
    python -m benchmarks.report.page --check       # exit code 1 if one of the texts is not what the records say
    python -m benchmarks.report.page --no-readme   # leaves the repository's README.md alone
    python -m benchmarks.report.page --stale       # records of another code than this; exit code 1 if there are any

No number is typed: the same records give the same text. A record that this page does not know is shown as it is, so a
new benchmark needs nothing here but, if wanted, a title in :mod:`benchmarks.report.sections`.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from benchmarks.data.published import PROTOCOLS, PUBLISHED
from benchmarks.record import RESULTS, ROOT, changed
from benchmarks.report import sections
from benchmarks.report.coverage import peers_table, worse_on_purpose
from benchmarks.report.headlines import headlines, open_questions
from benchmarks.report.renderers import one_table

PAGE = "README.md"
MARK = "> **Stale**:"
START, END = "<!-- benchmark-table -->", "<!-- /benchmark-table -->"

HEAD = """# Benchmark results

`python -m benchmarks.report.page` generates this page from the JSON records next to it, and a test compares the two.
`make bench` runs the short benchmarks (minutes), and `make bench-full` all that `benchmarks/run/suite.py` lists (about
two hours on 2 cores); both then regenerate this page. These are run by hand: SALF-CBM on Caltech-101, by grid and
radius, and its epoch; the constants of the fused map; the solver except for its peers; audits. Each part states when,
where and with which versions it was recorded. Parts are recorded separately, so these differ. A record lists the code
that ran (older records: the imported modules; checks do not count); if that code has changed since, the record is
marked stale.

How to read the tables: brackets contain 95 % intervals, bootstrapped over images unless a part states otherwise.
**NRA** is a threshold-free accuracy of the region. Random maps score about 0.15 with its published baseline and 0.04 to
0.08 with the exact one (a constant map scores 0; negative values are clipped). **Specificity** is NRA minus that of the
other concepts' maps of the image on the same mask, so it is 0 for any concept-agnostic map. *Random*, *centre Gaussian*
and *activation energy* are concept-agnostic baselines: a map that does not exceed them shows nothing about the concept,
however good it looks. Rows in italics are degraded maps, either permuted between images or computed for an absent
target; a table in which they do not score lower is not informative. **Average drop** and **increase in confidence**
keep what the map shows and fill the rest with the image's mean color; they favor maps that show much. Arrows show which
direction is better.
"""

QUESTIONS = """Other similarities, poolings and layers of a vision transformer, and class activation methods for models
with a head. The best of several is partly the best by chance; the tables below contain the intervals."""

WORSE = """The number of tables in which a value falls (average drop: rises) when the maps are degraded. Where it does
not, the table has few images, or targets that look alike."""

PAPERS = """The data of these tables is not available offline. The commands follow the protocols and are tested on tiny
trees in the data sets' own formats; a table that was filled has its own section."""

PEERS = "Records that have a row of each peer and of the concept-agnostic baselines."


def load(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Every record of the folder by name."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def stale(records: dict[str, dict[str, Any]]) -> dict[str, str]:
    """For each record of another code than this checkout's, what to say about it."""
    out = {}
    for name, record in records.items():
        files = changed(record)
        if files is None:
            out[name] = f"{MARK} recorded before records knew the code they measured."
        elif files:
            shown = ", ".join(f"`{file.removeprefix('captum_concepts/')}`" for file in files[:3])
            out[name] = f"{MARK} changed since: {shown}{f' and {len(files) - 3} more' if len(files) > 3 else ''}."
    return out


def without_marks(text: str) -> str:
    """A page without what depends on the checkout's code: a test of the records does not fail for another commit."""
    return re.sub(rf"^{re.escape(MARK)}.*\n\n", "", text, flags=re.MULTILINE)


def page(
    records: dict[str, dict[str, Any]], pictures: list[str] | None = None, marks: dict[str, str] | None = None
) -> str:
    """The whole page as Markdown.

    Args:
        records: by name.
        pictures: files that lie beside the page; a section shows those that belong to it.
        marks: :func:`stale`.
    """
    made = sections.sections(records, pictures or [], marks or {})
    lines = [HEAD, "## Summary", "", headlines(records), ""]
    asked = open_questions(records.get("fam_quality", {}))
    lines += ["## Open questions of FAM's paper", "", QUESTIONS, "", asked, ""] if asked else []
    worse = worse_on_purpose(records)
    lines += ["## Degraded maps", "", WORSE, "", worse, ""] if worse else []
    lines += ["## Peers", "", PEERS, "", peers_table(records), "", "## Contents", ""]
    lines += [f"- [{one.title}](#{one.anchor})" for one in made]
    waiting = papers(records)
    lines += ["- [The papers' tables](#the-papers-tables)"] if waiting else []
    for one in made:
        lines += ["", f"## {one.title}", "", *one.lines]
    lines += ["", "## The papers' tables", "", PAPERS, "", *waiting] if waiting else []
    return "\n".join(lines).rstrip() + "\n"


def papers(records: dict[str, dict[str, Any]]) -> list[str]:
    """Protocol, command and published rows of every table of the papers that nobody has filled."""
    lines: list[str] = []
    for name, (title, protocol, command) in PROTOCOLS.items():
        if f"paper_{name.replace('-', '_')}" not in records:
            note = f"{protocol}\n\n    {command}"
            lines += one_table({"title": title, "note": note, "rows": PUBLISHED[name]})
    return lines


def with_table(text: str, records: dict[str, dict[str, Any]]) -> str:
    """``text`` with the summary put between its markers."""
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise SystemExit(f"the README must hold the two lines {START} and {END}, once each and in this order")
    before, after = text[: text.index(START) + len(START)], text[text.index(END) :]
    return f"{before}\n{headlines(records)}\n{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="its table is filled as well")
    parser.add_argument("--no-readme", dest="readme", action="store_const", const=None)
    parser.add_argument("--check", action="store_true", help="write nothing; say whether the texts are up to date")
    parser.add_argument("--no-plots", action="store_true")
    parser.add_argument("--stale", action="store_true", help="write nothing; name the records of another code")
    args = parser.parse_args()
    records = load(args.results)
    marks = {} if args.check else stale(records)  # a check leaves them out
    if args.stale:
        raise SystemExit("\n".join(f"{name}: {said.removeprefix(MARK).strip()}" for name, said in marks.items()) or 0)
    if not args.check:
        args.results.mkdir(parents=True, exist_ok=True)
    if not args.check and not args.no_plots:
        from benchmarks.report import plots

        plots.draw(records, args.results)
    pictures = [path.name for path in sorted(args.results.glob("*.png"))]
    texts = {args.results / PAGE: page(records, pictures, marks)}
    if args.readme is not None:
        texts[args.readme] = with_table(args.readme.read_text(encoding="utf-8"), records)
    found = {path: path.read_text(encoding="utf-8") if path.is_file() else "" for path in texts}
    if args.check:
        other = [path.name for path, text in texts.items() if without_marks(found[path]) != without_marks(text)]
        raise SystemExit("\n".join(f"{name} is not what the records say" for name in other) or 0)
    for path, text in texts.items():
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
        print(f"{path.name}: {'as before' if found[path] == text else 'written'}")


if __name__ == "__main__":
    main()
