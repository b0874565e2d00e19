"""Concept lists: files, cleaning, LF-CBM's filters against its published loops, language models, reports."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from captum_concepts.concepts import (
    PROMPTS,
    ConceptGenerator,
    Drop,
    TextSimilarity,
    Vocabulary,
    VocabularyReport,
    drop_absent,
    drop_class_names,
    drop_similar,
    drop_similar_to_classes,
    drop_too_long,
    embed_texts,
    generate_concepts,
    parse_list,
)
from captum_concepts.concepts._words import key, singular, strip_article, tidy
from captum_concepts.errors import ArtifactError, InputError, InputWarning


class Words:
    """An encoder with a fixed vocabulary of vectors."""

    def __init__(self, vectors):
        self.vectors = {name: torch.tensor(v, dtype=torch.float32) for name, v in vectors.items()}

    def encode_text(self, texts):
        return torch.stack([self.vectors[text] for text in texts])


def random_words(n, seed, dim=4):
    g = torch.Generator().manual_seed(seed)
    return Words({f"word {i}": torch.randn(dim, generator=g).abs().tolist() for i in range(n)})


class TestFiles:
    def test_text(self, tmp_path):
        file = tmp_path / "list.txt"
        file.write_text("\ufeffa beak\r\n\n# a comment\n  four legs \na beak\n", encoding="utf-8")
        assert list(Vocabulary.load(file)) == ["a beak", "four legs", "a beak"]

    def test_json_list_and_the_dictionaries_of_lf_cbm(self, tmp_path):
        (tmp_path / "a.json").write_text(json.dumps(["x", "y"]))
        assert list(Vocabulary.load(tmp_path / "a.json")) == ["x", "y"]
        (tmp_path / "important.json").write_text(json.dumps({"bird": ["a beak", "wings"], "plane": ["wings"]}))
        (tmp_path / "around.json").write_text(json.dumps({"bird": ["a nest"]}))
        loaded = Vocabulary.load(tmp_path / "important.json", tmp_path / "around.json")
        assert list(loaded) == ["a beak", "wings", "wings", "a nest"]
        assert loaded.sources == {"a beak": ("bird",), "wings": ("bird", "plane"), "a nest": ("bird",)}

    @pytest.mark.parametrize("name", ["list.txt", "list.json"])
    def test_save_and_load(self, tmp_path, name):
        vocabulary = Vocabulary(["Wings", "wing", "né"], templates="a {}", sources={"né": ["x"]}).clean()
        vocabulary.save(tmp_path / name)
        again = Vocabulary.load(tmp_path / name)
        assert list(again) == ["Wings", "né"]
        if name.endswith("json"):
            assert again.as_dict() == vocabulary.as_dict()
        assert [f.name for f in tmp_path.iterdir()] == [name]

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("a.json", b"{"),
            ("a.json", b"3"),
            ("a.json", b'{"bird": "wings"}'),
            ("a.json", b"[1, 2]"),
            ("a.json", b'{"concepts": ["x"], "report": 3}'),
            ("a.json", json.dumps({**Vocabulary(["x"]).as_dict(), "templates": ["none"]}).encode()),
            ("a.json", json.dumps({**Vocabulary(["x"]).as_dict(), "sources": {"x": "y"}}).encode()),
            ("a.json", json.dumps({**Vocabulary(["x"]).as_dict(), "concepts": "x"}).encode()),
            ("a.txt", b"\xff\xfe\x00"),
        ],
    )
    def test_broken_files(self, tmp_path, name, content):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ArtifactError, match="a\\."):
            Vocabulary.load(tmp_path / name)

    def test_missing_and_unknown(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            Vocabulary.load(tmp_path / "none.txt")
        with pytest.raises(InputError):
            Vocabulary.load()
        with pytest.raises(InputError, match=r"\.txt or \.json"):
            Vocabulary(["a"]).save(tmp_path / "a.csv")
        for concept in ("a\nb", "a\rb", "#hashtag", " a", "a "):
            with pytest.raises(InputError, match="cannot be saved in a text file"):
                Vocabulary(["b", concept]).save(tmp_path / "a.txt")
            Vocabulary(["b", concept]).save(tmp_path / "a.json")
            assert list(Vocabulary.load(tmp_path / "a.json")) == ["b", concept]


class TestTemplates:
    def test_classes(self):
        vocabulary = Vocabulary.from_classes(["zebra", "tench"])
        assert list(vocabulary) == ["An image of a zebra", "An image of a tench"]
        assert vocabulary.sources["An image of a tench"] == ("tench",)
        assert list(Vocabulary.from_classes(["zebra"], "{} in the wild")) == ["zebra in the wild"]

    def test_embeddings_are_the_normalised_mean_over_templates(self):
        encoder = Words({"a x": [3, 0], "the x": [0, 5], "a y": [1, 1], "the y": [2, 2]})
        found = Vocabulary(["x", "y"], templates=["a {}", "the {concept}"]).encode(encoder)
        assert torch.allclose(found, torch.full((2, 2), 0.5**0.5))
        plain = Vocabulary(["a x"]).encode(encoder)
        assert torch.equal(plain, torch.tensor([[1.0, 0.0]]))

    def test_braces_in_a_concept_are_text(self):
        assert Vocabulary(["{}"], templates="a {}")._texts("{}") == ["a {}"]
        assert list(Vocabulary.from_classes(["{class}"])) == ["An image of a {class}"]

    @pytest.mark.parametrize("template", ["a photo", 3])
    def test_wrong(self, template):
        with pytest.raises(InputError, match="place"):
            Vocabulary(["x"], templates=[template])
        with pytest.raises(InputError, match="place"):
            Vocabulary.from_classes(["x"], template)


PLURALS = (
    "men man, women woman, people person, children child, feet foot, teeth tooth, geese goose, mice mouse, "
    "leaves leaf, knives knife, wolves wolf, shelves shelf, halves half, calves calf, loaves loaf, scarves "
    "scarf, hooves hoof, lives life, wives wife, oxen ox, cacti cactus, fungi fungus, classes class, foxes "
    "fox, beaches beach, dishes dish, buzzes buzz, berries berry, flies fly, eyes eye, horns horn, bees bee"
)
NO_PLURALS = (
    "bus gas lens series species canvas octopus cactus iris trousers scissors glasses pants jeans shorts "
    "pyjamas pajamas tennis pancreas atlas christmas glass virus basis ties yes"
)


class TestCleaning:
    @pytest.mark.parametrize(
        ("raw", "expected"),
        [
            ("  a   long\ttail ", "a long tail"),
            ("- a beak", "a beak"),
            ("* 'a beak'.", "a beak"),
            ("12) a beak;", "a beak"),
            ("1.5 m long", "1.5 m long"),
            ("“red-brown coat”", "red-brown coat"),
            ("cafe\u0301", "café"),
            (" - ", ""),
        ],
    )
    def test_writing(self, raw, expected):
        assert tidy(raw) == expected

    def test_articles(self):
        texts = ("a wing", "An ear", "the wing", "theory", "ant", "a")
        assert [strip_article(text) for text in texts] == ["wing", "ear", "wing", "theory", "ant", "a"]

    @pytest.mark.parametrize(
        ("first", "second"),
        [
            ("a wing", "Wings"),
            ("the bird-feeder", "bird feeders"),
            ("berries", "a berry"),
            ("boxes", "box"),
            ("two feet", "two foot"),
        ],
    )
    def test_near_duplicates(self, first, second):
        assert key(first) == key(second)
        kept = Vocabulary([first, second]).clean()
        assert list(kept) == [first]
        assert kept.report.drops == (Drop(second, "duplicate", other=first),)
        assert list(Vocabulary([first, second]).clean(near_duplicates=False)) == [first, second]

    @pytest.mark.parametrize("pair", PLURALS.split(", "))
    def test_plurals(self, pair):
        many, one = pair.split()
        assert singular(many) == one
        assert singular(one) == one
        assert key(f"two {many}") == key(f"two {one}") != key(one)

    @pytest.mark.parametrize("word", NO_PLURALS.split())
    def test_words_that_are_no_plurals(self, word):
        expected = {"ties": "tie", "yes": "yes"}.get(word, word)
        assert singular(word) == expected

    @pytest.mark.parametrize(
        ("first", "second"),
        [("glass", "glas plate"), ("a bus", "a bush"), ("wings", "two wings"), ("an ear", "a tear"), ("lens", "len")],
    )
    def test_other_words_stay(self, first, second):
        assert len(Vocabulary([first, second]).clean()) == 2

    def test_sources_of_duplicates_are_joined(self):
        vocabulary = Vocabulary(["- wings", "a wing", "x"], sources={"- wings": ["bird"], "a wing": ["plane"]}).clean()
        assert list(vocabulary) == ["wings", "x"]
        assert vocabulary.sources == {"wings": ("bird", "plane")}

    def test_case(self):
        assert list(Vocabulary(["A Hunter", "a hunter"]).clean(near_duplicates=False)) == ["A Hunter"]
        assert list(Vocabulary(["A Hunter"]).clean(lowercase=True)) == ["a hunter"]


def published_class_filter(concepts, classes, cutoff, products):
    """LF-CBM's loops (without its i != j slip), on a matrix of products."""
    gone = []
    for i in range(len(classes)):
        for j in range(len(concepts)):
            if products[i, j] >= cutoff and j not in gone:
                gone.append(j)
    return [c for j, c in enumerate(concepts) if j not in gone]


