"""ConceptFusionMap.fit: learning, every kind of data, caching, bad luck, saving, several processes."""

from __future__ import annotations

import inspect
import os
import socket

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from captum_concepts.attr.concept_fusion_map import ConceptFusionMap
from captum_concepts.errors import ArtifactError, ConvergenceWarning, InputError, NotFittedError
from captum_concepts.models import ConceptTranslator
from captum_concepts.models.concept_translator.data import TrainingPairs
from captum_concepts.models.concept_translator.fit import fit_translator

WORDS = ["red", "green", "blue"]


class Color(nn.Module):
    """An image-text model of the mean colour."""

    logit_scale, logit_bias = 20.0, 0.0

    def __init__(self):
        super().__init__()
        self.calls = 0
        self.register_buffer("text", torch.eye(3))

    def encode_image(self, images):
        self.calls += 1
        return images.mean((2, 3)) - 0.3

    def encode_text(self, words):
        return self.text[[WORDS.index(w) for w in words]]


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 10, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(10, 12, 3, 2, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 4),
    )


LAYERS = ["1", "3"]
CONSTRUCTOR = inspect.signature(ConceptFusionMap).parameters


def images(n=64):
    g = torch.Generator().manual_seed(1)
    return torch.rand(n, 3, 16, 16, generator=g) * torch.rand(n, 3, 1, 1, generator=g)


def fit(data=None, **options):
    """A map with options of the constructor and of fit, fitted."""
    options = {"hidden": (32, 32), "training": {"epochs": 3, "batch_size": 16}, "crops": 0, **options}
    model, encoder = options.pop("model", None) or classifier(), options.pop("encoder", None) or Color()
    concepts = options.pop("concepts", WORDS)
    constructor = {name: options.pop(name) for name in list(options) if name in CONSTRUCTOR}
    made = ConceptFusionMap(model, LAYERS, **constructor)
    return made.fit(images() if data is None else data, encoder, concepts, **options)


def weights(cefam):
    return torch.cat([p.flatten() for p in cefam.translator.parameters()])


def test_it_learns_what_the_encoder_sees():
    x = images(400)
    cefam = fit(x, training={"epochs": 80, "batch_size": 32, "lr": 3e-3})
    held = torch.rand(50, 3, 16, 16, generator=torch.Generator().manual_seed(9)) * torch.rand(50, 3, 1, 1)
    said, true = cefam.logits(held), 20 * F.normalize(Color().encode_image(held), dim=1)
    assert np.corrcoef(said.flatten(), true.flatten())[0, 1] > 0.9
    assert (said.argmax(1) == true.argmax(1)).float().mean() > 0.8
    h = cefam.history_
    assert {len(v) for v in h.values()} == {len(h["lr"])}
    assert h["val_loss"][-1] <= h["val_loss"][0]
    assert h["val_cosine"][0] > 0.9  # the start in closed form
    assert (cefam.logit_scale, cefam.link) == (20.0, "softmax")


def test_deterministic_and_independent_of_the_global_seed():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = fit()
    model_state = torch.get_rng_state()
    second = fit()
    assert torch.equal(weights(first), weights(second))
    assert not torch.equal(weights(first), weights(fit(seed=1)))
    torch.set_rng_state(state)
    classifier()
    assert torch.equal(model_state, torch.get_rng_state())


def test_every_kind_of_data_gives_the_same(tmp_path):
    x = (images(20) * 255).round() / 255
    for i, image in enumerate(x):
        pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / f"{i:03d}.png")
    options = {"batch_size": 8, "image_size": 16}
    expected = weights(fit(x, **options))
    labelled = TensorDataset(x, torch.arange(20))
    for data in (labelled, DataLoader(labelled, batch_size=8), DataLoader(labelled, batch_size=8, shuffle=True),
                 tmp_path, str(tmp_path)):  # fmt: skip
        torch.testing.assert_close(weights(fit(data, **options)), expected, atol=1e-4, rtol=1e-3)


def test_without_concepts_and_new_words_afterwards():
    cefam = fit(concepts=None)
    assert cefam.concepts is None
    with pytest.raises(NotFittedError, match="with_concepts"):
        cefam.scores(images(2))
    made = cefam.with_concepts(["blue", "red"], Color())
    assert made.scores(images(2)).shape == (2, 2)
    assert made.history_ == cefam.history_
    assert torch.equal(made.text_embeddings, torch.eye(3)[[2, 0]])
    plain = fit(similarity_weight=0.0)
    assert torch.equal(weights(plain), weights(cefam))
    assert not torch.equal(weights(fit(similarity_weight=1.0)), weights(cefam))


