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
from several import ending_at_once
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from captum_concepts import published
from captum_concepts._artifacts import save_artifact
from captum_concepts.activations import Layers
from captum_concepts.attr.concept_fusion_map import ConceptFusionMap
from captum_concepts.concepts import Vocabulary
from captum_concepts.errors import ArtifactError, ConvergenceWarning, InputError, InputWarning, NotFittedError
from captum_concepts.models import ConceptTranslator
from captum_concepts.models.concept_translator.data import TrainingPairs, collect_pairs, random_crops
from captum_concepts.models.concept_translator.fit import fit_translator
from captum_concepts.store.manifest import fingerprint_module

WORDS = ["red", "green", "blue"]


class Color(nn.Module):
    """An image-text model of the mean colour."""

    logit_scale, logit_bias = 20.0, 0.0

    def __init__(self):
        super().__init__()
        self.calls, self.offset = 0, 0.3
        self.register_buffer("text", torch.eye(3))

    def encode_image(self, images):
        self.calls += 1
        return images.mean((2, 3)) - self.offset

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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_classifier_in_half_precision(dtype):
    """From images in its own precision, or as they are read; also with crops, which are resized in full precision."""
    x, options = images(), {"training": {"epochs": 10, "batch_size": 16}, "crops": 2}
    full = fit(x, **options)
    for given in (x, x.to(dtype)):
        half = fit(given, model=classifier().to(dtype), **options)
        found, expected = half.logits(x[:8].to(dtype)), full.logits(x[:8])
        assert found.dtype == torch.float32
        # Ten epochs carry what is rounded on: .98 in bfloat16 here.
        assert np.corrcoef(found.flatten(), expected.flatten())[0, 1] > 0.95


def test_words_that_are_one_to_the_encoder_are_warned_of():
    """They share what would be the probability of one."""

    class Lower(Color):
        def encode_text(self, words):
            return super().encode_text([word.lower() for word in words])

    cefam = fit(encoder=Lower())
    with pytest.warns(InputWarning, match="'red' and 'Red' have the same text embedding"):
        cefam.with_concepts(["red", "green", "Red"], Lower())
    with pytest.warns(InputWarning, match="'red' and 'Red' have the same text embedding"):
        fit(encoder=Lower(), concepts=["red", "green", "Red"])


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


def test_lines_of_a_file_are_words():
    cefam = fit(concepts=["red\n", " blue "])
    assert cefam.concepts == ["red", "blue"]
    assert cefam.with_concepts(["green\n", "red"], Color()).concepts == ["green", "red"]