def published_concept_filter(concepts, cutoff, products):
    gone = []
    for i in range(len(concepts)):
        for j in range(len(concepts)):
            if products[i, j] >= cutoff and i != j and i not in gone and j not in gone:
                gone.append(i if np.sum(products[i]) < np.sum(products[j]) else j)
    return [c for j, c in enumerate(concepts) if j not in gone]


class TestFilters:
    def test_the_published_limits_are_the_defaults(self):
        assert drop_too_long(["a" * 30, "b" * 31])[0] == ["a" * 30]
        assert list(Vocabulary(["a" * 30, "b" * 31]).filter()) == ["a" * 30]

        def like(value):
            return lambda first, second: torch.full((len(first), len(second)), value)

        at_class, at_concept = 0.85, 0.9
        for value, kept in ((at_class, 0), (at_class - 1e-4, 1), (at_class + 1e-4, 0)):
            assert len(drop_similar_to_classes(["x"], ["y"], like(value))[0]) == kept
        assert len(Vocabulary(["x"]).filter(["y"], like(at_class - 1e-4))) == 1
        with pytest.raises(InputError, match="similar to a class"):
            Vocabulary(["x"]).filter(["y"], like(at_class + 1e-4))
        for value, kept in ((at_concept, 1), (at_concept - 1e-4, 2), (at_concept + 1e-4, 1)):
            assert len(drop_similar(["x", "y"], like(value))[0]) == kept
            assert len(Vocabulary(["x", "y"]).filter([], like(value))) == kept
        assert len(drop_absent(["x", "y"], torch.tensor([0.25, 0.2501]))[0]) == 1
        top = torch.cat([torch.full((5, 1), 0.3), torch.zeros(5, 1)])
        assert drop_absent(["x"], top)[0] == ["x"]  # the mean of five
        assert drop_absent(["x"], top[1:])[0] == []
        more = torch.cat([top[:5], torch.zeros(5, 1)]).repeat(1, 2) * torch.tensor([1.0, 0.9])
        assert list(Vocabulary(["x", "y"]).present_in(more)) == ["x", "y"]  # .27 for the five, .225 for six
        with pytest.raises(InputError):
            Vocabulary(["x", "y"]).present_in(more, k=6)
        for options in ({"k": 0}, {"k": -1}, {"k": 1.5}, {"cutoff": float("nan")}, {"cutoff": "auto"}):
            with pytest.raises(InputError, match=next(iter(options))):
                Vocabulary(["x", "y"]).present_in(more, **options)
        with pytest.raises(InputError, match="must be a tensor"):
            Vocabulary(["x", "y"]).present_in(more.numpy())

    def test_a_limit_at_the_value_itself_drops(self):
        exact = lambda first, second: torch.full((len(first), len(second)), 0.5)  # noqa: E731
        assert drop_similar_to_classes(["x"], ["y"], exact, 0.5)[0] == []
        assert drop_similar(["x", "y"], exact, 0.5)[0] == ["x"]

    def test_length(self):
        kept, drops = drop_too_long(["a" * 30, "b" * 31], 30)
        assert kept == ["a" * 30]
        assert drops == [Drop("b" * 31, "too long", 31, 30)]

    def test_class_names(self):
        names = ["bird", "a bird", "The Bird", "BIRD", "birds", "a bird house"]
        kept, drops = drop_class_names(names, ["Bird"])
        assert kept == ["birds", "a bird house"]
        assert {drop.other for drop in drops} == {"Bird"}

    @pytest.mark.parametrize("seed", range(8))
    def test_similarity_against_the_published_loops(self, seed):
        encoder = random_words(40, seed)
        words = [f"word {i}" for i in range(40)]
        classes, concepts = words[:12], words[12:]
        measure = TextSimilarity(encoder)
        products = measure(classes, concepts).double().numpy()
        kept, drops = drop_similar_to_classes(concepts, classes, measure, 0.96)
        assert kept == published_class_filter(concepts, classes, 0.96, products)
        assert 0 < len(drops) < len(concepts)
        for drop in drops:
            row = products[:, concepts.index(drop.concept)]
            assert drop.value == pytest.approx(row.max())
            assert drop.other == classes[int(row.argmax())]
        products = measure(concepts, concepts).double().numpy()
        kept, drops = drop_similar(concepts, measure, 0.95)
        assert kept == published_concept_filter(concepts, 0.95, products)
        assert 0 < len(drops) < len(concepts)

    def test_the_more_general_concept_stays(self):
        encoder = Words({"a tail": [1, 0.1, 0], "a short tail": [1, 0.0, 0.2], "fur": [0.2, 1, 0]})
        kept, drops = drop_similar(list(encoder.vectors), TextSimilarity(encoder), 0.9)
        assert kept == ["a tail", "fur"]
        assert drops[0].concept == "a short tail"
        assert drops[0].other == "a tail"

    def test_absent_from_the_data(self):
        g = torch.Generator().manual_seed(0)
        activations = torch.rand(50, 6, generator=g) * torch.tensor([1, 0.1, 1, 0.2, 0.5, 0.25])
        concepts = list("abcdef")
        expected = [sorted(activations[:, m].tolist())[-5:] for m in range(6)]
        means = [sum(values) / 5 for values in expected]
        kept, drops = drop_absent(concepts, activations, cutoff=0.25)
        assert kept == [c for c, mean in zip(concepts, means, strict=True) if mean > 0.25]
        assert [drop.value for drop in drops] == pytest.approx([mean for mean in means if mean <= 0.25])
        assert drop_absent(concepts, torch.tensor(means))[0] == kept
        assert drop_absent(concepts, activations[:2], k=5)[0]  # fewer images than k
        expected = ([], [Drop("a", "absent from the data", 0.25, 0.25)])
        assert drop_absent(["a"], torch.tensor([0.25]), cutoff=0.25) == expected  # the limit itself goes, as published

    @pytest.mark.parametrize(
        "activations", [torch.rand(5), torch.rand(3, 5), torch.rand(0, 2), torch.tensor([0.1, float("nan")])]
    )
    def test_wrong_activations(self, activations):
        with pytest.raises(InputError, match="activations"):
            drop_absent(["a", "b"], activations)

    def test_all_of_them_with_a_report(self):
        vectors = {"bird": [1, 0, 0], "sparrow": [1, 0.1, 0], "wings": [0, 1, 0], "two wings": [0, 1, 0.1]}
        encoder = Words({**vectors, "beak": [0, 0, 1]})
        start = Vocabulary(["bird", "sparrow", "wings", "two wings", "beak", "a very long description of it all"])
        kept = start.clean().filter(["bird"], encoder)
        assert len(kept) == 2
        assert "beak" in kept
        reasons = {drop.concept: drop.reason for drop in kept.report.drops}
        assert reasons["bird"] == "class name"
        assert reasons["sparrow"] == "similar to a class"
        assert reasons["a very long description of it all"] == "too long"
        assert kept.report.counts["similar to a concept"] == 1
        assert kept.report.kept == len(kept)
        kept = kept.present_in(torch.tensor([[0.9, 0.1], [0.8, 0.1]]))
        assert kept.report.counts["absent from the data"] == 1
        text = str(kept.report)
        assert "1 of 6 concepts kept" in text
        assert "limit 30" in text
        assert len(text.splitlines()) == 6
        assert VocabularyReport.from_dict(json.loads(json.dumps(kept.report.as_dict()))) == kept.report

    def test_nothing_left(self):
        with pytest.raises(InputError, match=r"no concept is left: 0 of 2.*2 too long"):
            Vocabulary(["abc", "abd"]).filter(max_length=2)
        with pytest.raises(InputError, match="no concept is left"):
            Vocabulary([]).encode(random_words(1, 0))

    def test_later_steps_add_their_reasons(self):
        kept = Vocabulary(["a", "b"]).without([Drop("b", "not interpretable", 0.2, 0.45)])
        assert list(kept) == ["a"]
        assert kept.report.counts == {"not interpretable": 1}
        with pytest.raises(InputError, match="no concept 'c'"):
            kept.without([Drop("c", "x")])


