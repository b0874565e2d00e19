"""fit_salf_cbm and bad input: refused with what was given and what to do, before the long steps where possible."""

from __future__ import annotations

import re

import pytest
import torch
from salf_tiny import WORDS, Colours, backbone, fit, images_and_labels
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from captum_concepts.concepts import Vocabulary
from captum_concepts.errors import ArtifactError, ConvergenceWarning, InputError, InputWarning, LayerError
from captum_concepts.models.salf_cbm.fit import BottleneckSettings, FitPlan, fit_bottleneck, plan_salf_cbm
from captum_concepts.vlm import RegionPrompt

X, Y = images_and_labels()


@pytest.fixture
def no_encoding(monkeypatch):
    """What is refused is refused before an image is embedded."""

    def encode(self, images):
        raise AssertionError("an image was embedded")

    monkeypatch.setattr(Colours, "encode_image", encode)


EARLY = [
    ({"lam": 0.1, "nonzeros_per_class": 3}, "not both"),
    ({"lam": -0.1}, "lam must be a number of at least 0"),
    ({"lam": None, "nonzeros_per_class": 6}, r"must be in \(0, 5\]"),
    ({"lam": None, "nonzeros_per_class": 3, "head": "dense"}, "requires head='sparse'"),
    ({"head": "deep"}, "head must be one of 'sparse', 'dense'"),
    ({"words": []}, "there is no concept"),
    ({"words": ["red", "green", "red"]}, "concept 'red' occurs twice"),
    ({"words": ["red\n", "green", "red"]}, r"spaces or line breaks around them: 'red\\n'; Vocabulary"),
    ({"words": "red"}, "list of strings"),
    ({"words": ["red", "mauve"]}, r"no embedding for \['mauve'\]"),
    ({"words": Vocabulary(["red"], templates="a photo of {}")}, "no embedding for"),
    ({"data": (X, Y + 1)}, r"has label 3, outside 0\.\.2"),
    ({"data": (X, Y - 1)}, r"has label -1, outside 0\.\.2"),
    ({"data": (X, Y.clamp(max=1))}, r"1 of 3 classes have no image in images: \[2\]"),
    ({"data": (X, Y[:-1])}, "96 images but 95 labels"),
    ({"data": (X, Y + 0.5)}, "one class index per image"),
    ({"data": X}, "has no label"),
    ({"data": TensorDataset(X)}, "has no label"),
    ({"data": TensorDataset(X, X)}, "image 0 is a list"),
    ({"data": [(x, "red") for x in X]}, "are names, but there are no class_names; pass class_names="),
    ({"data": (X[:5], Y[:5])}, "images contains 5 images; .* at least 8"),
    ({"data": (X[:0], Y[:0])}, "no image"),
    ({"data": [(torch.zeros(3, 16, 16), i % 2) for i in range(18)]}, r"1 of 3 classes have no image in images: \[2\]"),
    ({"val_data": (X[:5], Y[:5])}, "val_data contains 5 images"),
    ({"val_data": (X, Y + 1)}, "of val_data has label 3"),
    ({"data": (X[:14], torch.arange(14) % 3)}, "too few to hold out 8"),
    ({"validation_fraction": 0}, r"validation_fraction must be in \(0, 1\)"),
    ({"grid": 3}, "differs from the prompt's"),
    ({"prompt": "circle"}, "must be a RegionPrompt"),
    ({"bottleneck": {"lr": -1}}, "lr must be a positive number or None"),
    ({"bottleneck": {"init": "zero"}}, "init must be"),
    ({"bottleneck": {"batch_size": 2}}, "at least 8"),
    ({"bottleneck": {"max_epochs": 1.5}}, "max_epochs must be a whole number"),
    ({"bottleneck": {"rate": 1}}, "unknown setting"),
    ({"class_names": ["a", "b"]}, "2 class_names for num_classes=3"),
    ({"batch_size": 0}, "batch_size must be"),
    ({"prompt_batch_size": 0}, "prompt_batch_size must be"),
    ({"num_workers": -1}, "num_workers must be"),
    ({"alpha": 0}, r"alpha must be in \(0, 1\]"),
    ({"presence_cutoff": "high"}, "presence_cutoff must be a number, or None"),
    ({"class_weights": "equal"}, "class_weights must be one of None, 'balanced'"),
    ({"class_weights": [1.0, 2.0]}, "class_weights must be 3 positive numbers"),
    ({"data": (X[:, :2], Y)}, "images of 2 channels, but the encoder takes RGB; pass encoder_transform="),
    ({"encoder_transform": lambda images: images[:, :2]}, r"encoder_transform must map images \(1, 3, 16, 16\) to RGB"),
    ({"multi_label": True}, r"multi_label=True needs labels"),
    ({"data": (X, torch.ones(96, 2))}, r"must be one class index per image, or 0 and 1 of shape \(N, 3\)"),
    ({"data": (X, torch.eye(3)[Y] * 2)}, "or 0 and 1 of shape"),
    ({"data": (X, F.one_hot(Y, 3).clamp(max=1) | torch.tensor([1, 0, 0]))}, r"in no image of images, or in all: \[0\]"),
    ({"multi_label": False, "data": (X, torch.eye(3)[Y] * (torch.arange(96) > 3)[:, None])}, "pass multi_label=True"),
    ({"model_transform": lambda images: images[0]}, "model_transform must map"),
]


