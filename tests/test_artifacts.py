"""Schemas of files: every wrong entry is named with what it is and what it must be, before anything is read."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from captum_concepts._artifacts import (
    Array,
    anything,
    check_json,
    either,
    flag,
    integer,
    list_of,
    mapping_of,
    nothing_or,
    number,
    open_artifact,
    read_json,
    save_artifact,
    table,
    text,
    write_atomically,
)
from captum_concepts.errors import LONGEST_MESSAGE, ArtifactError, InputError, InputWarning

GOOD_AND_BAD = [
    (integer(1, 5), [1, 5], [0, 6, 2.0, True, "1", None, [1], 2**80]),
    (number(-1), [0, -1, 1.5, 2**60], [-1.5, math.nan, math.inf, True, "1", None, 10**400]),
    (text(longest=3), ["", "abc"], ["abcd", 1, None, ["a"], {}]),
    (text("a", "b"), ["a"], ["c", 1, None, ["a"]]),
    (text(pattern="[a-z]+"), ["abc"], ["", "../x", "A", 3]),
    (flag, [True, False], [0, 1, None, "true"]),
    (nothing_or(integer()), [None, 3], [-1, "x"]),
    (either(flag, text("auto")), [True, "auto"], ["x", 1, None]),
    (list_of(integer(), most=2), [[], [1, 2]], [[1, 2, 3], [-1], (1,), {"0": 1}, "ab", None]),
    (list_of(integer(), length=2), [[1, 2]], [[1], []]),
    (table({"a": integer()}, {"b": flag}), [{"a": 1}, {"a": 1, "b": True}], [{}, {"a": 1, "c": 2}, {"b": True}, [], 1]),
    (mapping_of(integer(), most=1), [{}, {"x": 1}], [{"x": "1"}, {"x": 1, "y": 2}, [], None]),
    (anything, [{"a": [[1]]}, None, 1.5], [json.loads("[" * 60 + "]" * 60)]),
]


@pytest.mark.parametrize(("check", "good", "bad"), GOOD_AND_BAD, ids=range(len(GOOD_AND_BAD)))
def test_checks(check, good, bad):
    for value in good:
        assert check_json(value, check, "x") == value
    for value in bad:
        with pytest.raises(ArtifactError, match=r"^x is damaged or foreign: ") as caught:
            check_json(value, check, "x")
        assert len(str(caught.value)) <= LONGEST_MESSAGE


def test_the_wrong_entry_is_named():
    schema = table({"layers": list_of(table({"name": text(), "size": integer(1)}))})
    with pytest.raises(ArtifactError, match=r"'layers\[1\].size' is 0; it must be a whole number from 1"):
        check_json({"layers": [{"name": "a", "size": 1}, {"name": "b", "size": 0}]}, schema, "x")
    with pytest.raises(ArtifactError, match=r"key 'size'. It has 'sise'"):
        check_json({"layers": [{"name": "a", "sise": 1}]}, schema, "x")
    with pytest.raises(ArtifactError, match=r"'sizes'.* Did you mean 'size'"):
        check_json({"layers": [{"name": "a", "size": 1, "sizes": 1}]}, schema, "x")


def test_a_json_file(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(FileNotFoundError, match="should be a manifest"):
        read_json(path, anything, "a manifest")
    path.write_text('\ufeff{"a": 1}')
    assert read_json(path, table({"a": integer()}), "a manifest") == {"a": 1}
    for content in (b"\xff\xfe{}", b"{", b"[" * 100_000, b'{"a": NaN}', b'{"a": 1' + b"0" * 5000 + b"}"):
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match=r"a\.json"):
            read_json(path, table({"a": integer()}), "a manifest")


def test_tensors_are_compared_with_the_header(tmp_path):
    path = tmp_path / "a.safetensors"
    arrays = {
        "scores": Array("float", ("N", "T")),
        "maps": Array("float", ("N", "T", ...)),
        "target": Array("integer", ("N",), optional=True),
    }
    good = {"scores": torch.zeros(2, 3), "maps": torch.zeros(2, 3, 4, 4), "target": torch.zeros(2, dtype=torch.long)}

    def read(tensors):
        save_artifact(path, "k", {"names": ["a", "b", "c"]}, tensors)
        sizes = lambda info: {"T": len(info["names"])}  # noqa: E731
        with open_artifact(path, "k", "a thing", arrays=arrays, sizes=sizes) as (info, found):
            return info, found

    assert set(read(good)[1]) == set(good)
    assert set(read({k: v for k, v in good.items() if k != "target"})[1]) == {"scores", "maps"}
    for change, message in (
        ({"scores": torch.zeros(2, 4)}, r"'scores' is F32 \[2, 4\]; it must be float \[2, 3\]"),
        ({"scores": torch.zeros(6)}, r"'scores' is F32 \[6\]"),
        ({"maps": torch.zeros(3, 3, 4, 4)}, r"'maps' is F32 \[3, 3, 4, 4\]; it must be float \[2, 3, \.\.\.\]"),
        ({"target": torch.zeros(2)}, r"'target' is F32 .*must be integer"),
        ({"other": torch.zeros(1)}, "unexpected tensors 'other'"),
    ):
        with pytest.raises(ArtifactError, match=message):
            read({**good, **change})
    with pytest.raises(ArtifactError, match="'maps' is missing"):
        read({"scores": good["scores"]})


def test_an_older_format_is_read_through_its_table_of_keys(tmp_path):
    path = tmp_path / "a.safetensors"
    save_artifact(path, "k/1", {"classes": ["a"]}, {"contribution": torch.ones(1)})
    kinds = {"k/2": {}, "k/1": {"classes": "class_names", "contribution": "contributions"}}
    schema = {"info": table({"class_names": list_of(text())}), "arrays": {"contributions": Array("float", (1,))}}
    with open_artifact(path, kinds, "a thing", **schema) as (info, tensors):
        assert info == {"class_names": ["a"]}
        assert torch.equal(tensors["contributions"], torch.ones(1))
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(ArtifactError, match=r"format 'none', not 'k/2' or 'k/1'"), open_artifact(path, kinds, "it"):
        pass


@pytest.mark.parametrize("kind", [InputError, ArtifactError, InputWarning])
def test_long_messages_keep_their_start_and_end(kind):
    message = str(kind("start " + "x, " * 10_000 + "end"))
    assert len(message) <= LONGEST_MESSAGE
    assert message.startswith("start x")
    assert message.endswith("x, end")
    assert str(kind("short")) == "short"


def test_an_error_names_the_file_that_was_asked_for(tmp_path):
    path = tmp_path / "missing" / "a.json"
    with pytest.raises(FileNotFoundError) as caught:
        write_atomically(path, "{}")
    assert caught.value.filename == str(path)


def test_the_same_content_gives_the_same_bytes(tmp_path):
    info, tensors = {"name": "é \N{PILE OF POO}", "n": 3}, {"b": torch.arange(3), "a": torch.rand(2, 2)}
    written = {save_artifact(tmp_path / f"{k}.safetensors", "kind/1", info, tensors).read_bytes() for k in range(12)}
    assert len(written) == 1
    with open_artifact(tmp_path / "0.safetensors", "kind/1", "a thing") as (read, found):
        assert read == info
        assert torch.equal(found["a"], tensors["a"])


def test_a_home_folder_is_not_expanded_silently(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="not expanded"):
        write_atomically("~/a.json", "{}")
    assert list(tmp_path.iterdir()) == []
    assert write_atomically("~a.json", "{}").exists()


def test_a_write_protected_file_is_not_replaced(tmp_path, monkeypatch):
    path = write_atomically(tmp_path / "a.json", "old")
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write everything
    with pytest.raises(PermissionError, match="write-protected"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
