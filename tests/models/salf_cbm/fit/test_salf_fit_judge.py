"""Whether words fit the images is said early, and how far rules can be believed at the end."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from salf_tiny import PROMPT, WORDS, Colours, fit, images_and_labels

from captum_concepts.concepts import Vocabulary
from captum_concepts.errors import InputError, InputWarning
from captum_concepts.models.cubic_similarity import cubic_similarity
from captum_concepts.models.salf_cbm.fit import fit_head, judge
from captum_concepts.models.salf_cbm.fit.judge import EVERYDAY, check_words, everyday_texts, first_images
from captum_concepts.models.salf_cbm.presence import Reliability, trust_line
from captum_concepts.store import RegionEmbeddingStore
from captum_concepts.vlm.dense import AdaptiveRegions


class Everything(Colours):
    """Knows every word: five are colors; the images show a little of all others but those that begin with "no"."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def encode_image(self, images):
        self.seen += len(images)
        return F.pad(super().encode_image(images), (0, 40))

    def encode_text(self, texts):
        rows = []
        for text in texts:
            own = F.normalize(
                torch.randn(40, generator=torch.Generator().manual_seed(int(text.encode().hex(), 36) % 2**31)), dim=0
            )
            shown = torch.zeros(6) if text.startswith("no") else 0.5 * F.one_hot(torch.tensor(5), 6)
            if text in WORDS:
                own, shown = 0 * own, F.one_hot(torch.tensor(WORDS.index(text)), 6)
            rows.append(torch.cat([shown, own]))
        return torch.stack(rows)


def test_words_that_do_not_fit_are_refused_after_a_few_images(tmp_path):
    encoder, words = Everything(), [f"no {i:02d}" for i in range(24)]
    x, y = images_and_labels(400)
    with pytest.raises(
        InputError, match="the concepts do not match the images: on 40 of them the best quarter of the 24"
    ):
        fit(tmp_path, (x, y), words=words, encoder=encoder, presence_cutoff="auto")
    assert encoder.seen <= 40 + 8  # and what recognises the encoder
    with pytest.raises(InputError, match="no concept is left"):
        fit(tmp_path / "number", (x, y), words=words, encoder=encoder, presence_cutoff=0.9)
    assert encoder.seen <= 2 * (40 + 8)


def test_words_that_fit_are_kept(tmp_path, caplog):
    words = [*WORDS, *(f"no {i:02d}" for i in range(19))]
    with caplog.at_level(logging.INFO, logger="captum_concepts"):
        model = fit(tmp_path, words=words, encoder=Everything(), presence_cutoff="auto")
    assert "on 40 images: most present" in caplog.text
    assert "similarity of the best quarter of the words" in caplog.text
    assert "regions-train: 4 passes of the encoder for each image" in caplog.text
    assert set(model.concepts) == set(WORDS)


def test_without_everyday_words_the_published_cutoff(tmp_path):
    """An encoder of five words only."""
    with pytest.warns(InputWarning, match=r"knows fewer than 20 .* 0\.25 is used"):
        model = fit(tmp_path, presence_cutoff="auto")
    assert model.concepts == WORDS
    assert everyday_texts(Vocabulary(WORDS), Colours()) is None


def test_everyday_words_are_not_the_concepts():
    assert len(EVERYDAY) == len(set(EVERYDAY)) >= 64
    known = everyday_texts(Vocabulary(["Apple", "dog", "red"]), Everything())
    assert known is not None
    assert len(known) == len(EVERYDAY) - 2


def test_first_images():
    assert first_images(60) == []
    assert len(first_images(96)) == len(first_images(800)) == 40
    assert len(first_images(2000)) == 100
    assert len(first_images(10**6)) == 256
    assert first_images(800)[:3] == [0, 20, 40]


def test_few_words_are_not_compared_as_a_group():
    said = check_words(Vocabulary(["a", "b"]), torch.tensor([0.1, 0.2]), torch.ones(64), 40)
    assert said == "words, on 40 images: most present b 0.2, a 0.1"


def test_a_budget_of_regions(tmp_path):
    model = fit(tmp_path, regions_per_image=2, interpretability_cutoff=0.1)
    assert model.metadata["prompt"] == AdaptiveRegions(PROMPT, 2).as_dict()
    with pytest.raises(InputError, match="regions_per_image must be an integer of at least 1 and at most 4"):
        fit(tmp_path / "more", regions_per_image=5)


