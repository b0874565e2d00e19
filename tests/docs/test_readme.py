"""The README is true: its code runs as printed, and its links lead somewhere (its table: test_benchmark_page.py)."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_code_block_runs_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 4
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    written = {
        "explanation.png",
        "explanation.safetensors",
        "report.html",
        "explorer.html",
        "words.safetensors",
        "store",
        "salf",
    }
    assert {p.name for p in tmp_path.iterdir()} == written
    assert namespace["maps"].shape == (6, 1, 7, 7)
    assert namespace["sensitivity"].shape == (4, 1, 16, 16)
    assert namespace["after"].shape == (1, 6)
    assert not namespace["after"].equal(namespace["before"])


def test_the_first_lines_are_the_two_commands():
    assert README.splitlines()[2].split()[:2] == ["make", "demo"]
    assert README.splitlines()[3].split()[:2] == ["make", "test"]


def test_every_linked_file_exists():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).is_file()