class TestSimilarity:
    def test_weights(self):
        one, two = random_words(5, 0), random_words(5, 1)
        words = [f"word {i}" for i in range(5)]
        a, b = (F.normalize(e.encode_text(words), dim=1) for e in (one, two))
        found = TextSimilarity([one, two.encode_text], [3, 1])(words, words)
        assert torch.allclose(found, (3 * a @ a.T + b @ b.T) / 4, atol=1e-6)
        for weights in ([1], [0, 0], [-1, 2]):
            with pytest.raises(InputError, match="weights"):
                TextSimilarity([one, two], weights)

    def test_words_without_an_embedding_are_named(self):
        encoder = Words({"x": [1, 0], "y": [0, 1]})
        vocabulary = Vocabulary(["x", "quux", "y"])
        with pytest.raises(InputError, match=r"no embedding for .'quux'."):
            vocabulary.encode(encoder)
        kept = vocabulary.known_to(encoder)
        assert list(kept) == ["x", "y"]
        assert kept.report.drops == (Drop("quux", "no text embedding"),)

    def test_different_words_with_one_embedding_are_refused(self):
        encoder = Words({"x": [1, 0], "X": [1, 0], " x ": [1, 0], "y": [0, 1], "z": [0, 1]})
        assert Vocabulary(["x", "X", " x ", "y"]).encode(encoder).shape == (4, 2)
        with pytest.raises(InputError, match="the same embedding for 'y' and 'z'"):
            Vocabulary(["x", "y", "z"]).encode(encoder)
        with pytest.raises(InputError, match="the same embedding for 'y' and 'z'"):
            embed_texts(encoder, ["y", "z"])
        assert TextSimilarity(encoder)(["y"], ["z", "y"]).tolist() == [[1.0, 1.0]]  # a filter drops one of them
        assert embed_texts(encoder, ["y", "z"], distinct=False).shape == (2, 2)
        for texts in ([], "x", [1], [None]):
            with pytest.raises(InputError, match="texts"):
                embed_texts(encoder, texts)

    def test_wrong_encoders(self):
        with pytest.raises(InputError, match="encode_text"):
            Vocabulary(["x"]).encode(object())
        with pytest.raises(InputError, match=r"\(1, D\)"):
            Vocabulary(["x"]).encode(lambda texts: torch.zeros(3))
        with pytest.raises(InputError, match="NaN"):
            Vocabulary(["x"]).encode(lambda texts: torch.full((1, 2), float("nan")))
        with pytest.raises(InputError, match=r"\(1, 1\)"):
            Vocabulary(["x"]).filter(["y"], lambda a, b: torch.zeros(5, 5))