def test_the_similarity_of_activations_is_that_of_the_maps_means(tmp_path):
    x, y = images_and_labels()
    held_out = images_and_labels(60, seed=5)
    model = fit(tmp_path, (x, y), val_data=held_out)
    store = RegionEmbeddingStore.open(tmp_path / "regions-val")
    seen = store.similarity(Colours().encode_text(WORDS)).tensor().mean((2, 3))
    found = model.concept_maps(held_out[0]).mean((2, 3))
    expected = cubic_similarity(found, seen)
    pooled = torch.tensor(list(model.metadata["pooled_similarity"].values()))
    torch.testing.assert_close(pooled, expected, rtol=0, atol=2e-2)


def test_reliability_and_support(tmp_path):
    """The encoder sees red in images of the class that red decides; not in those of a class that is drawn by lot."""
    x, y = images_and_labels(240)
    model = fit(tmp_path, (x, y))
    assert model.metadata["support"]["rules"] == model.metadata["support"]["supported"] + len(
        model.metadata["support"]["doubtful"]
    )
    assert "on 24 held-out images" in model.trust
    assert f"supports {model.metadata['support']['supported']} of the" in repr(model)
    assert "supports" not in model.without(model.concepts[0]).trust  # these are other rules
    model.metadata["support"] = "foreign"
    assert "supports" not in model.trust
    lots = torch.randint(0, 3, (240,), generator=torch.Generator().manual_seed(1))
    worse = fit(tmp_path, (x, lots), lam=1e-3)
    assert worse.metadata["support"]["supported"] < worse.metadata["support"]["rules"]
    found = [value for _, _, value in worse.metadata["support"]["doubtful"]]
    assert found == sorted(found)
    assert len(found) > 1
    assert worse.trust.startswith("low: ")
    assert "Add concepts that describe these classes" in " ".join(worse.metadata["advice"])


@pytest.mark.parametrize(
    ("supported", "grade"), [(40, "high"), (30, "high"), (29, "medium"), (20, "medium"), (19, "low")]
)
def test_trust_is_no_higher_than_the_rules_deserve(supported, grade):
    """Concepts that follow the encoder well can still be given to classes that do not show them."""
    reliability = {"a": Reliability(0.95, 0.9, 1.0, 10, 40)}
    line = trust_line(reliability, {"support": {"rules": 40, "supported": supported, "doubtful": []}})
    assert line.startswith(f"{grade}: on 40 held-out images")
    assert f"supports {supported} of the 40 strongest rules" in line


def test_support_by_hand(tmp_path):
    x, y = images_and_labels(240)
    model = fit(tmp_path, (x, y), lam=1e-3)
    store = RegionEmbeddingStore.open(tmp_path / "regions-train")
    seen = store.similarity(Colours().encode_text(WORDS)).tensor().mean((2, 3))
    doubtful = []
    for k in range(3):
        for name, _ in [rule for rule in model.decision_rules(k) if rule[1] > 0][:3]:
            inside, outside = (seen[own, WORDS.index(name)] for own in (y == k, y != k))
            found = (inside[:, None] > outside).float().mean() + 0.5 * (inside[:, None] == outside).float().mean()
            if found < 0.6:
                doubtful.append([f"class {k}", name, float(found)])
    assert sorted(rule[:2] for rule in model.metadata["support"]["doubtful"]) == sorted(rule[:2] for rule in doubtful)


def test_separated_classes_take_no_more_weights_than_they_need():
    """Three features say the class; the others are noise, of which a path to the end would take some."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    signal = F.one_hot(labels, 3) + 0.2 * torch.rand(90, 3, generator=generator)
    c = torch.cat([signal, torch.rand(90, 37, generator=generator)], 1).double()
    found = fit_head(c, labels, 3)
    logits = (c - found.mean) / found.std @ found.weight.double().T + found.bias
    assert bool((logits.argmax(1) == labels).all())
    assert found.notes["nonzeros_per_class"] <= 1.5
    assert float(found.weight.abs().max()) < 5


def test_advice():
    metadata = {
        "pooled_similarity": {"a": 0.2, "b": 0.4}, "unreached_cutoff": None,
        "support": {"rules": 3, "supported": 2, "doubtful": [["cat", "car", 0.4]]},
    }  # fmt: skip
    loose, doubtful = judge.advice(metadata)
    assert loose.startswith("Validation similarity averages 0.30")
    assert "1 of the 3 strongest rules" in doubtful
    assert "cat: car (0.40)" in doubtful
