"""fit_salf_cbm against a brute-force fit, its settings, the forms of data it takes, and what it records."""

from __future__ import annotations

import json

import pytest
import salf_tiny
import torch
import torch.nn.functional as F
from salf_tiny import PROMPT, WORDS, Colours, backbone, backbone_in_training, fit, images_and_labels, state
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from captum_concepts import published
from captum_concepts.concepts import Vocabulary
from captum_concepts.errors import InputWarning
from captum_concepts.models.cubic_similarity import cubic_similarity
from captum_concepts.models.salf_cbm.fit import BottleneckSettings
from captum_concepts.solvers import elastic_net_path, fit_elastic_net
from captum_concepts.vlm import RegionPrompt


def similarities(images):
    """P by Algorithm 1: one image, one place, one concept at a time."""
    encoder, text = Colours(), Colours().encode_text(WORDS)
    P = torch.zeros(len(images), len(WORDS), *PROMPT.grid)
    for n, image in enumerate(images):
        for ij, view in enumerate(PROMPT.draw(image[None])[0]):
            embedding = encoder.encode_image(view[None])[0]
            unit = (embedding / embedding.norm()).half().float()  # as a store keeps it
            for m, t in enumerate(text):
                P[n, m, ij // 2, ij % 2] = unit @ t / t.norm()
    return P


def by_brute_force(settings):
    """Everything in memory, autograd through the plain loss, Adam by hand-written loop."""
    (x, y), (x_val, _) = images_and_labels(), images_and_labels(40, seed=1)
    net = backbone()
    with torch.no_grad():
        f, f_val = (F.interpolate(net[:2](v), (2, 2), mode="bilinear", align_corners=False) for v in (x, x_val))
    P, P_val = similarities(x), similarities(x_val)
    flat = (f - f.mean(0)).permute(0, 2, 3, 1).reshape(-1, f.shape[1]).double()
    scale = 1 / flat.square().mean(0).sqrt()
    drawn = torch.randn(len(WORDS), f.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    W = (drawn / (flat * scale @ drawn.T).square().mean(0).sqrt()[:, None]).float().requires_grad_()
    scale = scale.float()
    adam = torch.optim.Adam([W], lr=settings["lr"])
    maps = lambda features: torch.einsum("mc,ncij->nmij", W * scale, features)  # noqa: E731
    best, best_value, history = None, -2.0, []
    with torch.no_grad():
        best, best_value = W.detach().clone(), float(cubic_similarity(maps(f_val), P_val).mean())
    for epoch in range(settings["max_epochs"]):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
        for part in order.tensor_split(len(x) // settings["batch_size"]):
            adam.zero_grad()
            (-cubic_similarity(maps(f[part]), P[part]).sum() / 4).backward()
            adam.step()
        with torch.no_grad():
            history.append(float(cubic_similarity(maps(f_val), P_val).mean()))
        if history[-1] > best_value:
            best, best_value = W.detach().clone(), history[-1]
    W.data = best
    with torch.no_grad():
        q = maps(f_val)
        weight = W * scale / (q - q.mean(0)).square().mean((0, 2, 3)).sqrt()[:, None]
        pooled = torch.einsum("mc,ncij->nmij", weight, f).mean((2, 3))
        mean, std = pooled.mean(0), pooled.std(0, correction=0)
        head = fit_elastic_net((pooled - mean) / std, y, 0.01, num_classes=3, tol=1e-6)
    return {
        "bottleneck.weight": weight.detach()[:, :, None, None],
        "head.weight": head.weight,
        "head.bias": head.bias - head.bias.mean(),
        "concept_mean": mean,
        "concept_std": std,
    }, history


def test_equals_a_brute_force_fit(tmp_path):
    settings = {**published.FIT_SALF_CBM["bottleneck"], "max_epochs": 8, "batch_size": 32, "lr": 1e-2, "patience": 50}
    expected, history = by_brute_force(settings)
    validation = images_and_labels(40, seed=1)
    recipe = {**published.FIT_SALF_CBM, "bottleneck": settings, "interpretability_cutoff": None}
    model = fit(tmp_path, val_data=validation, feature_dtype=torch.float32, head_tol=1e-6, **recipe)
    assert model.metadata["history"]["val_similarity"] == pytest.approx(history, abs=1e-5)
    for name, value in state(model).items():
        torch.testing.assert_close(value, expected[name], atol=1e-3, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_the_model_is_what_was_fitted(tmp_path):
    (x, y), validation = images_and_labels(), images_and_labels(40, seed=1)
    model = fit(tmp_path, val_data=validation, feature_dtype=torch.float32)
    assert model.training is False
    activations = model.concept_activations(x)
    torch.testing.assert_close(activations.mean(0), torch.zeros(5), atol=1e-4, rtol=0)
    torch.testing.assert_close(activations.std(0, correction=0), torch.ones(5), atol=1e-4, rtol=0)
    right = (model(x).argmax(1) == y).float().mean().item()
    right_there = (model(validation[0]).argmax(1) == validation[1]).float().mean().item()
    expected = {"train": pytest.approx(right), "validation": pytest.approx(right_there)}
    assert model.metadata["accuracy"] == expected
    assert right > 0.8
    # Maps of variance one over the validation images: those of different concepts can be compared.
    maps = model.concept_maps(validation[0])
    torch.testing.assert_close((maps - maps.mean(0)).square().mean((0, 2, 3)), torch.ones(5), atol=1e-3, rtol=0)


def test_concept_maps_show_where_the_colours_are(tmp_path):
    model = fit(tmp_path, bottleneck={"max_epochs": 60})
    x, _ = images_and_labels(50, seed=5)
    truth = similarities(x)
    with torch.no_grad():
        assert cubic_similarity(model.concept_maps(x), truth).mean() > 0.6


def test_images_held_out_for_the_bottleneck_give_no_accuracy(tmp_path):
    assert fit(tmp_path).metadata["accuracy"]["validation"] is None  # the head has seen them


def test_training_helps(tmp_path):
    model = fit(tmp_path, bottleneck={"init": "random", "max_epochs": 40})
    history = model.metadata["history"]["val_similarity"]
    assert max(history) > model.metadata["bottleneck"]["start"] + 0.2
    kept = sum(model.metadata["validation_similarity"].values()) / 5
    assert kept == pytest.approx(max(history), abs=1e-6)


def test_least_squares_starts_higher(tmp_path):
    start = {
        init: fit(tmp_path, bottleneck={"init": init, "max_epochs": 0}).metadata["bottleneck"]["start"]
        for init in ("least_squares", "random")
    }
    assert start["least_squares"] > start["random"] + 0.2


def test_same_seed_same_bits(tmp_path):
    first, second, other = (fit(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    for name, value in state(first).items():
        assert torch.equal(value, state(second)[name]), name
    assert not torch.equal(first.bottleneck.weight, other.bottleneck.weight)
    assert first.metadata == second.metadata


def test_the_default_dtype_does_not_matter(tmp_path):
    expected = fit(tmp_path / "single")
    torch.set_default_dtype(torch.float64)
    try:
        images, labels = images_and_labels()
        found = fit(tmp_path / "double", (images.float(), labels), network=backbone().float())
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.bottleneck.weight.dtype == torch.float32
    assert found.concepts == expected.concepts


def test_words_that_are_one_to_the_encoder_are_warned_of(tmp_path):
    class Lower(Colours):
        def encode_text(self, texts):
            return super().encode_text([text.lower() for text in texts])

    with pytest.warns(InputWarning, match="'red' and 'Red' have the same text embedding"):
        fit(tmp_path, words=[*WORDS, "Red"], encoder=Lower())


def test_global_random_state_is_left_alone(tmp_path):
    before = torch.get_rng_state()
    fit(tmp_path, bottleneck={"init": "random"})
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("cache", [False, "auto"])
def test_features_on_the_fly_give_the_same(tmp_path, cache):
    cached = fit(tmp_path, feature_dtype=torch.float32, cache_features=True)
    assert list(tmp_path.glob("features-*"))
    live = fit(tmp_path / "live", feature_dtype=torch.float32, cache_features=cache, max_cache_bytes=10)
    assert not list((tmp_path / "live").glob("features-*"))
    for name, value in state(live).items():
        torch.testing.assert_close(value, state(cached)[name], atol=1e-4, rtol=1e-4, msg=name)


class Dictionaries(Dataset):
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data[0])

    def __getitem__(self, index):
        return {"image": self.data[0][index], "label": self.data[1][index], "name": "x"}


class Folder(Dataset):
    """Like ImageFolder: knows its targets."""

    def __init__(self, data):
        self.data, self.targets, self.classes = data, data[1].tolist(), ["red", "green", "neither"]

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return self.data[0][index], self.targets[index]


def test_forms_of_data(tmp_path):
    x, y = images_and_labels()
    x = (x * 255).round() / 255
    whole = TensorDataset(x, y)
    forms = {
        "tuple": (x, y.tolist()),
        "bytes": ((x * 255).round().to(torch.uint8), y),
        "dataset": whole,
        "dictionaries": Dictionaries((x, y)),
        "folder": Folder((x, y)),
        "loader": DataLoader(whole, batch_size=7, shuffle=True),
        "subset": Subset(TensorDataset(x.flip(0), y.flip(0)), range(len(x) - 1, -1, -1)),
        "joined": ConcatDataset([TensorDataset(x[:30], y[:30]), Folder((x[30:], y[30:]))]),
        "list": list(zip(x, y, strict=True)),
    }
    expected = state(fit(tmp_path / "expected", forms.pop("tuple")))
    for name, data in forms.items():
        model = fit(tmp_path / name, data)
        for key, value in state(model).items():
            assert torch.equal(value, expected[key]), f"{name}: {key}"
        assert model.class_names == (["red", "green", "neither"] if name == "folder" else None)


def test_concepts_are_dropped_with_reason_and_number(tmp_path):
    vocabulary = Vocabulary(["a red", *WORDS]).clean()
    x, y = images_and_labels()
    no_white = x * torch.tensor([1, 1, 0.3])[:, None, None]  # nothing is blue or white
    model = fit(
        tmp_path,
        (no_white, y),
        words=vocabulary,
        encoder=_Articles(),
        presence_cutoff=0.62,
        interpretability_cutoff=0.2,
    )
    drops = {drop["concept"]: drop for drop in model.metadata["vocabulary"]["report"]["drops"]}
    assert drops["red"]["reason"] == "duplicate"
    for gone in ("blue", "white"):
        assert drops[gone]["reason"] in ("absent from the data", "low validation similarity")
        assert drops[gone]["value"] < drops[gone]["limit"]
    assert set(model.concepts) == {"a red", "green", "yellow"}
    assert model.bottleneck.weight.shape[0] == model.head.weight.shape[1] == 3
    assert list(model.metadata["validation_similarity"]) == model.concepts


class _Articles(Colours):
    def encode_text(self, texts):
        return super().encode_text([text.removeprefix("a ") for text in texts])


def test_metadata_is_json_and_complete(tmp_path):
    model = fit(tmp_path, class_names=["r", "g", "n"])
    found = json.loads(json.dumps(model.metadata))
    assert found["data"]["train"]["count"] == 96
    assert found["encoder"] == "Colours"
    assert RegionPrompt.from_dict(found["prompt"]) == PROMPT
    assert found["settings"]["bottleneck"]["batch_size"] == 32
    assert found["head"]["lam"] == 0.01
    assert set(found["validation_similarity"]) == set(WORDS)
    lengths = {len(values) for values in found["history"].values()}
    assert lengths == {len(found["history"]["val_similarity"])}
    assert model.class_names == ["r", "g", "n"]


def test_model_transform_is_applied_to_the_backbone_alone(tmp_path):
    half = lambda images: images * 0.5  # noqa: E731
    plain, halved = fit(tmp_path / "a"), fit(tmp_path / "b", model_transform=half)
    x, _ = images_and_labels()
    assert not torch.equal(plain.bottleneck.weight, halved.bottleneck.weight)
    assert halved.concept_activations(half(x)).mean().abs() < 1e-2  # it takes what the backbone takes
    regions = [(tmp_path / name / "regions-train" / "manifest.json").read_text() for name in "ab"]
    assert regions[0] == regions[1]


def test_sparse_and_dense_heads(tmp_path):
    by_count = fit(tmp_path, lam=None, nonzeros_per_class=2, feature_dtype=torch.float32)
    x, y = images_and_labels()
    path = elastic_net_path(by_count.scores(x).double(), y, nonzeros_per_class=2, num_classes=3)
    assert by_count.metadata["head"]["nonzeros_per_class"] == float(path.selected.nonzeros.double().mean())
    alone = fit_elastic_net(by_count.scores(x).double(), y, by_count.metadata["head"]["lam"], num_classes=3)
    torch.testing.assert_close(by_count.head.weight, alone.weight.float(), atol=1e-2, rtol=1e-2)
    default = fit(tmp_path, lam=None)
    assert 0 < default.metadata["head"]["nonzeros_per_class"] < 5
    dense = fit(tmp_path, lam=None, head="dense")
    assert (dense.head.weight != 0).all()
    assert dense.metadata["accuracy"]["train"] >= by_count.metadata["accuracy"]["train"] - 0.02


def test_alpha_is_the_heads(tmp_path):
    x, y = images_and_labels()
    for alpha in (0.2, 0.99):
        model = fit(tmp_path, alpha=alpha, lam=0.1, feature_dtype=torch.float32, head_tol=1e-7)
        expected = fit_elastic_net(model.scores(x).double(), y, 0.1, alpha=alpha, tol=1e-7)
        torch.testing.assert_close(model.head.weight, expected.weight.float(), atol=1e-4, rtol=1e-3)
        assert model.metadata["head"]["alpha"] == alpha


def test_prompt_batch_size_is_the_encoders(tmp_path):
    sizes = []

    class Counting(Colours):
        def encode_image(self, images):
            sizes.append(len(images))
            return super().encode_image(images)

    for batch in (4, 40):
        sizes.clear()
        fit(tmp_path / str(batch), encoder=Counting(), prompt_batch_size=batch)
        assert max(sizes) == batch
        assert sum(size == batch for size in sizes) >= 96 * 4 // batch


def test_workers_read_the_images(tmp_path, monkeypatch):
    seen = []
    loader = torch.utils.data.DataLoader.__init__

    def watch(self, *arguments, **options):
        seen.append(options.get("num_workers", 0))
        loader(self, *arguments, **options)

    monkeypatch.setattr(torch.utils.data.DataLoader, "__init__", watch)
    few = {"max_epochs": 3}  # each begins a process
    alone = fit(tmp_path / "alone", cache_features=False, bottleneck=few)
    assert not any(seen)
    helped = fit(tmp_path / "helped", cache_features=False, bottleneck=few, num_workers=1)
    assert set(seen) == {1}
    assert all(torch.equal(value, state(alone)[name]) for name, value in state(helped).items())


def test_training_the_backbone_too(tmp_path):
    network = backbone()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    flags = [p.requires_grad for p in network.parameters()]
    settings = {"init": "random", "max_epochs": 8, "backbone_lr": 1e-3, "lr": 1e-2}
    frozen = fit(tmp_path, network=backbone(), bottleneck=settings)
    model = fit(tmp_path, network=network, train_backbone=True, bottleneck=settings)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert [p.requires_grad for p in network.parameters()] == flags
    assert not torch.equal(model.backbone[0].weight, network[0].weight)
    best = [max(m.metadata["history"]["val_similarity"]) for m in (frozen, model)]
    assert best[1] > best[0] + 0.02
    again = fit(tmp_path, network=network, train_backbone=True, bottleneck=settings)  # from its result
    assert torch.equal(again.backbone[0].weight, model.backbone[0].weight)
    assert torch.equal(again.head.weight, model.head.weight)


@pytest.mark.parametrize("train_backbone", [True, False])
@pytest.mark.parametrize("cache", [True, False])
def test_a_backbone_in_training_mode_gives_the_model_that_was_measured(tmp_path, train_backbone, cache):
    network = backbone_in_training()
    settings = {"max_epochs": 3, "backbone_lr": 1e-3}
    x, y = images_and_labels()
    x_val, y_val = images_and_labels(40, seed=1)
    model = fit(
        tmp_path,
        network=network,
        layer="3",
        train_backbone=train_backbone,
        cache_features=cache,
        feature_dtype=torch.float32,
        bottleneck=settings,
        val_data=(x_val, y_val),
        head="dense",
    )
    assert not any(module.training for module in model.modules())
    accuracies = model.metadata["accuracy"]
    assert accuracies["train"] == pytest.approx((model(x).argmax(1) == y).float().mean().item())
    assert accuracies["validation"] == pytest.approx((model(x_val).argmax(1) == y_val).float().mean().item())
    activations = model.concept_activations(x)
    torch.testing.assert_close(activations.mean(0), torch.zeros(5), atol=1e-4, rtol=0)
    torch.testing.assert_close(activations.std(0, correction=0), torch.ones(5), atol=1e-4, rtol=0)
    for norm in (network[1], model.backbone[1]):  # nobody's batch statistics moved
        assert torch.equal(norm.running_mean, torch.full((12,), -0.4))
    if train_backbone:
        assert all(module.training for module in network.modules())


def test_one_place_is_a_model_without_space(tmp_path):
    model = fit(tmp_path, prompt=RegionPrompt("crop", 1, 8))
    assert model.concept_maps(images_and_labels(3)[0]).shape == (3, 5, 1, 1)


def test_settings_object_and_dictionary_agree(tmp_path):
    data, common = images_and_labels(), {"store_path": tmp_path, "prompt": PROMPT, "lam": 0.01}
    common |= {"presence_cutoff": None, "interpretability_cutoff": None}
    first, second = (
        salf_tiny.fit_salf_cbm(backbone(), "1", data, Colours(), WORDS, 3, bottleneck=settings, **common)
        for settings in (BottleneckSettings(max_epochs=2, batch_size=32), {"max_epochs": 2, "batch_size": 32})
    )
    assert torch.equal(first.bottleneck.weight, second.bottleneck.weight)


def test_backbone_in_half_precision(tmp_path):
    full, half = fit(tmp_path), fit(tmp_path, network=backbone().to(torch.bfloat16))
    assert half.bottleneck.weight.dtype == torch.bfloat16
    x, y = images_and_labels()
    dtype = [model.head.weight.dtype for model in (full, half)]
    right = [(m(x.to(d)).argmax(1) == y).float().mean() for m, d in zip((full, half), dtype, strict=True)]
    assert right[1] > right[0] - 0.1


def test_scenes_are_data_as_they_are(tmp_path):
    from captum_concepts.datasets import CaptionedScenes

    scenes = CaptionedScenes(40, seed=0, size=16)
    model = salf_tiny.fit_salf_cbm(
        nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.AdaptiveAvgPool2d(1)), "0", scenes, Colours(), WORDS, 6,
        store_path=tmp_path, prompt=PROMPT, presence_cutoff=None, interpretability_cutoff=None, lam=0.05,
        bottleneck={"max_epochs": 1},
    )  # fmt: skip
    assert model.class_names == scenes.classes