class TestVocabulary:
    def test_texts_and_nothing_else(self):
        with pytest.raises(InputError, match="concepts must be strings, got 3"):
            Vocabulary(["sky", 3, "sea"])
        for classes in ("zebra", 3, ["zebra", 3]):
            with pytest.raises(InputError, match="classes must be a list of names, got "):
                Vocabulary.from_classes(classes)

    def test_a_sequence(self):
        vocabulary = Vocabulary(["red", "blue"])
        assert (len(vocabulary), vocabulary[1], "red" in vocabulary, vocabulary.index("blue")) == (2, "blue", True, 1)
        with pytest.raises(InputError, match="Did you mean 'blue'"):
            vocabulary.index("bleu")
        assert "2 of 2" in repr(vocabulary)

    @pytest.mark.parametrize("concepts", ["red", ["red", 3]])
    def test_wrong_concepts(self, concepts):
        with pytest.raises(InputError, match="string"):
            Vocabulary(concepts)
        with pytest.raises(InputError, match="list of names"):
            Vocabulary(["x"]).filter("bird")


class TestGenerator:
    def test_the_papers_questions(self):
        asked = []

        def model(prompt):
            asked.append(prompt)
            return "- wings\n- a nest"

        assert isinstance(model, ConceptGenerator)
        vocabulary = generate_concepts(["bird", "plane"], model)
        assert asked[:3] == [
            "List the most important features for recognizing something as a bird",
            "List the things most commonly seen around a bird",
            "Give superclasses for the word bird",
        ]
        assert len(asked) == 6
        assert list(vocabulary) == ["wings", "a nest"]
        assert vocabulary.sources["wings"] == ("bird", "plane")

    def test_an_interrupted_run_goes_on(self, tmp_path):
        cache, rng, asked = tmp_path / "answers.json", random.Random(0), []

        def model(prompt, limit=None):
            if limit is not None and len(asked) == limit:
                raise ConnectionError
            asked.append(prompt)
            return f"- concept {rng.random():.3f}"

        with pytest.raises(ConnectionError):
            generate_concepts(["a", "b"], lambda p: model(p, 5), repeats=2, cache=cache)
        first = generate_concepts(["a", "b"], model, repeats=2, cache=cache, show_progress=True)
        assert len(asked) == 2 * 2 * len(PROMPTS)
        assert list(generate_concepts(["a", "b"], model, repeats=2, cache=cache)) == list(first)
        assert len(asked) == 2 * 2 * len(PROMPTS)

    def test_more_answers_than_asked_for(self, tmp_path):
        """A cache of more repeats: the first ones count, and nothing is asked again."""
        cache = tmp_path / "answers.json"
        numbers = iter(range(100))
        generate_concepts(["a"], lambda p: f"- concept {next(numbers)}", repeats=3, cache=cache)
        again = generate_concepts(["a"], lambda p: pytest.fail("asked again"), repeats=2, cache=cache)
        assert list(again) == [f"concept {i}" for i in (0, 1, 3, 4, 6, 7)]
        assert again.sources["concept 3"] == ("a",)

    @pytest.mark.parametrize(
        ("answer", "expected"),
        [
            ("1. a beak\n2. wings\n", ["a beak", "wings"]),
            ("Sure! Features:\n\n* **a beak**\n* wings.\n\nAnything else?", ["a beak", "wings"]),
            ("a beak\nwings", ["a beak", "wings"]),
            ("Superclasses:\nanimal\nanimal", ["animal"]),
            ("animal, bird", ["animal", "bird"]),
            ("", []),
        ],
    )
    def test_lists(self, answer, expected):
        assert parse_list(answer) == expected

    def test_bad_answers_and_arguments(self, tmp_path):
        with pytest.warns(InputWarning, match="contains no concept"):
            generate_concepts(["a"], lambda p: "" if "Give" in p else "- x")
        with pytest.raises(InputError, match="must return text"):
            generate_concepts(["a"], lambda p: None)
        with pytest.raises(InputError, match="class"):
            generate_concepts("bird", lambda p: "- x")
        with pytest.raises(InputError, match="no place"):
            generate_concepts(["a"], lambda p: "- x", prompts={"mine": "tell me"})
        with pytest.raises(InputError, match="repeats"):
            generate_concepts(["a"], lambda p: "- x", repeats=1.5)
        for content in ("{", "[]", '{"a": "b"}'):
            (tmp_path / "cache.json").write_text(content)
            with pytest.raises(ArtifactError, match=r"cache\.json"):
                generate_concepts(["a"], lambda p: "- x", cache=tmp_path / "cache.json")


def test_real_words_of_a_real_encoder(shared_data, monkeypatch):
    """ConSE knows 1,203 names: its vectors are CLIP's, so plainly alike words must be found."""
    monkeypatch.syspath_prepend(str(shared_data))
    from real_models import ConSE

    encoder = ConSE(classifier=torch.nn.Identity())
    vocabulary = Vocabulary(encoder.names[:300]).clean().filter(["dog", "airplane"], encoder, class_cutoff=0.6)
    assert 0 < len(vocabulary) < 300
    assert {"airplane"} & {drop.concept for drop in vocabulary.report.drops}
    assert vocabulary.encode(encoder).shape == (len(vocabulary), 512)
    with pytest.raises(InputError, match="flumox"):
        Vocabulary(["banana", "flumox"]).encode(encoder)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "cp1252", "utf-16"])
def test_files_in_the_encodings_that_editors_write(tmp_path, encoding):
    (tmp_path / "words.txt").write_bytes("# mine\r\ncafé\r\nzebra stripes\r\n".encode(encoding))
    (tmp_path / "words.json").write_bytes('["café"]'.encode(encoding))
    assert list(Vocabulary.load(tmp_path / "words.txt", tmp_path / "words.json")) == ["café", "zebra stripes", "café"]