@pytest.mark.parametrize(("change", "message"), EARLY, ids=[str(i) for i in range(len(EARLY))])
def test_refused_before_an_image_is_embedded(tmp_path, no_encoding, change, message):
    with pytest.raises(InputError, match=message):
        fit(tmp_path / "store", **change)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_weights_that_are_not_loaded(tmp_path, no_encoding):
    with torch.device("meta"):
        empty = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    with pytest.raises(InputError, match="backbone is on the meta device"):
        fit(tmp_path, network=empty)


def test_unknown_layer(tmp_path, no_encoding):
    with pytest.raises(LayerError, match="no layer"):
        fit(tmp_path, network=nn.Sequential(nn.Conv2d(3, 4, 3)))


def test_iterable_data(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(zip(X, Y, strict=True))

    for data in (Stream(), DataLoader(Stream(), batch_size=4)):
        with pytest.raises(InputError, match="data set with a length"):
            fit(tmp_path, data)


def test_images_of_mixed_size(tmp_path):
    data = [(x[:, :, : 14 if i == 50 else 16], int(y)) for i, (x, y) in enumerate(zip(X, Y, strict=True))]
    with pytest.raises(InputError, match="image 50 is"):
        fit(tmp_path, data)


def test_random_augmentation_is_noticed(tmp_path):
    class Random(TensorDataset):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return image + 0.01 * torch.rand(1), label

    fit(tmp_path, Random(X, Y))
    with pytest.raises(ArtifactError, match="random crops"):
        fit(tmp_path, Random(X, Y))


def test_no_concept_is_present(tmp_path):
    with pytest.raises(
        InputError, match=r"no concept is left: the most present one, '\w+', has a mean top-5 similarity"
    ):
        fit(tmp_path, presence_cutoff=1.5)


def test_no_concept_is_interpretable(tmp_path):
    """The long work is done by then: the model is returned, and says that it cannot be believed."""
    with pytest.warns(
        InputWarning, match=r"reaches interpretability_cutoff=1\.1 \(the best is 0\.\d+\), so all are kept"
    ):
        model = fit(tmp_path, interpretability_cutoff=1.1)
    assert model.concepts == list(WORDS)
    assert "reached interpretability_cutoff=1.1" in model.metadata["advice"][0]
    assert fit(tmp_path, interpretability_cutoff=0.1).metadata["advice"] == []


def test_nan_features_name_the_image(tmp_path):
    network, x = nn.Sequential(), X.clone()
    network.add_module("0", nn.Identity())
    network.add_module("1", nn.Conv2d(3, 4, 4, stride=4))
    x[33] = 0
    broken = lambda images: torch.where(images.amax((1, 2, 3), keepdim=True) == 0, float("nan"), images)  # noqa: E731
    for cache in (True, False):
        with pytest.raises(InputError, match="features of image 33 contain NaN"):
            fit(tmp_path, (x, Y), network=network, model_transform=broken, cache_features=cache)


def test_features_beyond_half_precision(tmp_path):
    large = lambda images: images * 1e6  # noqa: E731
    network = nn.Sequential(nn.Identity(), nn.Conv2d(3, 4, 4, stride=4))
    with pytest.raises(InputError, match=r"outside the range of half precision; use feature_dtype=torch\.float32"):
        fit(tmp_path, network=network, model_transform=large)
    model = fit(tmp_path, network=network, model_transform=large, feature_dtype=torch.float32)
    assert model.metadata["accuracy"]["train"] > 0.5


def test_features_below_half_precision_are_said(tmp_path):
    small = lambda images: images * 1e-7  # noqa: E731
    network = nn.Sequential(nn.Identity(), nn.Conv2d(3, 4, 4, stride=4, bias=False))
    with pytest.warns(InputWarning, match=r"few or no digits; use feature_dtype=torch\.float32"):
        fit(tmp_path, network=network, model_transform=small)


def test_features_that_never_change(tmp_path):
    flat = lambda images: torch.ones_like(images)  # noqa: E731
    with pytest.raises(InputError, match="the same for every image"):
        fit(tmp_path, model_transform=flat)


def test_a_rate_that_explodes_keeps_the_best(tmp_path, monkeypatch):
    from captum_concepts.models.salf_cbm.fit import bottleneck

    step = bottleneck._State.step

    def explode(self, *arguments):
        found = step(self, *arguments)
        self.parameter.data.fill_(float("nan"))
        return found * float("nan")

    monkeypatch.setattr(bottleneck._State, "step", explode)
    with pytest.warns(ConvergenceWarning, match="not finite in epoch 0.*keeps the bottleneck of epoch -1"):
        model = fit(tmp_path)
    assert model.bottleneck.weight.isfinite().all()
    assert model.metadata["bottleneck"]["stopped"] == "nan"


def test_embeddings_that_are_nan(tmp_path):
    class Nan(Colours):
        def encode_image(self, images):
            return super().encode_image(images) * float("nan")

    with pytest.raises(InputError, match="NaN or infinite values for image 0"):
        fit(tmp_path, encoder=Nan())


def test_text_of_another_width(tmp_path):
    class Wide(Colours):
        def encode_text(self, texts):
            return torch.nn.functional.pad(super().encode_text(texts), (0, 1))

    with pytest.raises(InputError, match=r"text embeddings must be \(M, 6\)"):
        fit(tmp_path, encoder=Wide())


def test_constant_concept_map_does_no_harm(tmp_path):
    """An encoder that says the same everywhere: similarity 0, and the map is dropped by the cutoff."""
    encoder = Colours()
    encoder.encode_text = lambda texts: torch.cat([torch.eye(6)[: len(texts) - 1], torch.eye(6)[5:]])
    model = fit(tmp_path, encoder=encoder, interpretability_cutoff=0.05)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_settings_say_what_is_allowed():
    with pytest.raises(InputError, match="patience must be a whole number of at least 1"):
        BottleneckSettings(patience=0)


def test_cached_features_cannot_train_a_backbone(tmp_path):
    from captum_concepts.models.salf_cbm.fit import CachedFeatures, Samples

    fit(tmp_path)
    features = CachedFeatures(next(tmp_path.glob("features-train-*")))
    samples = Samples(features, None, torch.arange(96))
    with pytest.raises(InputError, match="on the fly"):
        fit_bottleneck(samples, samples, torch.eye(5, 6), backbone=backbone())
    with pytest.raises(InputError, match="3 validation images are too few"):
        fit_bottleneck(samples, Samples(features, None, torch.arange(3)), torch.eye(5, 6))


def test_a_plan_refuses_the_same(tmp_path, no_encoding):
    with pytest.raises(InputError, match="not both"):
        plan_salf_cbm(
            backbone(), "1", (X, Y), Colours(), WORDS, 3, store_path=tmp_path, lam=0.1, nonzeros_per_class=2
        )  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(50, "50 s"), (99.9, "99.9 s"), (100, "1.67 min"), (5_994, "99.9 min"), (6_000, "1.67 h"), (358_200, "99.5 h"),
     (360_000, "4.17 days"), (8_640_000 * 40, "4,000 days")],
)  # fmt: skip
def test_a_plan_says_times_in_units_that_are_read(seconds, shown):
    plan = FitPlan({"train": 96}, 4, 5, 3, 6, 12, {"head": 1}, 10, True, {"head": seconds})
    assert re.search(rf"^  total +{re.escape(shown)}$", str(plan), re.MULTILINE)