def test_unknown_words_are_named():
    with pytest.raises(InputError, match="purple"):
        fit(concepts=["red", "purple"])
    with pytest.raises(InputError, match="mauve"):
        fit().with_concepts(["mauve"], Color())
    cefam = fit(concepts=None)
    for bad, words in (
        ([], "empty"), (["red", "red"], "once"), (["red", " red\n"], "once"), ("red", "list of names")
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            fit(concepts=bad)
        with pytest.raises(InputError, match=words):
            cefam.with_concepts(bad, Color())


def test_texts_of_another_model_are_refused():
    class Wide(Color):
        def encode_text(self, words):
            return F.pad(super().encode_text(words), (0, 2))

    with pytest.raises(InputError, match="image embeddings of width 3 but text embeddings of width 5"):
        fit(encoder=Wide())
    with pytest.raises(InputError, match="width 5, but the translator returns 3"):
        fit().with_concepts(["red", "blue"], Wide())


def test_cache_resumes_and_refuses(tmp_path):
    encoder = Color()
    first = fit(encoder=encoder, cache_dir=tmp_path, batch_size=16)
    assert encoder.calls == 4 + 1  # and the first image, to compare it with the cache
    again = fit(encoder=encoder, cache_dir=tmp_path, batch_size=16)
    assert encoder.calls == 4 + 2
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
    encoder.calls = 3  # 20 of 64 rows are on disk: the next calls see the other 44
    resumed = fit(encoder=encoder, cache_dir=tmp_path, batch_size=16)
    assert encoder.calls == 3 + 5 + 1  # and the first image, to compare it with the cache
    assert torch.equal(weights(resumed), weights(fit(cache_dir=tmp_path / "whole", batch_size=16)))


def test_above_the_memory_budget_rows_go_to_disk():
    torch.testing.assert_close(weights(fit(memory_budget=2000, batch_size=8)), weights(fit(batch_size=8)))


@pytest.mark.parametrize(
    "wrong",
    [{"hidden": [0, 4]}, {"hidden": "x"}, {"hidden": 3.5}, {"hidden": (8,)}, {"seed": "x"}, {"memory_budget": -1},
     {"crops": -1}, {"training": {"epoch": 3}}, {"training": {"lr": "x"}}, {"similarity_weight": -1},
     {"image_size": -3}],
)  # fmt: skip
def test_options_are_refused_before_the_encoder_runs(wrong):
    encoder = Color()
    encoder.encode_image = lambda _: pytest.fail("the work began")
    with pytest.raises(InputError, match=r"must be|no option|from 1 to 10,000"):
        fit(encoder=encoder, **wrong)


@pytest.mark.parametrize("n", [2, 5])
def test_less_data_than_a_batch(n):
    assert fit(images(n)).scores(images(2)).isfinite().all()


def test_one_image_is_refused():
    with pytest.raises(InputError, match="to a single image"):
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


@pytest.mark.parametrize(("patience", "seed"), [(2, 0), (2, 1), (4, 2)])
def test_the_published_schedule(patience, seed):
    """The rule of the paper, written out: one epoch at .1, then .2; a tenth after ``patience`` epochs without progress.

    The plateau rule sees no loss of the warm-up, and training ends after ten epochs without a new best.
    """
    g = torch.Generator().manual_seed(seed)
    pairs = TrainingPairs([(torch.rand(60, 5, generator=g), torch.randn(60, 3, generator=g))], [5])
    translator = ConceptTranslator([5], 3, hidden=(16, 16))
    history = fit_translator(translator, pairs, optimizer="sgd", batch_size=8, patience=patience, seed=seed).history
    rate, waited, lowest, best = 0.2, 0, float("inf"), (float("inf"), 0)
    expected, stops = [0.1], []
    for epoch, loss in enumerate(history["val_loss"]):
        best = min(best, (loss, epoch))
        stops.append(epoch - best[1] >= 10)
        if epoch > 0:
            lowest, waited = (loss, 0) if loss < lowest else (lowest, waited + 1)
            if waited == patience:
                rate, waited = rate * 0.1, 0
        expected.append(rate)
    assert history["lr"] == pytest.approx(expected[:-1])
    assert len(set(history["lr"])) > 2  # it was reduced
    assert stops == [False] * (len(stops) - 1) + [True]


def test_the_published_recipe_is_a_plain_loop():
    """``published.CONCEPT_FUSION_FIT`` on embeddings of CLIP's length: one batch per epoch, in double precision."""
    recipe = published.CONCEPT_FUSION_FIT
    g = torch.Generator().manual_seed(3)
    z, text = torch.rand(80, 5, generator=g), torch.randn(3, 4, generator=g)
    e = 10 * F.normalize(torch.randn(80, 4, generator=g), dim=1)
    pairs, hidden = TrainingPairs([(z, e)], [5]), (8, 8)
    options = {"text": text, "logit_scale": 100.0, "similarity_weight": recipe["similarity_weight"]}
    start, translator = (ConceptTranslator([5], 4, hidden=hidden) for _ in range(2))
    fit_translator(start, pairs, **{**recipe["training"], "epochs": 0}, **options)
    found = fit_translator(translator, pairs, **{**recipe["training"], "epochs": 6}, **options)

    net = start.network.double()
    z, e, words = z.double(), e.double(), F.normalize(text.double(), dim=1)
    held = found.held_out
    rest = torch.tensor([n for n in range(80) if n not in held.tolist()])

    def loss(rows):
        h = net(z[rows])
        off = 100 * (F.normalize(h, dim=1) - F.normalize(e[rows], dim=1)) @ words.T
        return (h - e[rows]).square().mean() + 1e-3 * off.square().mean()

    expected = []
    for epoch in range(6):
        grads = torch.autograd.grad(loss(rest), list(net.parameters()))
        with torch.no_grad():
            for parameter, grad in zip(net.parameters(), grads, strict=True):
                parameter -= (0.1 if epoch == 0 else 0.2) * grad
            expected.append(float(loss(held)))
    assert found.history["lr"] == [0.1] + [0.2] * 5
    assert found.history["val_loss"] == pytest.approx(expected, rel=1e-5)


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


@ending_at_once
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


@pytest.mark.parametrize(
    "change",
    [
        lambda x: {"data": torch.cat([x[:5], x[5:6] * 0.5, x[6:]])},
        lambda x: {"model_transform": lambda batch: batch * 0.5},
        lambda x: {"encoder_transform": lambda batch: batch * 0.5},
        lambda x: {"layout": "NCHW"},
        lambda x: {"prefix_tokens": 0},
        lambda x: {"crops": 1},
    ],
    ids=["one image", "model_transform", "encoder_transform", "layout", "prefix_tokens", "crops"],
)
def test_a_stale_cache_is_refused(tmp_path, change):
    x = images(30)
    given = {"model_transform": lambda batch: batch * 1.0, "encoder_transform": lambda batch: batch * 1.0}
    fit(x, cache_dir=tmp_path, **given)
    fit(x, cache_dir=tmp_path, **given)
    changed = change(x)
    data = changed.pop("data", x)
    with pytest.raises(ArtifactError, match="does not match"):
        fit(data, cache_dir=tmp_path, **{**given, **changed})


@pytest.mark.parametrize("changed", ["classifier", "encoder"])
def test_a_cache_of_the_same_weights_with_other_settings_is_refused(tmp_path, changed):
    given = {"model": classifier(), "encoder": Color()}
    fit(cache_dir=tmp_path, **given)
    if changed == "classifier":
        given["model"][0].dilation = (2, 2)
    else:
        given["encoder"].offset = 0.5
    with pytest.raises(ArtifactError, match=f"other settings of the {changed}"):
        fit(cache_dir=tmp_path, **given)


def test_crops_are_further_rows_of_their_image():
    pairs = collect_pairs(Layers.resolve(classifier(), LAYERS), Color(), images(5), crops=3, batch_size=7)
    assert (len(pairs), pairs.images, pairs.views) == (20, 5, 4)
    assert pairs.rows_of(torch.tensor([3, 0])).tolist() == [12, 13, 14, 15, 0, 1, 2, 3]
    assert pairs.rows_of(torch.tensor([3, 0]), crops=False).tolist() == [12, 0]
    torch.testing.assert_close(pairs.rows([12])[1], Color().encode_image(images(5)[3:4]))
    generator = torch.Generator().manual_seed(3)  # of image 3 with seed 0
    for row, crop in zip((13, 14, 15), random_crops(images(5)[3], 3, generator), strict=True):
        torch.testing.assert_close(pairs.rows([row])[1], Color().encode_image(crop[None]))
        assert crop.shape == (3, 16, 16)
    again = collect_pairs(Layers.resolve(classifier(), LAYERS), Color(), images(5), crops=3, batch_size=32)
    torch.testing.assert_close(again.rows(range(20))[0], pairs.rows(range(20))[0], atol=1e-5, rtol=1e-5)
    other = collect_pairs(Layers.resolve(classifier(), LAYERS), Color(), images(5), crops=3, seed=1)
    assert not torch.equal(other.rows([13])[1], pairs.rows([13])[1])


def test_no_crop_of_a_held_out_image_is_trained_on():
    z, e = torch.randn(40, 5), torch.randn(40, 3)
    pairs = TrainingPairs([(z, e)], [5], views=4)
    result = fit_translator(ConceptTranslator([5], 3, hidden=(8, 8)), pairs, validation_fraction=0.3)
    assert len(result.held_out) == 3
    # Embeddings of held-out images' crops do not change the result.
    changed = e.clone().unflatten(0, (10, 4))
    changed[result.held_out, 1:] = 100.0
    translators = [ConceptTranslator([5], 3, hidden=(8, 8)) for _ in range(2)]
    for translator, target in zip(translators, (e, changed.flatten(0, 1)), strict=True):
        fit_translator(translator, TrainingPairs([(z, target)], [5], views=4), validation_fraction=0.3)
    assert torch.equal(translators[0](z), translators[1](z))


def test_the_start_from_examples_is_the_stated_network():
    """Each hidden unit is the similarity to one training image; the rest solves a regression."""
    g = torch.Generator().manual_seed(0)
    z = torch.rand(600, 3, generator=g)
    e = torch.stack([torch.sin(4 * z[:, 0]), z[:, 1] * z[:, 2], z[:, 1]], 1)
    translator = ConceptTranslator([3], 3, hidden=(200, 50))
    result = fit_translator(translator, TrainingPairs([(z, e)], [3]))
    assert result.best_epoch == -1
    assert {len(values) for values in result.history.values()} == {1}
    assert result.history["lr"] == [0.0]
    held = result.held_out
    rest = torch.ones(600, dtype=torch.bool)
    rest[held] = False
    error = (translator([z[held]]) - e[held]).square().mean()
    design = torch.cat([z, torch.ones(600, 1)], 1)
    linear = design[held] @ torch.linalg.lstsq(design[rest], e[rest]).solution
    assert error < 0.2 * (linear - e[held]).square().mean()
    spread = z[rest].std(0, correction=0)
    examples, x = translator.first.weight * spread, (z[rest] - z[rest].mean(0)) / spread
    cosines = F.normalize(examples, dim=1) @ F.normalize(x, dim=1).T
    assert (cosines.amax(1) > 0.999).all()


@pytest.mark.parametrize("crops", [0, 2])
def test_the_default_dtype_may_be_double(crops):
    torch.set_default_dtype(torch.float64)
    try:
        cefam = fit(images(30).float(), model=classifier().float(), crops=crops, training={"epochs": 1})
        e = cefam.explain(images(2).float())
    finally:
        torch.set_default_dtype(torch.float32)
    assert e.maps.isfinite().all()


def test_the_link_is_what_the_encoder_says():
    for said, bias, expected in (("sigmoid", 0.0, "sigmoid"), ("softmax", -3.0, "softmax"), (None, 0.0, "softmax"),
                                 (None, -3.0, "sigmoid")):  # fmt: skip
        for name in ("link", "probability"):
            encoder = Color()
            encoder.logit_bias = bias
            if said is not None:
                setattr(encoder, name, said)
            assert fit(images(8), encoder=encoder).link == expected
            assert fit(images(8), encoder=encoder, link="sigmoid").link == "sigmoid"
    encoder.link = "exp"
    with pytest.raises(InputError, match=r"encoder.link is 'exp'"):
        fit(images(8), encoder=encoder)


def test_another_encoder_is_asked_again():
    first, second = Color(), Color()
    second.logit_scale, second.logit_bias = 5.0, -2.0
    cefam = fit(images(8), encoder=first)
    assert (cefam.logit_scale, cefam.link) == (20.0, "softmax")
    cefam.with_options(n_channels=3).fit(images(8), second, WORDS, crops=0)
    assert cefam.fit(images(8), second, WORDS, crops=0) is cefam
    assert (cefam.logit_scale, cefam.logit_bias, cefam.link) == (5.0, -2.0, "sigmoid")
    mine = fit(images(8), encoder=first, logit_scale=7.0)
    assert mine.fit(images(8), second, crops=0).logit_scale == 7.0
    assert mine.concepts == WORDS


def test_options_are_checked_before_anything_is_read():
    class Unread:
        def __len__(self):
            raise AssertionError("read")

        __getitem__ = __len__

    cefam = ConceptFusionMap(classifier(), LAYERS)
    for bad in ({"training": {"optimiser": "sgd"}}, {"crops": -1}, {"similarity_weight": -1.0},
                {"training": {"epochs": 1.5}}, {"concepts": ["red", "purple"]}):  # fmt: skip
        with pytest.raises(InputError):
            cefam.fit(Unread(), Color(), **bad)
    cefam.gradient = "brnach"
    with pytest.raises(InputError, match="gradient"):
        cefam.fit(Unread(), Color())


def test_words_of_the_constructor_and_of_a_vocabulary():
    cefam = ConceptFusionMap(classifier(), LAYERS, concepts=["blue", "red"])
    assert cefam.fit(images(8), Color(), crops=0).concepts == ["blue", "red"]

    class Photo(Color):
        def encode_text(self, words):
            assert all(word.startswith("a ") for word in words)
            return super().encode_text([word.removeprefix("a ") for word in words])

    vocabulary = Vocabulary(["green", "red"], templates="a {}")
    made = cefam.with_concepts(vocabulary, Photo())
    assert made.concepts == ["green", "red"]
    assert torch.equal(made.text_embeddings, torch.eye(3)[[1, 0]])
    assert fit(images(8), encoder=Photo(), concepts=vocabulary).concepts == ["green", "red"]


def test_files_are_normalized_as_the_classifiers_library_says(tmp_path):
    from torchvision.models import resnet18

    for i, image in enumerate(images(4)):
        pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).resize((224, 224)).save(tmp_path / f"{i}.png")
    model = resnet18()
    seen = []
    handle = model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    encoded = []

    class Watching(Color):
        def encode_image(self, batch):
            encoded.append(batch)
            return super().encode_image(batch)

    ConceptFusionMap(model, ["layer4"]).fit(tmp_path, Watching(), crops=0)
    handle.remove()
    assert seen[0].shape == (4, 3, 224, 224)
    assert encoded[0].min() >= 0
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(seen[0], (encoded[0] - mean[:, None, None]) / std[:, None, None])


