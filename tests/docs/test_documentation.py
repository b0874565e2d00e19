"""The documentation is true: its code runs, its numbers are records, its commands exist, its links lead somewhere."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest

from captum_concepts.__main__ import parser

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if "api" not in page.parts)
RUN_ELSEWHERE = {"README.md": "tests/docs/test_readme.py runs its code"}
BLOCK = re.compile(r"(?:<!-- (?P<mark>[^>]*?) -->\n)?```python\n(?P<code>.*?)```", flags=re.DOTALL)


def tool(name: str) -> ModuleType:
    """A module of docs/tools, which is no package."""
    sys.path[:] = [str(DOCS / "tools"), *(path for path in sys.path if path != str(DOCS / "tools"))]
    spec = importlib.util.spec_from_file_location(f"docs_tool_{name}", DOCS / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path) -> list[tuple[str, str]]:
    return [(found["mark"] or "", found["code"]) for found in BLOCK.finditer(text(page))]


SKILL = ROOT / "skills" / "captum-concepts" / "SKILL.md"
WITH_CODE = [page for page in (*PAGES, SKILL) if blocks(page)]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.relative_to(ROOT).as_posix())
@pytest.mark.filterwarnings("ignore:You are using a non-tuple:UserWarning")
def test_code_runs_from_the_top_of_its_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for number, (mark, code) in enumerate(blocks(page)):
        compiled = compile(code, f"{page.name}, block {number}", "exec")
        needs = re.match(r"needs: (\w+)", mark)
        if mark.startswith("not run:") or (needs and importlib.util.find_spec(needs[1]) is None):
            continue  # compiled above; the page says why
        exec(compiled, namespace)


@pytest.mark.parametrize("library", sorted(set(re.findall(r"<!-- needs: (\w+) -->", "".join(map(text, PAGES))))))
def test_blocks_of_other_libraries_are_run(library):
    """In the tests of their pages; those of what is not here are named at the end of the run."""
    pytest.importorskip(library, reason=f"{library} is not installed")


def test_blocks_that_are_not_run_say_why():
    for page in WITH_CODE:
        for mark, _ in blocks(page):
            assert not mark or re.match(r"(not run|needs): \S+", mark), f"{page}: {mark!r}"


def test_there_is_code_on_every_method_page():
    for page in (DOCS / "methods").glob("*.md"):
        assert blocks(page), page


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_commands_parse(page):
    joined = text(page).replace("\\\n", " ")
    commands = re.findall(r"^ *(python -m captum_concepts \w.*)$", joined, flags=re.MULTILINE)
    for command in commands:
        words = shlex.split(command, comments=True)[3:]
        if "--help" not in words:
            parser().parse_args(words)


def test_every_command_is_on_its_page():
    actions = [
        action for action in parser()._actions if hasattr(action, "choices") and isinstance(action.choices, dict)
    ]
    names = list(actions[0].choices)
    assert {"explain", "demo"} <= set(names)
    page = text(DOCS / "command_line.md")
    for name in names:
        assert f"## {name}\n" in page
        assert f"usage: python -m captum_concepts {name}" in page


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: page.relative_to(DOCS).as_posix())
def test_numbers_helps_and_names_are_those_of_records_and_code(page):
    assert text(page) == tool("written").write(text(page)), "run `make pages` and commit what it writes"


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: page.relative_to(DOCS).as_posix())
def test_pages_read_in_the_repository(page):
    """Without MkDocs: nothing is left to fill in, and a page of the reference names what it documents."""
    shown = re.sub(r"<!--.*?-->", "", text(page), flags=re.DOTALL)
    assert "{{" not in shown
    assert ":::" not in shown
    if "api" in page.parts:
        described = re.findall(r"^\| \[?`\w+`.*? \| (.+) \|$", shown, flags=re.MULTILINE)
        assert described, "no names: `make pages`"
        assert all(described)


def test_numbers_come_from_records():
    written = tool("written")
    cost = json.loads(text(ROOT / "benchmarks/results/fam.json"))["ratio_to_bare_forward"]["FAM, linear head"]
    where = "<!-- fam.json ; ratio_to_bare_forward ; FAM, linear head ; .2f -->"
    assert written.write(f"| 99{where} |") == f"| {cost:.2f}{where} |"
    with pytest.raises(KeyError, match="no entry 'FAM, quadratic head'"):
        written.write("0<!-- fam.json ; ratio_to_bare_forward ; FAM, quadratic head ; .2f -->")
    with pytest.raises(KeyError, match="no record"):
        written.write("0<!-- nothing.json ; a ; .2f -->")


def test_the_site_has_its_own_links_and_directives():
    written = tool("written")
    page = written.for_site(text(DOCS / "api" / "solvers.md"), "api/solvers.md")
    assert "\n::: captum_concepts.solvers\n    options:" in page
    assert "../captum_concepts" not in page
    assert "(../tutorials/01_what.md)" in written.for_site("[a](../../tutorials/01_what.ipynb)", "methods/fam.md")
    assert "benchmarks/results/README.md" not in written.for_site(text(DOCS / "measured.md"), "measured.md")


def test_links_lead_to_pages_and_pictures():
    for page in (*DOCS.rglob("*.md"), DOCS / "llms.txt", SKILL):
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text(page)):
            if not target.startswith("https://"):
                assert (page.parent / target).resolve().is_file(), f"{page.name} links to {target}"


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r": ([\w/]+\.md)$", text(ROOT / "mkdocs.yml"), flags=re.MULTILINE))
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")} - {"tutorials/index.md"}
    assert listed == pages | {"changelog.md"}


def test_every_public_name_is_in_the_reference():
    import captum_concepts

    reference = "\n".join(text(page) for page in (DOCS / "api").glob("*.md"))
    named = [name for name in captum_concepts.__all__ if name[:1].isupper() or name.startswith("fit")]
    rooms = set(captum_concepts.__all__) - set(named) - {"__version__"}
    for name in named:
        where = {"ConceptTranslator": "models"}.get(name, name)
        assert f"::: captum_concepts.{where}" in reference, name
    for room in rooms:
        assert f"::: captum_concepts.{room}\n" in reference, room


def test_the_metrics_reference_is_complete():
    from captum_concepts import metrics

    page = text(DOCS / "api" / "metrics.md")
    missing = [name for name in metrics.__all__ if not re.search(rf"\b{name}\b", page)]
    assert missing == ["METRICS"] or not missing


def test_formulas_become_mathml():
    pytest.importorskip("latex2mathml", reason="the docs extra is not installed")
    formulas = tool("formulas")
    for page in PAGES:
        rendered = formulas.render(text(page))
        assert "$$" not in formulas._CODE.sub("", rendered), page
    assert formulas.render("a `$x$` and $x_1$ cost $5").count("<math") == 1


def test_docstrings_become_markdown():
    pytest.importorskip("griffe", reason="the docs extra is not installed")
    pytest.importorskip("latex2mathml", reason="the docs extra is not installed")
    docstrings = tool("docstrings")
    given = "See :func:`nra` and :class:`Missing`.\n\n.. math:: a_1\n\n>>> 1 + 1\n2\n"
    found = docstrings.to_markdown(given, {"nra": "captum_concepts.metrics.nra"})
    assert "[`nra`][captum_concepts.metrics.nra]" in found
    assert "`Missing`" in found
    assert 'display="block"' in found
    assert "```pycon\n>>> 1 + 1\n2\n```" in found
    assert not re.search(r":\w+:`|\.\. math::", found)


def test_tutorials_become_pages():
    notebooks = tool("notebooks")
    assert notebooks.notebooks()
    for path in notebooks.notebooks():
        markdown, pictures = notebooks.page(path)
        assert markdown.startswith("# ")
        for name, data in pictures.items():
            assert f"]({name})" in markdown
            assert data[:4] in (b"\x89PNG", b"\xff\xd8\xff\xe0")
        assert ".ipynb)" not in markdown
        assert not re.search(r"!\[\]", markdown), "a picture without a description"