def test_a_plan_writes_nothing_and_its_sizes_are_right(tmp_path):
    options = {"prompt": RegionPrompt("crop", (2, 2), 4), "store_path": tmp_path / "store"}
    plan = plan_salf_cbm(backbone(), "1", (X, Y), Colours(), WORDS, 3, within_hours=1e-9, **options)
    assert not (tmp_path / "store").exists()
    assert (plan.cells, plan.concepts, plan.embedding_dim, plan.feature_dim, plan.cached) == (4, 5, 6, 12, True)
    assert plan.bytes["region embeddings"] == 96 * 4 * 6 * 2
    assert plan.bytes["backbone features"] == 96 * 4 * 12 * 2
    assert plan.bytes["concept activations"] == 96 * 5 * 4
    assert plan.total_seconds > 0
    assert plan.processes > 1000
    assert "96 images of train" in str(plan)
    assert plan.as_dict()["processes"] == plan.processes
    fit(tmp_path / "store")
    for name, folder in {"region embeddings": "regions-train", "backbone features": "features-train-*"}.items():
        (found,) = (tmp_path / "store").glob(folder)
        stored = sum(file.stat().st_size for file in found.glob("shard-*"))
        assert plan.bytes[name] <= stored < plan.bytes[name] + 2000
    with pytest.raises(InputError, match="within_hours"):
        plan_salf_cbm(backbone(), "1", (X, Y), Colours(), WORDS, 3, within_hours=0, **options)
    small = plan_salf_cbm(backbone(), "1", (X, Y), Colours(), WORDS, 3, max_cache_bytes=10, **options)
    assert not small.cached
    assert "on the fly" in str(small)