def test_format_1_is_read(tmp_path):
    """A file as the first version wrote it."""
    cefam = fit(images(20), map_layer=1, link="sigmoid", batch_size=7)
    translator = cefam.translator
    info = {
        "concepts": WORDS, "layers": LAYERS, "layer": 1,
        "options": {"logit_scale": 20.0, "logit_bias": 0.0, "probability": "sigmoid", "gradient": "total",
                    "n_channels": 20, "channel_share": None, "fill": "layer_mean", "chunk_size": 7, "layout": "auto",
                    "prefix_tokens": None},
        "in_channels": [10, 12], "embedding_dim": 3, "hidden": [32, 32], "history": cefam.history_,
        "model": fingerprint_module(classifier()),
    }  # fmt: skip
    tensors = {f"translator.{name}": value for name, value in translator.state_dict().items()}
    path = save_artifact(
        tmp_path / "old", "captum_concepts.ConceptFusionMap/1", info, {**tensors, "text_embeddings": torch.eye(3)}
    )
    loaded = ConceptFusionMap.load(path, classifier())
    assert (loaded.map_layer, loaded.link, loaded.batch_size, loaded.concepts) == (1, "sigmoid", 7, WORDS)
    x = images(2)
    assert torch.equal(loaded.attribute(x), cefam.with_options(calibrated=False).attribute(x))