def test_unknown_words_are_named():
    with pytest.raises(InputError, match="purple"):
        fit(concepts=["red", "purple"])
    with pytest.raises(InputError, match="mauve"):
        fit().with_concepts(["mauve"], Color())
    cefam = fit(concepts=None)
    for bad, words in (([], "empty"), (["red", "red"], "once"), ("red", "list of names")):
        with pytest.raises(InputError, match=words):
            fit(concepts=bad)
        with pytest.raises(InputError, match=words):
            cefam.with_concepts(bad, Color())


def test_texts_of_another_model_are_refused():
    class Wide(Color):
        def encode_text(self, words):
            return F.pad(super().encode_text(words), (0, 2))

    with pytest.raises(InputError, match="images of width 3 and texts of width 5"):
        fit(encoder=Wide())
    with pytest.raises(InputError, match="width 5, but the translator returns 3"):
        fit().with_concepts(["red", "blue"], Wide())


def test_cache_resumes_and_refuses(tmp_path):
    encoder = Color()
    first = fit(encoder=encoder, cache_dir=tmp_path, batch_size=16)
    assert encoder.calls == 4
    again = fit(encoder=encoder, cache_dir=tmp_path, batch_size=16)
    assert encoder.calls == 4
    assert torch.equal(weights(first), weights(again))
    assert torch.equal(weights(first), weights(fit(batch_size=16)))
    other = classifier()
    other[0].weight.data.mul_(2)
    with pytest.raises(ArtifactError, match="model"):
        fit(model=other, cache_dir=tmp_path)
    with pytest.raises(ArtifactError, match="images is"):
        fit(images(20), cache_dir=tmp_path)


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    import captum_concepts.models.concept_translator.data as module

    monkeypatch.setattr(module, "_SHARD_ROWS", 10)

    class Killed(Color):
        def encode_image(self, batch):
            if self.calls == 2:
                raise KeyboardInterrupt
            return super().encode_image(batch)

    encoder = Killed()
    with pytest.raises(KeyboardInterrupt):
        fit(encoder=encoder, cache_dir=tmp_path, batch_size=16)
    encoder.calls = 3  # 30 of 64 rows are on disk: the next calls see the other 34
    resumed = fit(encoder=encoder, cache_dir=tmp_path, batch_size=16)
    assert encoder.calls == 3 + 3
    torch.testing.assert_close(weights(resumed), weights(fit(batch_size=16)), atol=1e-5, rtol=1e-4)


def test_above_the_memory_budget_rows_go_to_disk():
    torch.testing.assert_close(weights(fit(memory_budget=2000, batch_size=8)), weights(fit(batch_size=8)))


@pytest.mark.parametrize("n", [2, 5])
def test_less_data_than_a_batch(n):
    assert fit(images(n)).scores(images(2)).isfinite().all()


def test_one_image_is_refused():
    with pytest.raises(InputError, match="there is one image"):
        fit(images(1))


def test_no_data_and_bad_options():
    with pytest.raises(InputError, match="no image"):
        fit(images(0))
    wrong = ({"optimizer": "adam"}, {"epochs": -1}, {"validation_fraction": 1.0}, {"seed": 1}, {"start": "x"})
    for bad in (*wrong, {"epoch": 3}):
        with pytest.raises(InputError):
            fit(training=bad)
    with pytest.raises(InputError, match="a Dataset"):
        fit(7)


def test_a_nan_loss_stops_and_keeps_the_best():
    pairs = TrainingPairs([(torch.randn(40, 5), torch.randn(40, 3))], [5])
    translator = ConceptTranslator([5], 3, hidden=(8, 8))
    with pytest.warns(ConvergenceWarning, match="not finite"):
        result = fit_translator(translator, pairs, optimizer="sgd", lr=1e30, standardize=False)
    assert result.stopped == "nan"
    assert all(p.isfinite().all() for p in translator.parameters())
    for place in (0, 1):
        rows = [torch.randn(40, 5), torch.randn(40, 3)]
        rows[place][7, 2] = torch.nan
        for options in ({}, {"epochs": 3}, {"optimizer": "sgd"}):
            with pytest.raises(InputError, match=f"the {('activation', 'embedding')[place]} of image 7 contains NaN"):
                fit_translator(ConceptTranslator([5], 3, hidden=(8, 8)), TrainingPairs([tuple(rows)], [5]), **options)


