"""The results page and the README's table say what the records say, and nothing else."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.record import changed, digest, environment
from benchmarks.report import cells, coverage, headlines, page, plots, sections
from benchmarks.run import suite

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture(scope="module")
def records() -> dict:
    return page.load(RESULTS)


def pictures() -> list[str]:
    return sorted(path.name for path in RESULTS.glob("*.png"))


class TestWhatIsCommitted:
    def test_page_is_what_the_records_say(self, records):
        text = page.without_marks((RESULTS / page.PAGE).read_text(encoding="utf-8"))
        assert text == page.page(records, pictures()), "make bench-page"

    def test_readme_is_what_the_records_say(self, records):
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        assert page.with_table(readme, records) == readme, "make bench-page"

    def test_check_says_so(self, tmp_path: Path):
        """As a program, also from another folder; a changed number is noticed."""
        command = [sys.executable, "-m", "benchmarks.report.page", "--check"]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        assert subprocess.run(command, cwd=tmp_path, env=env).returncode == 0
        for path in RESULTS.glob("*"):
            if path.suffix in (".json", ".png", ".md"):
                (tmp_path / path.name).write_bytes(path.read_bytes())
        record = json.loads((tmp_path / "nra.json").read_text())
        record["timings"][0]["ms_per_map"]["nra"] *= 2
        (tmp_path / "nra.json").write_text(json.dumps(record))
        own = ["--results", str(tmp_path), "--no-readme"]
        found = subprocess.run([*command, *own], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert (found.returncode, found.stderr.strip()) == (1, "README.md is not what the records say")

    def test_every_picture_is_shown_and_every_link_leads_somewhere(self, records):
        text = page.page(records, pictures())
        assert sorted(re.findall(r"\]\(([^)]+\.png)\)", text)) == pictures()
        anchors = {one.anchor for one in sections.sections(records, [])}
        assert set(re.findall(r"\]\(#([^)]+)\)", text)) == anchors | {"the-papers-tables"}
        assert len(anchors) == len(records)

    def test_records_are_json_without_places_of_this_machine(self, records):
        for path in RESULTS.glob("*"):
            if path.suffix in (".json", ".md"):
                text = path.read_text(encoding="utf-8")
                assert not re.search(r"NaN|Infinity", text) or path.suffix == ".md", path.name
                assert not re.search(r"(?<![\w.])/(work|tmp|home|root|Users)/", text), path.name

    def test_circumstances_are_in_every_section(self, records):
        """Machine, versions and date."""
        for one in sections.sections(records, []):
            text = "\n".join(one.lines)
            assert re.search(r"Recorded 20\d\d-\d\d-\d\d on \S+", text), one.title
            assert re.search(r"torch 2\.\d+", text), one.title

    def test_records_that_know_their_code_name_it(self, records):
        """Nothing is measured without a module of the package."""

        def empty(value) -> bool:
            if isinstance(value, dict):
                return value.get("sources", True) == {} or any(map(empty, value.values()))
            return isinstance(value, list) and any(map(empty, value))

        assert [name for name, record in records.items() if empty(record)] == []

    def test_every_peer_has_a_row(self, records):
        found = coverage.whereabouts(records)
        assert [peer for peer, names in found.items() if not names] == []

    def test_tables_of_maps_have_the_rows_without_which_they_mislead(self, records):
        seen = 0
        for name in ("fam_quality", "concept_words", "tcav"):
            for title, rows in coverage.map_rows(records[name]):
                methods = {row["method"] for row in rows}
                assert methods >= {"random", "centre Gaussian", "activation energy"}, title
                assert sum(row.get("kind") == "degraded" for row in rows) == 2, title
                seen += 1
        assert seen > 10

    def test_maps_made_worse_fall(self, records):
        """Not in each table of twelve images, but nearly; and never by more than the intervals allow."""
        for way, columns in coverage.falls(records).items():
            for column in ("nra", "nra_exact", "specificity", "iou"):
                worse, of = columns[column]
                assert worse >= 0.85 * of, (way, column)
        for record in records.values():
            for title, rows in coverage.map_rows(record):
                by_name = {row["method"]: row for row in rows}
                for row in rows:
                    if row.get("kind") == "degraded" and row.get("nra"):
                        assert row["nra"][1] < by_name[row["of"]]["nra"][2], (title, row["method"])


class TestAnyRecords:
    def test_every_subset_gives_a_page(self, records):
        for name, record in records.items():
            one = page.page({name: record}, pictures())
            assert f"`{name}.json`" in one
            rest = page.page({n: r for n, r in records.items() if n != name})
            assert f"`{name}.json`" not in rest
        assert "## Contents" in page.page({})

    def test_a_table_of_the_papers_is_a_promise_until_it_is_filled(self, records):
        before = page.page(records)
        assert "--table salf-segmentation" in before
        filled = {
            "parts": {
                "x": {"tables": [{"title": "filled", "rows": [{"method": "SALF-CBM", "mean_iou": [0.5, 0.4, 0.6]}]}]}
            }
        }
        after = page.page({**records, "paper_salf_segmentation": filled})
        assert "--table salf-segmentation" not in after
        assert "## Papers' table: salf segmentation" in after
        assert "--table ce-fam-broden" in after

    def test_open_questions_name_the_first_the_best_and_the_blind(self):
        def row(method, value, **more):
            return {"method": method, "nra": [value, value - 0.1, value + 0.1], **more}

        rows = [row("cosine", 0.5), row("dot", 0.5000001), row("learned", 0.4), row("random", 0.2, kind="blind"),
                row("energy", 0.6, kind="blind"), row("cosine: worse", 0.9, kind="degraded")]  # fmt: skip
        record = {
            "parts": {"q": {"tables": [{"title": "which similarity, x", "rows": rows}, {"title": "few", "rows": []}]}}
        }
        *_, line = headlines.open_questions(record).splitlines()
        assert line == (
            "| which similarity, x | cosine 0.50 [0.40, 0.60] | cosine 0.50 [0.40, 0.60] | energy 0.60 [0.50, 0.70] |"
        )
        assert headlines.open_questions({}) == ""

    def test_audits_name_what_was_planted_and_what_was_not(self):
        half = [0.5, 0.4, 0.6]
        found = {
            "planted_found": 1,
            "planted": 2,
            "precision": 0.5,
            "precision_by_exact_presence": 1.0,
            "accuracy": 0.6,
        }
        case = {
            "pairs": {"cat": "sofa", "dog": "lead"},
            "environment": {"date": "2026-01-01", "machine": "any"},
            "biased": {**found, "suspects": [["cat", "sofa", 0.2, 0.003, True], ["cat", "lead", 0.1, 0.04, None]]},
            "unbiased": {"accuracy": 0.9},
            "resampled": {"without_suspects": 39, "audits": 40},
        }
        entry = {"independent": {"accuracy": half, "right_broken": [0.1, 0.0, 0.2]}, "planted": half}
        records = {
            "audit_shortcuts": {"cases": {"pets": case}},
            "audit_removal": {"before": {"independent": half, "planted": half}, "after": {"suspects, pairs": entry}},
            "audit_discovery": {
                "methods": {"NMF, seed 3": {"encoded": 4, "found_at_0.9": 0.25, "auroc": {"a": [1, 1]}}}
            },
        }
        text = {one.title: "\n".join(one.lines) for one in sections.sections(records, [])}
        shortcuts, removal, found = (text[f"Audits: {of}"] for of in (
            "planted shortcuts", "removing the suspects", "discovery without words",
        ))  # fmt: skip
        assert "| pets | 1 of 2 | 0.5 | 1 | 0.6 | 0.9 | 39 of 40 |" in shortcuts
        assert "| pets | cat | sofa | 0.2 | 0.003 | True | planted |" in shortcuts
        assert "| pets | cat | lead | 0.1 | 0.04 |  | not planted |" in shortcuts
        assert "| suspects | pairs | 0.50 [0.40, 0.60] | 0.10 [0.00, 0.20] | 0.50 [0.40, 0.60] |" in removal
        assert "| NMF | 3 | 4 | 0.25 |" in found

    def test_no_record_gives_a_table_without_rows(self):
        assert headlines.headlines({}).count("\n") == 1
        assert coverage.worse_on_purpose({}) == ""
        assert "no row" in coverage.peers_table({})

    def test_a_changed_number_changes_page_and_readme(self, records):
        """Nothing is typed: every number that the summary shows comes from a record."""
        before = headlines.headlines(records)
        changed = copy.deepcopy(records)
        changed["nra"]["timings"][0]["ms_per_map"]["nra"] = 123.4
        after = headlines.headlines(changed)
        assert "| 123 |" in after
        assert [a for a, b in zip(before.splitlines(), after.splitlines(), strict=True) if a != b] == [
            line for line in before.splitlines() if line.startswith("| NRA of a 224 px map")
        ]

    def test_records_that_are_not_known_or_have_changed(self, records):
        strange = {
            "a_new_one": {"rows": [{"x": [1.0, 0.5, 2.0], "y": None, "z": "a|b"}]},
            "solver": {"peers": "gone"},
            "concept_regions_coco_half1": {"rows": [{"method": "fused", "nra": [0.5, 0.4, 0.6]}]},
            "fam": {"median_seconds": 3.0},
            "nothing": {},
        }  # fmt: skip
        text = page.page({**records, **strange})
        assert "## a new one" in text
        assert "1.00 [0.50, 2.00]" in text
        assert "a\\|b" in text
        assert page.page(strange)

    def test_the_longest_topic_counts(self):
        assert sections.topic_of("fam_quality").title == "FeatureActivationMap: quality"
        assert sections.topic_of("fam").title == "FeatureActivationMap: cost"
        assert sections.topic_of("family").title == "family"
        (one,) = sections.sections(
            {"salf_cbm_caltech": {}}, ["salf_cbm_caltech.png", "salf_cbm_caltech_x.png", "salf_cbm.png"]
        )
        assert one.title == "SALFCBM: caltech"
        assert [line.count("](") for line in one.lines].count(1) == 2

    def test_readme_without_markers_is_refused(self, records):
        with pytest.raises(SystemExit, match="once each"):
            page.with_table("# no markers", records)
        with pytest.raises(SystemExit, match="once each"):
            page.with_table(f"{page.END}\n{page.START}", records)
        text = page.with_table(f"a\n{page.START}\nold\n{page.END}\nb\n", records)
        assert "old" not in text
        assert text.startswith("a\n")
        assert text.endswith("\nb\n")


class TestCells:
    @pytest.mark.parametrize(
        ("value", "shown"),
        [(None, ""), (0.5, "0.5"), (1234.5, "1,234"), (3, "3"), (True, "True"), ([0.5, 0.4, 0.6], "0.50 [0.40, 0.60]"),
         ([-1e-9, -0.001, 0.004], "0.00 [0.00, 0.00]"), ([0.5, None, None], "0.50"), ([None, None, None], ""),
         ([1, 2], "1, 2"), ([0.81, 1.0, 1.0], "0.81, 1, 1"), ([5, 7, 9], "5, 7, 9"),
         ({"a": 1}, "a 1"), ("x\ny", "x y")],
    )  # fmt: skip
    def test_shown(self, value, shown: str):
        assert cells.cell(value) == shown

    def test_lists_of_arguments_are_no_intervals(self):
        line = cells.circumstances({"arguments": {"grids": [5, 7, 9], "data": "/home/me/data", "seed": 0}})
        assert line == "<sub>grids 5, 7, 9; seed 0.</sub>"


class TestPlots:
    def test_every_plot_of_the_records_can_be_drawn(self, records, tmp_path: Path):
        plots.draw(records, tmp_path)
        drawn = {path.name for path in tmp_path.iterdir()}
        assert "nra_ms.png" in drawn
        assert drawn <= set(pictures()), "make bench-page"
        plots.draw({"nra": records["nra"], "solver": {}, "concept_regions_x": {}}, tmp_path)

    def test_points_that_coincide_are_numbered_apart(self):
        from matplotlib.figure import Figure

        figure = Figure()
        axis = figure.subplots()
        axis.plot([0, 0, 1], [0, 0, 1], "o")
        plots.number_points(figure, axis, [(0, 0), (0, 0), (1, 1)])
        assert len({one.xyann for one in axis.texts[:2]}) == 2


def script(job: suite.Job) -> Path:
    return ROOT / "benchmarks" / "run" / f"{(job.module or job.name).replace('.', '/')}.py"


class TestCode:
    """Records know the code they measured."""

    def test_comments_and_docstrings_do_not_count(self):
        code = 'import os\n\n\ndef f(x):\n    """Text."""\n    return x + 1  # one more\n'
        other = 'import os\n\ndef f(x):\n    """Another\n    text."""\n\n    # say why\n    return x + 1\n'
        assert digest(code) == digest(other)
        assert digest(code) != digest(code.replace("+ 1", "+ 2"))
        assert digest(code) != digest(code.replace("return x", 'return "x"'))

    def test_checks_do_not_count(self):
        """What was measured has passed them."""
        head = "from captum_concepts._checks import number\n\n\ndef f(x):\n"
        plain = f"{head}    return x + 1\n"
        checks = [
            "    if x < 0:\n        raise A\n", "    if x < 0:\n        y = str(x)\n        raise ValueError(y)\n",
            '    number("x", x)\n', "    check_order(x)\n",
            "    if x:\n        raise A\n    if not x:\n        raise B\n",
        ]  # fmt: skip
        for check in checks:
            assert digest(plain) == digest(f"{head}{check}    return x + 1\n"), check
        works = [
            "    if x < 0:\n        x = 0\n", "    if x < 0:\n        raise A\n    else:\n        x = 3\n",
            "    x = number(x)\n", "    other(x)\n", "    if (x := g(x)) is None:\n        raise A\n",
        ]  # fmt: skip
        for work in works:
            assert digest(plain) != digest(f"{head}{work}    return x + 1\n"), work
        assert digest(plain) == digest(plain.replace("import number", "import integer, number"))
        assert digest(plain) == digest(f"{plain}\n\ndef check_order(x):\n    return x\n")
        assert digest(plain) != digest(f"{plain}\n\ndef order(x):\n    return x\n")

    def test_messages_do_not_count(self):
        code = (
            "import warnings\n\n\ndef f(x):\n    if x:\n        try:\n            return g(x)\n"
            '        except KeyError as error:\n            raise ValueError(f"no {x}") from error\n'
            '    warnings.warn(\n        "empty",\n        stacklevel=2,\n    )\n    return h("empty")\n'
        )
        same = [('f"no {x}"', "listed(x)"), ('"empty",\n', '"nothing",\n')]
        other = [("ValueError", "TypeError"), ('h("empty")', 'h("x")'), ("warnings.warn(", "print("), ("g(x)", "x")]
        for old, new in same:
            assert digest(code) == digest(code.replace(old, new)), old
        for old, new in other:
            assert digest(code) != digest(code.replace(old, new)), old

    def test_only_what_ran_counts(self):
        code = (
            "import os\nfrom a import (\n    used,\n    unused,\n)\n\nSIZE = 3\n\n\ndef f(x):\n    return used(x)\n\n\n"
            "@os.cache\ndef g(x):\n    def inner():\n        return 1\n    return unused(x) + 2\n\n\n"
            "class A(B):\n    size = 4\n\n    def h(self):\n        return 5\n\n    def k(self):\n        return 6\n"
        )
        ran = ["f", "A.h"]
        same = [
            ("+ 2", "+ 3"),
            ("return 6", "return 7"),
            ("    unused,\n", ""),
            ("@os.cache\n", ""),
            ("return 1", "pass"),
        ]
        same += [("import os\n", "import os\nimport json\n"), ("class A", "def new():\n    return 1\n\n\nclass A")]
        for old, new in same:
            assert digest(code, ran) == digest(code.replace(old, new), ran), old
        for old, new in same[:2] + same[3:5] + same[6:]:
            assert digest(code) != digest(code.replace(old, new)), old
        other = [
            ("return 5", "return 8"),
            ("used(x)\n\n\n@", "used(x, 1)\n\n\n@"),
            ("SIZE = 3", "SIZE = 4"),
            ("(B)", "(C)"),
        ]
        other += [("size = 4", "size = 5"), ("def k", "def __len__"), ("from a", "from b"), ("def f(x)", "def f(x=1)")]
        for old, new in other:
            assert digest(code, ran) != digest(code.replace(old, new), ran), old
        assert digest(code, [*ran, "g"]) != digest(code.replace("return 1", "return 2"), [*ran, "g"])

    def test_a_benchmark_knows_what_it_ran(self):
        """In a process of its own: here the package was imported before the benchmarks."""
        program = (
            "import json, torch, benchmarks\nfrom benchmarks.record import sources\n"
            "from captum_concepts import metrics\nmap_, mask = torch.rand(1, 1, 4, 4), torch.ones(1, 1, 4, 4).bool()\n"
            "metrics.nra(map_, mask)\nprint(json.dumps(sources()))\n"
        )
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
        known = json.loads(done.stdout)
        region = known["captum_concepts/metrics/region.py"]
        assert "nra" in region["ran"]
        assert "region_auc" not in region["ran"]
        assert changed({"environment": {"sources": known}}) == []
        region["ran"].remove("nra")
        assert changed({"environment": {"sources": known}}) == ["captum_concepts/metrics/region.py"]

    def test_an_environment_names_the_modules_in_use(self):
        import captum_concepts.metrics.region  # noqa: F401

        sources = environment()["sources"]
        assert "captum_concepts/metrics/region.py" in sources
        assert not any(name.endswith(("errors.py", "__init__.py")) for name in sources)
        now = {"parts": {"a": {"environment": {"sources": sources}}}}
        assert changed(now) == []

    def test_changed_and_gone_files_are_marked(self):
        sources = environment()["sources"]
        name = next(iter(sources))
        old = {"environment": {"sources": {**sources, name: "00000000", "captum_concepts/gone.py": "00000000"}}}
        half = {"parts": {"a": {"environment": {"sources": sources}}, "b": {"environment": old["environment"]}}}
        assert changed(old) == changed(half) == sorted([name, "captum_concepts/gone.py"])
        assert changed({"environment": {"date": "2026-01-01"}}) is None
        records = {"nra": old, "fam": {}, "solver": {"environment": {"sources": sources}}}
        marks = page.stale(records)
        assert list(marks) == ["nra", "fam"]
        assert "`gone.py`" in marks["nra"]
        text = page.page(records, [], marks)
        assert text.count(page.MARK) == 2
        assert page.without_marks(text) == page.page(records)

    def test_the_page_shows_no_sources(self, records):
        assert "captum concepts/" not in page.page(records)
        assert "digest" not in page.page(records)

    def test_the_suite_runs_what_is_stale(self):
        job = suite.Job("nra", "", "")
        sources = environment()["sources"]
        fresh = {"nra": {"environment": {"sources": sources}}}
        assert not job.stale(fresh)
        assert job.stale({})
        assert job.stale({**fresh, "nra_of_others": {}})
        assert not job.stale({**fresh, "nrand": {}})


class TestSuite:
    def test_commands(self):
        for job in suite.JOBS:
            assert script(job).is_file()
            command = job.command(True, Path("/data"))
            assert command is not None
            assert suite.DATA not in " ".join(command)
        photos = next(job for job in suite.JOBS if job.name == "fam_photos")
        assert photos.command(False, Path("/data")) is None
        assert photos.command(True, None) is None
        with pytest.raises(SystemExit, match="known: nra"):
            suite.jobs(["nrra"])

    def test_arguments_are_those_the_scripts_take(self):
        for job in suite.JOBS:
            source = script(job).read_text(encoding="utf-8")
            for given in (job.short, job.full):
                for option in re.findall(r"--[\w-]+", given or ""):
                    assert f'"{option}"' in source, (job.name, option)

    def test_a_failure_takes_nothing_with_it(self, tmp_path: Path):
        """One script that works, into a folder of its own, and one that fails."""
        code = (
            "from benchmarks.run import suite\n"
            "bad, good = suite.Job('bad', '--no-such', None, 'nra'), suite.Job('good', '--help', None, 'nra')\n"
            "suite.JOBS = [bad, good]\n"
            "suite.main()\n"
        )
        command = [sys.executable, "-c", code, "--results", str(tmp_path / "out"), "--data", str(tmp_path)]
        before = {path.name: path.read_bytes() for path in RESULTS.iterdir()}
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert found.returncode == 1
        assert "bad: failed with exit code 2" in found.stdout
        assert "good: done" in found.stdout
        assert (tmp_path / "out" / "README.md").read_text().startswith("# Benchmark results")
        assert {path.name: path.read_bytes() for path in RESULTS.iterdir()} == before
