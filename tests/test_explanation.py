"""ConceptExplanation: invariants, selection, files, and how it prints."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from captum_concepts import ConceptExplanation
from captum_concepts.errors import ArtifactError, InputError
from captum_concepts.explanation import ConceptExplainer, Selection

N, T = 3, 4
NAMES = ["a", "b", "c", "d"]


def make(**changes) -> ConceptExplanation:
    generator = torch.Generator().manual_seed(0)
    values = {
        "concepts": NAMES,
        "scores": torch.rand(N, T, generator=generator),
        "maps": torch.rand(N, T, 2, 5, generator=generator),
        "contributions": torch.randn(N, T, generator=generator),
        "target": torch.tensor([2, 0, 1]),
        "layer": "layer4",
        "method": "test",
    }
    return ConceptExplanation(**{**values, **changes})


def assert_equal(a: ConceptExplanation, b: ConceptExplanation) -> None:
    assert (a.concepts, a.layer, a.method) == (b.concepts, b.layer, b.method)
    for name in ("scores", "maps", "contributions", "target"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None)
        if x is not None:
            assert x.dtype == y.dtype
            assert torch.equal(x, y)


class TestInvariants:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"concepts": "abcd"}, "list of names"),
            ({"concepts": ["a", "b", "c", 4]}, "non-empty strings"),
            ({"concepts": ["a", "b", "c", ""]}, "non-empty strings"),
            ({"concepts": ["a", "b", "b", "a"]}, r"more than once: \['a', 'b'\]"),
            ({"concepts": ["a", "b", "c"]}, r"scores must be \(N, 3\)"),
            ({"scores": torch.rand(N)}, "scores must be"),
            ({"scores": [[1.0]]}, "torch.Tensor, got list"),
            ({"scores": torch.ones(N, T, dtype=torch.long)}, "floating point"),
            ({"maps": torch.rand(N, T, 2)}, r"maps must be \(3, 4, h, w\)"),
            ({"maps": torch.rand(N + 1, T, 2, 2)}, "maps must be"),
            ({"maps": torch.rand(N, T, 0, 2)}, "maps must be"),
            ({"contributions": torch.rand(N, T + 1)}, "contributions must be"),
            ({"target": torch.tensor([0, 1])}, r"target must be \(3,\)"),
            ({"target": torch.tensor([0.0, 1, 2])}, "integer"),
            ({"target": torch.tensor([True, False, True])}, "integer"),
            ({"layer": [["x"] * T] * 2}, "3 rows of 4 names"),
            ({"layer": ("abcd", "efgh", "ijkl")}, "3 rows of 4 names"),
            ({"layer": [[1] * T] * N}, "3 rows of 4 names"),
            ({"layer": None}, "3 rows of 4 names"),
            ({"method": 3}, "method must be a string"),
            ({"concepts": None}, "list of names"),
            ({"scores": torch.rand(N, T, device="meta")}, "one device"),
            ({"presence": torch.full((N, T), 1.5)}, "probabilities in"),
            ({"presence": torch.rand(N, T + 1)}, "presence must be"),
            ({"selected": torch.ones(N, T)}, "selected must be bool"),
            ({"class_names": ["x", "y"]}, "target 2 has no name"),
            ({"class_names": "xyz"}, "list of strings"),
            ({"image_names": ["x"]}, "1 image_names for 3 images"),
            ({"target_probability": torch.rand(N + 1)}, "target_probability must be"),
            ({"rank_by": "maps"}, "rank_by must be one of"),
            ({"score_unit": None}, "score_unit must be a string"),
        ],
    )
    def test_bad_values_are_refused(self, changes, message):
        with pytest.raises(InputError, match=message):
            make(**changes)

    def test_tensors_are_detached_and_the_value_is_frozen(self):
        e = make(scores=torch.rand(N, T, requires_grad=True))
        assert not e.scores.requires_grad
        with pytest.raises(AttributeError):
            e.scores = torch.zeros(1)

    def test_optional_parts_may_be_missing(self):
        e = make(contributions=None, target=None)
        assert e.top(2).contributions is None
        assert e[0].target is None


class TestSelection:
    def test_examples(self):
        e = make()
        assert torch.equal(e[1].scores, e.scores[1:2])
        assert torch.equal(e[-1].maps, e.maps[2:3])
        assert torch.equal(e[1:].target, torch.tensor([0, 1]))
        assert torch.equal(e[torch.tensor([True, False, True])].scores, e.scores[[0, 2]])
        assert torch.equal(e[[2, 0]].scores, e.scores[[2, 0]])
        assert [len(one) for one in e] == [1, 1, 1]

    def test_concepts(self):
        e = make()
        assert torch.equal(e["c"].scores, e.scores[:, 2:3])
        assert e[["d", "a"]].concepts == ["d", "a"]
        assert torch.equal(e[["d", "a"]].contributions, e.contributions[:, [3, 0]])
        assert torch.equal(e[1, "b"].maps, e.maps[1:2, 1:2])
        assert torch.equal(e[:, 1:3].scores, e.scores[:, 1:3])
        assert torch.equal(e[:, -1].scores, e.scores[:, 3:])

    def test_layers_follow(self):
        layers = [[f"{n}{t}" for t in range(T)] for n in range(N)]
        assert make(layer=layers)[2, ["d", "b"]].layer == (("23", "21"),)

    @pytest.mark.parametrize(
        ("key", "rows", "columns"),
        [
            (slice(None, None, -1), [2, 1, 0], [0, 1, 2, 3]),
            (np.array([0, 2]), [0, 2], [0, 1, 2, 3]),
            (np.int64(1), [1], [0, 1, 2, 3]),
            ([True, False, True], [0, 2], [0, 1, 2, 3]),
            ([], [], [0, 1, 2, 3]),
            ((..., 2), [0, 1, 2], [2]),
            ((0, [True, False, False, True]), [0], [0, 3]),
            ((0, torch.tensor([False, True, True, False])), [0], [1, 2]),
            ((0, torch.tensor([3, 1])), [0], [3, 1]),
            ((slice(1), np.array(["d", "a"])), [0], [3, 0]),
            ((0, slice(None, None, -2)), [0], [3, 1]),
            ((0, ["d", -4]), [0], [3, 0]),
            ((0, []), [0], []),
        ],
        ids=str,
    )
    def test_every_kind_of_index(self, key, rows, columns):
        e = make()
        assert torch.equal(e[key].maps, e.maps[rows][:, columns])
        assert e[key].concepts == [NAMES[j] for j in columns]
        assert torch.equal(e[key].target, e.target[rows])

    @pytest.mark.parametrize(
        "key",
        [7, "stripes", (0, "z"), (0, 9), (0, 1, 2), "aa", 1.5, True, None, [0.5], {"a"}, ("a", "b"), torch.tensor(1.0)]
        + [(0, 1.5), (0, True), (0, None), (0, [True, False]), [True], torch.tensor([[0, 1]]), (0, [0, None]), [3], -4]
        + [slice(0, 1, 0)],
        ids=str,
    )
    def test_what_is_not_there(self, key):
        with pytest.raises(InputError):
            make()[key]

    def test_top_selects_for_each_image(self):
        scores = torch.tensor([[0.1, 0.9, 0.3, 0.0], [0.8, 0.2, 0.3, 0.0], [0.0, 0.0, 0.3, 0.0]])
        e = make(scores=scores)
        two = e.top(2)
        assert two.concepts == ["b", "a", "c"]
        assert two.selected.tolist() == [[True, False, True], [False, True, True], [False, True, True]]
        assert [one.concepts for one in two] == [["b", "c"], ["a", "c"], ["c", "a"]]
        assert torch.equal(two.maps[:, 0, 0, 0].isnan(), torch.tensor([False, True, True]))
        assert torch.equal(two.contributions.isnan(), ~two.selected)
        assert torch.equal(two[0].maps[0, 0], e.maps[0, 1])
        assert e.top(99).concepts == ["b", "a", "c", "d"]
        assert [one.top(1).concepts for one in e] == [["b"], ["a"], ["c"]]

    def test_top_by_contribution_ignores_the_sign(self):
        how = torch.tensor([[0.1, -0.9, 0.3, 0.0]])
        assert make()[:1][0, NAMES].top(1).concepts
        e = ConceptExplanation(NAMES, torch.rand(1, T), torch.rand(1, T, 2, 2), how)
        assert e.top(2, by="contributions").concepts == ["b", "c"]

    def test_nan_ranks_last_and_ties_keep_their_order(self):
        scores = torch.tensor([[float("nan"), 0.5, 0.5, -1.0]])
        e = ConceptExplanation(NAMES, scores, torch.rand(1, T, 2, 2))
        assert e.top(4).concepts == ["b", "c", "d", "a"]
        scores = torch.tensor([[float("nan"), -torch.inf, torch.inf, -1.0]])
        assert ConceptExplanation(NAMES, scores, torch.rand(1, T, 2, 2)).top(4).concepts == ["c", "d", "b", "a"]

    def test_top_refuses(self):
        for arguments in ({"k": 0}, {"k": 1.5}, {"k": "2"}, {"k": 1, "by": "maps"}):
            with pytest.raises(InputError):
                make().top(**arguments)
        with pytest.raises(InputError, match="no contributions"):
            make(contributions=None).top(1, by="contributions")

    def test_an_image_keeps_its_own_concepts_in_the_order_of_its_ranking(self):
        own = torch.tensor([[True, False, True, False], [False, True, True, False], [True, True, False, False]])
        e = make(selected=own, rank_by="contributions", image_names=["x", "y", "z"])
        for i, one in enumerate(e):
            kept = own[i].nonzero().flatten().tolist()
            strongest = sorted(kept, key=lambda j: -abs(float(make().contributions[i, j])))
            assert one.concepts == [NAMES[j] for j in strongest]
            assert one.image_names == ["xyz"[i]]
            assert bool(one.selected.all())
        assert e[:2].concepts == ["a", "b", "c"]  # nobody selected d
        assert e[0, "b"].selected.tolist() == [[False]]
        assert bool(e[0, "b"].maps.isnan().all())

    @pytest.mark.parametrize("by", ["scores", "contributions"])
    def test_a_selection_does_not_depend_on_the_batch(self, by):
        values = torch.randn(7, 20, generator=torch.Generator().manual_seed(3))
        values[2, 4] = torch.nan
        together = Selection.of(values, 3, by)
        for i in range(7):
            alone = Selection.of(values[i : i + 1], 3, by)
            assert torch.equal(alone.index[0], together.index[i])
            assert alone.columns == alone.index[0].tolist()
        spread = together.spread(values.gather(1, together.index))
        assert torch.equal(spread.isnan(), ~together.selected)
        assert torch.equal(spread[together.selected], values[:, together.columns][together.selected])

    def test_named_concepts_are_kept_as_named(self):
        chosen = Selection.choose(NAMES, torch.rand(2, T), concepts=["c", 0], top_k=1)
        assert (chosen.columns, chosen.rank_by, bool(chosen.selected.all())) == ([2, 0], "", True)
        for bad in (["x"], [], ["a", 0], "nope"):
            with pytest.raises(InputError):
                Selection.choose(NAMES, torch.rand(2, T), concepts=bad)
        for bad_k in (0, -1, 1.5, True):
            with pytest.raises(InputError, match="top_k must be"):
                Selection.choose(NAMES, torch.rand(2, T), top_k=bad_k)
        with pytest.raises(InputError, match="rank_by must be one of"):
            Selection.choose(NAMES, torch.rand(2, T), rank_by="score")


class TestFiles:
    def test_everything_is_kept(self, tmp_path: Path):
        e = make(
            presence=torch.rand(N, T), selected=torch.rand(N, T) > 0.5, class_names=["x", "y", "z"],
            image_names=["1.png", "2.png", "3.png"], target_probability=torch.rand(N), score_unit="cosine",
            contribution_unit="logit", rank_by="scores",
        )  # fmt: skip
        again = ConceptExplanation.load(e.save(tmp_path / "e"))
        for field in dataclasses.fields(e):
            a, b = getattr(e, field.name), getattr(again, field.name)
            assert torch.equal(a.nan_to_num(7), b.nan_to_num(7)) if isinstance(a, torch.Tensor) else a == b

    def test_format_1_is_read(self, tmp_path: Path):
        e = make()
        info = json.dumps({"concepts": NAMES, "layer": "layer4", "method": "test"})
        tensors = {name: getattr(e, name) for name in ("scores", "maps", "contributions", "target")}
        metadata = {"format": "captum_concepts.ConceptExplanation/1", "info": info}
        save_file(tensors, str(tmp_path / "old"), metadata=metadata)
        assert_equal(ConceptExplanation.load(tmp_path / "old"), e)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    def test_round_trip_is_exact(self, tmp_path: Path, dtype):
        e = make(scores=torch.rand(N, T, dtype=dtype), layer=[["x"] * T] * N)
        assert_equal(ConceptExplanation.load(e.save(tmp_path / "e.safetensors")), e)
        assert [p.name for p in tmp_path.iterdir()] == ["e.safetensors"]

    def test_no_example_and_missing_parts(self, tmp_path: Path):
        e = make(contributions=None, target=None)[:0]
        assert_equal(ConceptExplanation.load(e.save(tmp_path / "e")), e)

    def test_tensors_that_share_memory(self, tmp_path: Path):
        both = torch.rand(N, T)
        for e in (make(scores=both, contributions=both), make(scores=torch.rand(1, T).expand(N, T))):
            assert_equal(ConceptExplanation.load(e.save(tmp_path / "e")), e)

    def test_a_bad_device_is_not_blamed_on_the_file(self, tmp_path: Path):
        with pytest.raises(RuntimeError) as caught:
            ConceptExplanation.load(make().save(tmp_path / "e"), device="nope")
        assert not isinstance(caught.value, ArtifactError)

    def test_a_failed_save_leaves_the_old_file_and_no_part(self, tmp_path: Path, monkeypatch):
        path = make().save(tmp_path / "e.safetensors")
        before = path.read_bytes()

        def fail(self, target):
            raise OSError("disk full")

        monkeypatch.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            make(method="other").save(path)
        assert path.read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == ["e.safetensors"]

    @pytest.mark.parametrize("cut", [0, 4, 60, 200])
    def test_truncated_files_are_refused(self, tmp_path: Path, cut: int):
        path = make().save(tmp_path / "e.safetensors")
        path.write_bytes(path.read_bytes()[:cut])
        with pytest.raises(ArtifactError, match=r"e\.safetensors"):
            ConceptExplanation.load(path)

    def test_every_single_damaged_header_byte_is_refused_or_harmless(self, tmp_path: Path):
        path = make().save(tmp_path / "e.safetensors")
        data = bytearray(path.read_bytes())
        header = 8 + int.from_bytes(data[:8], "little")
        for i in range(0, header, 7):
            damaged = bytearray(data)
            damaged[i] ^= 0x15
            path.write_bytes(damaged)
            try:
                ConceptExplanation.load(path)
            except ArtifactError:
                pass  # any other exception fails the test

    def test_foreign_files_are_refused(self, tmp_path: Path):
        save_file({"scores": torch.rand(1, 1)}, tmp_path / "f.safetensors")
        with pytest.raises(ArtifactError, match="not a saved explanation"):
            ConceptExplanation.load(tmp_path / "f.safetensors")
        with pytest.raises(FileNotFoundError):
            ConceptExplanation.load(tmp_path / "missing")


def test_a_protocol_is_not_met_by_anything():
    assert not isinstance(object(), ConceptExplainer)


class TestPrinting:
    def test_names_units_and_what_is_not_seen(self):
        e = make(
            presence=torch.tensor([[0.2, 0.9, 0.9, 0.9]]).expand(N, T), class_names=["cat", "dog", "cow"],
            target_probability=torch.tensor([0.5, 0.25, 1.0]), score_unit="probability",
        )  # fmt: skip
        text = repr(e)
        assert "scores: probability" in text
        assert "[target cow 0.5]" in text
        assert text.count("not seen") == N
        records = e.to_records()
        assert len(records) == N * T
        assert records[0]["class"] == "cow"
        assert set(records[0]) == {
            "image", "class", "class_probability", "concept", "score", "presence", "contribution", "layer"
        }  # fmt: skip

    def test_html_escapes(self):
        e = ConceptExplanation(["<b>"], torch.rand(1, 1), torch.rand(1, 1, 2, 2))
        assert "<b>" not in e._repr_html_()
        assert "&lt;b&gt;" in e._repr_html_()

    def test_repr_names_what_matters(self):
        text = repr(make())
        assert "3 images, 4 concepts, maps 2 x 5, test, layer layer4" in text
        assert "[target class 2]" in text
        assert len(repr(make(scores=torch.rand(N, T)))) < 1000

    def test_html_is_escaped(self):
        e = ConceptExplanation(["<script>"], torch.rand(1, 1), torch.rand(1, 1, 2, 2))
        assert "<script>" not in e._repr_html_()
        assert "&lt;script&gt;" in e._repr_html_()

    def test_empty(self):
        assert "0 images" in repr(make()[:0])
        assert make()[:0]._repr_html_()