@pytest.mark.parametrize("length", [10.0, 1.0])
def test_the_loss_is_the_stated_one(length):
    g = torch.Generator().manual_seed(2)
    z, e, text = torch.rand(9, 4, generator=g), torch.randn(9, 6, generator=g), torch.randn(3, 6, generator=g)
    e = F.normalize(e, dim=1) * length
    translator = ConceptTranslator([4], 6, hidden=(8, 8))
    with torch.random.fork_rng():
        result = fit_translator(translator, TrainingPairs([(z, e)], [4]), text=text, logit_scale=7.0, lr=0.0,
                                weight_decay=0.0, similarity_weight=0.5, epochs=1, validation_fraction=0)  # fmt: skip
    similarity = nn.CosineSimilarity(dim=0)
    total = 0.0
    for h, wanted in zip(translator([z]).detach(), e, strict=True):
        total += ((h - wanted) ** 2).mean() / len(z)
        for word in text:
            # The published weight where embeddings are 10 long, and the same balance of both terms elsewhere.
            off = 7 * (similarity(h, word) - similarity(wanted, word))
            total += 0.5 * (length / 10) ** 2 * off**2 / len(text) / len(z)
    assert result.history["val_loss"][0] == pytest.approx(float(total), rel=1e-4)


def test_the_published_optimiser():
    cefam = fit(images(100), training={"optimizer": "sgd", "epochs": 12, "batch_size": 10, "patience": 0})
    assert cefam.history_["lr"] == pytest.approx([0.1] + [0.2] * 11)
    assert cefam.history_["train_loss"][-1] < cefam.history_["train_loss"][0]


def test_the_rate_falls_and_the_fit_stops_when_nothing_improves():
    pairs = TrainingPairs([(torch.randn(60, 5), torch.randn(60, 3))], [5])
    translator = ConceptTranslator([5], 3, hidden=(8, 8))
    result = fit_translator(translator, pairs, lr=0.05, epochs=150, start="random")
    assert result.stopped == "early"
    assert len(result.history["lr"]) == result.best_epoch + 11
    assert min(result.history["lr"]) == pytest.approx(0.05 * 0.01)


def test_a_bias_means_sigmoid():
    encoder = Color()
    encoder.logit_bias = -4.0
    cefam = fit(encoder=encoder)
    assert (cefam.link, cefam.logit_bias) == ("sigmoid", -4.0)


def test_save_and_load(tmp_path):
    cefam = fit(map_layer="fused", n_channels=5, training={"epochs": 2})
    path = cefam.save(tmp_path / "map.safetensors")
    model = classifier()
    loaded = ConceptFusionMap.load(path, model)
    x = images(3)
    assert torch.equal(loaded.attribute(x), cefam.attribute(x))
    assert torch.equal(loaded.contributions(x), cefam.contributions(x))
    assert (loaded.map_layer, loaded.n_channels, loaded.history_) == ("fused", 5, cefam.history_)
    model[0].weight.data.mul_(2)
    with pytest.raises(ArtifactError, match="model"):
        ConceptFusionMap.load(path, model)
    with pytest.raises(ArtifactError, match="layers"):
        ConceptFusionMap.load(path, classifier(), ["1", "2"])
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ArtifactError, match="cannot be read"):
        ConceptFusionMap.load(path, classifier())
    with pytest.raises(FileNotFoundError):
        ConceptFusionMap.load(tmp_path / "none", classifier())
    empty = fit(concepts=None, training={"epochs": 1})
    assert ConceptFusionMap.load(empty.save(tmp_path / "empty"), classifier()).concepts is None


def _process(rank, size, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=size)
    for cache in (None, folder / "cache"):
        cefam = fit(images(30), cache_dir=cache)
        torch.save(weights(cefam), folder / f"{rank}-{cache is None}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_agree_with_one(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_process, args=(2, port, tmp_path), nprocs=2)
    expected = weights(fit(images(30)))
    for file in tmp_path.glob("*.pt"):
        torch.testing.assert_close(torch.load(file), expected, atol=1e-5, rtol=1e-4)
    assert len(list(tmp_path.glob("*.pt"))) == 4


def test_the_real_image_text_model_works_unchanged(shared_data, monkeypatch):
    monkeypatch.syspath_prepend(str(shared_data))
    from real_models import ConSE

    encoder = ConSE()
    g = torch.Generator().manual_seed(0)
    x = torch.rand(6, 3, 96, 96, generator=g)
    cefam = ConceptFusionMap(encoder.classifier, ["net.features.13", "net.features.18"])
    assert cefam.fit(x, encoder, ["cat", "dog"], training={"epochs": 2}) is cefam
    e = cefam.explain(x[:1])
    assert e.maps.shape == (1, 2, 6, 6)
    assert e.contributions.isfinite().all()
    with pytest.raises(InputError, match="qwertz"):
        cefam.with_concepts(["cat", "qwertz"], encoder)


def test_an_encoder_that_is_none_and_layers_that_are_no_list():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    with pytest.raises(InputError, match="Sequential has no encode_image and no encode_text"):
        ConceptFusionMap(net, ["0"]).fit(images(4), net, ["red"])
    with pytest.raises(InputError, match=r"pass \['0'\]"):
        ConceptFusionMap(net, "0")
