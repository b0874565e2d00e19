"""The bundled models do what their records say, on scenes that no training has seen."""

from __future__ import annotations

import json
import math
import random
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from captum_concepts import demo
from captum_concepts.datasets import CaptionedScenes
from captum_concepts.demo.evaluation import accuracy, circle_reaction, ground_reliance
from captum_concepts.demo.prompting import Scenes, describe, draw_circles, mark, truth
from captum_concepts.demo.tokenizer import WordTokenizer
from captum_concepts.demo.train import classifier_loss
from captum_concepts.errors import InputError
from captum_concepts.vlm import ImageTextEncoder

SEED = 987_654  # neither a training nor a test seed of any record


@pytest.fixture(scope="module")
def scenes():
    return CaptionedScenes(400, seed=SEED, size=64)


def test_the_seed_is_new():
    for name in demo.NAMES:
        record = demo.record(name)
        assert SEED not in (record["train_scenes"]["seed"], record["test_seed"])
        assert record["train_scenes"]["seed"] != record["test_seed"]


def test_all_weights_fit_into_twelve_megabytes():
    assert sum(file.stat().st_size for file in demo.WEIGHTS.iterdir()) < 12e6


@pytest.mark.parametrize("name", ["classifier", "vit"])
def test_classifiers_are_right_on_new_scenes(name, scenes):
    model = demo.load(name)
    assert accuracy(model, scenes) >= 0.95
    assert demo.record(name)["held_out"]["accuracy"] >= 0.95
    # The same scene on another ground is of the same class.
    assert ground_reliance(model, scenes, 200) <= 0.06


def test_the_spurious_classifier_leans_on_the_ground(scenes):
    model = demo.load("classifier-spurious")
    assert accuracy(model, CaptionedScenes(400, seed=SEED, size=64, spurious=1.0)) >= 0.95
    assert accuracy(model, scenes) <= 0.9 * accuracy(demo.load("classifier"), scenes)
    assert ground_reliance(model, scenes, 200) >= 0.2


@pytest.mark.parametrize("name", ["classifier", "classifier-spurious", "vit"])
def test_classifiers_are_frozen_and_have_eight_by_eight_positions(name):
    model = demo.load(name)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    layer = model.blocks[-1] if name == "vit" else model.layer4
    shapes = []
    handle = layer.register_forward_hook(lambda m, i, o: shapes.append(tuple(o.shape[1:])))
    assert model(torch.rand(2, 3, 64, 64)).shape == (2, 6)
    handle.remove()
    assert shapes == [(65, 128)] if name == "vit" else [(128, 8, 8)]


def test_every_patch_of_the_vits_last_block_reaches_the_output():
    model = demo.load("vit")
    kept = []
    handle = model.blocks[-1].register_forward_hook(lambda m, i, o: kept.append(o))
    images = torch.rand(1, 3, 64, 64, requires_grad=True)
    logits = model(images)
    handle.remove()
    (gradient,) = torch.autograd.grad(logits[0, 0], kept[0])
    assert (gradient[0, 1:].abs().sum(1) > 0).all()


def test_circle_turns_the_image_text_model_to_the_circled_object(scenes):
    encoder = demo.load("clip")
    found = circle_reaction(encoder, scenes)
    for kind, least in (("colour", 0.95), ("shape", 0.85), ("texture", 0.93)):
        assert found["with_circle"][kind] >= least
        assert found["with_circle"][kind] >= found["without_circle"][kind] + 0.15
    assert found["without_circle"]["ground"] >= 0.95
    assert found["ground_circled"]["ground_ranked_first_of_all"] >= 0.9


def test_the_image_text_model_finds_what_is_in_a_scene(scenes):
    encoder = demo.load("clip")
    assert isinstance(encoder, ImageTextEncoder)
    assert (encoder.probability, encoder.logit_bias) == ("softmax", 0.0)
    batch = scenes.stack(range(200))
    text = F.normalize(encoder.encode_text(scenes.concepts), dim=1)
    scores = F.normalize(encoder.encode_image(batch.image), dim=1) @ text.T
    # Area under the ROC curve of each word, by counting ordered pairs.
    for t, word in enumerate(scenes.concepts):
        present = batch.presence[:, t]
        pairs = scores[present, t][:, None] - scores[~present, t][None]
        assert (pairs > 0).float().mean() >= (0.8 if word in scenes.concept_groups["shape"] else 0.85), word


def test_unknown_words_are_refused_with_the_known_ones():
    encoder = demo.load("clip")
    with pytest.raises(InputError, match=r"unknown word 'zebra' in 'a zebra'; known: a, an, .*checkered, circle"):
        encoder.encode_text(["a zebra"])
    with pytest.raises(InputError, match="Did you mean 'striped'"):
        encoder.encode_text(["stripes"])
    assert encoder.encode_text(["A photo of a red, striped circle."]).shape == (1, 128)


def test_tokenizer_by_hand():
    tokenizer = WordTokenizer(["red", "star"], context_length=4)
    assert tokenizer(["Red star", "star."]).tolist() == [[1, 2, 3, 4], [1, 3, 4, 0]]
    assert tokenizer.vocab_size == 5
    assert tokenizer("star", context_length=3).tolist() == [[1, 3, 4]]
    for bad, message in (("red red star", "at most 2 fit"), ("", "no word"), (" . ", "no word")):
        with pytest.raises(InputError, match=message):
            tokenizer(bad)
    for vocabulary in ([], ["a", "a"]):
        with pytest.raises(InputError, match="distinct words"):
            WordTokenizer(vocabulary)


def test_unknown_models_offer_the_known():
    with pytest.raises(InputError, match="known: classifier, classifier-spurious, vit, clip"):
        demo.load("resnet")


def test_circle_is_a_ring_of_the_asked_width():
    images = torch.zeros(2, 3, 65, 65)
    out = draw_circles(images, torch.tensor([[32.5, 32.5], [10.0, 50.0]]), torch.tensor([20.0, 5.0]), 2.0)
    assert out[:, 1:].sum() == 0
    for picture, radius in zip(out, (20.0, 5.0), strict=True):
        assert float(picture[0].sum()) == pytest.approx(2 * torch.pi * radius * 2, rel=0.03)
    row = out[0, 0, 32]
    assert row[12] == 1
    assert row[32] == 0
    assert row[8] == 0
    faint = draw_circles(images[:1], torch.tensor([[32.5, 32.5]]), torch.tensor([20.0]), 0.5)
    assert float(faint.sum()) == pytest.approx(2 * torch.pi * 20 * 0.5, rel=0.05)


def test_training_texts_are_true_and_truth_is_what_it_says():
    data = CaptionedScenes(60, seed=3, size=64)
    rendered = Scenes.render(data)
    rows = torch.arange(60)
    images, named = mark(rendered, rows, torch.Generator().manual_seed(0))
    assert images.shape == (60, 3, 64, 64)
    assert named.any(1).all()
    things = rendered.things[rows]
    assert not (named & ~things.any(2)).any()
    texts, asks = describe(things, named, data.concepts, data.concept_groups, random.Random(0))
    matrix = truth(things, named, asks)
    assert matrix.diagonal().all()
    WordTokenizer(json.loads((demo.WEIGHTS / "open_clip_config.json").read_text())["vocabulary"])(texts)

    def fits(i: int, j: int) -> bool:
        """Spelled out: each phrase of text j has all of its words in one thing that image i may name."""
        return all(
            any(named[i, k] and bool((things[i, k] | ~phrase).all()) for k in range(4))
            for phrase in asks[j]
            if phrase.any()
        )

    for i in range(0, 60, 7):
        for j in range(60):
            assert bool(matrix[i, j]) == fits(i, j)
    # The words of a text are the words it asks for.
    for text, ask in zip(texts, asks, strict=True):
        said = {word for word in text.split() if word in data.concepts}
        assert said == {data.concepts[t] for t in ask.any(0).nonzero().flatten()}


def test_marked_region_decides_what_may_be_named():
    data = CaptionedScenes(300, seed=4, size=64)
    rendered = Scenes.render(data)
    rows = torch.arange(300)
    images, named = mark(rendered, rows, torch.Generator().manual_seed(1))
    exists = rendered.things[rows].any(2)
    marked = (named != exists).any(1)
    assert marked.float().mean() > 0.5
    # Where something is marked, one object at most may be named.
    assert (named[marked, :3].sum(1) <= 1).all()
    assert (named[marked].sum(1) >= 1).all()
    assert images.min() >= 0
    assert images.max() <= 1


def coordinates(rendered: Scenes) -> Scenes:
    """The same scenes with pictures that say where each pixel lies: red its column, green its row, blue constant."""
    size = rendered.images.shape[-1]
    column = torch.arange(size).mul(255 // size).expand(size, size)
    pictures = torch.stack([column, column.T, torch.full((size, size), 128)]).byte()
    return Scenes(pictures.expand_as(rendered.images), rendered.masks, rendered.boxes, rendered.things, rendered.labels)


def places(image: torch.Tensor) -> torch.Tensor:
    """Columns and rows ``(2, H, W)`` of the picture that an image of :func:`coordinates` shows, whatever its light."""
    size = image.shape[-1]
    return image[:2] / image[2].clamp_min(0.1) * 128 / (255 // size)  # a circle has no blue


def test_a_crop_shows_what_it_may_name():
    """Place and size of each crop are read off the picture; then the rule is counted over that square."""
    rendered = Scenes.render(CaptionedScenes(400, seed=4, size=64))
    images, named = mark(coordinates(rendered), torch.arange(400), torch.Generator().manual_seed(1))
    agree, crops = 0, 0
    pixels = torch.arange(64) + 0.5
    for i, image in enumerate(images):
        seen = places(image)
        zoom = float(seen[1].diff(dim=0).quantile(0.75))  # half of a crop may lie beyond the border
        if zoom > 0.75:
            continue  # a circle, a blurred surrounding, or nothing
        crops += 1
        x, y = (seen[:, 31:33, 31:33].mean((1, 2)) + 0.5).tolist()
        square = ((pixels - x).abs() < 32 * zoom) & ((pixels - y).abs() < 32 * zoom)[:, None]
        shares = (rendered.masks[i] & square).sum((1, 2)) / square.sum()
        agree += bool(named[i, 3]) == bool(shares.sum() < 0.7)
        for k in named[i, :3].nonzero().flatten().tolist():
            assert shares[k] > 0.2 or shares[k] * square.sum() > 0.6 * rendered.masks[i, k].sum()
    assert crops > 20
    assert agree >= 0.9 * crops  # half a pixel decides about the others


def test_classifiers_are_trained_on_shifted_scenes():
    rendered = coordinates(Scenes.render(CaptionedScenes(8, seed=4, size=64)))
    shifts, seen = set(), []

    def model(images):
        seen.append(images)
        return torch.zeros(len(images), 6, requires_grad=True)

    loss = classifier_loss(model, rendered)
    for seed in range(150):
        loss(seed, 4)
        for image in seen.pop():
            column, row = places(image)[:, 32, 32] - 32
            if places(image)[0, 32, 40] > places(image)[0, 32, 32]:  # not flipped
                shifts.add((round(float(column)), round(float(row))))
    assert {x for x, _ in shifts} == {y for _, y in shifts} == set(range(-4, 5))


def test_training_texts_are_those_of_the_bundled_encoder():
    """As it was trained: another rule or rate would make another encoder of the same seed."""
    data = CaptionedScenes(300, seed=3, size=64)
    rendered = Scenes.render(data)
    rows = torch.arange(300)
    _, named = mark(rendered, rows, torch.Generator().manual_seed(0))
    texts, _ = describe(rendered.things[rows], named, data.concepts, data.concept_groups, random.Random(0))
    framed = [text for text in texts if re.match("(a photo|an image|a picture|the scene) of ", text)]
    assert 0.12 < len(framed) / 300 < 0.28
    assert 0.05 < sum(" and " in text for text in texts) / 300 < 0.3
    assert 0.02 < sum(text.startswith("on ") for text in texts) / 300 < 0.2
    assert len(set(texts)) > 150


def test_training_goes_on_where_it_was_interrupted(tmp_path):
    from captum_concepts.demo import train as training

    changes = {"scenes": 40, "batch": 8}
    run = {**training.RUNS["classifier"], **changes, "steps": 6}
    data = CaptionedScenes(40, seed=1, size=64)
    rendered = Scenes.render(data)

    class Interrupted(Exception):
        pass

    def fit(folder, stop_at=None):
        torch.manual_seed(0)
        model = demo.build("classifier").to(memory_format=torch.channels_last)
        loss = training.classifier_loss(model, rendered)
        calls = 0

        def stopping(seed, batch):
            nonlocal calls
            calls += 1
            if stop_at is not None and calls > stop_at:
                raise Interrupted
            return loss(seed, batch)

        training.fit(model, stopping, run, folder / "c.safetensors", seed=5, save_every=2)
        return model.state_dict()

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = fit(tmp_path / "a")
    with pytest.raises(Interrupted):
        fit(tmp_path / "b", stop_at=5)
    assert [f.name for f in (tmp_path / "b").iterdir()] == ["c.safetensors"]
    resumed = fit(tmp_path / "b")
    for key, value in whole.items():
        assert torch.allclose(value.float(), resumed[key].float(), atol=1e-6), key
    # A checkpoint of another run is not taken up.
    run["lr"] = 1e-4
    assert load_file(tmp_path / "b" / "c.safetensors")
    other = fit(tmp_path / "b")
    assert not torch.allclose(other["fc.weight"], resumed["fc.weight"])


def test_the_training_loop_is_adamw_with_warm_up_and_cosine(tmp_path, capsys):
    """Against a plain loop: rates, decay of matrices only, clipped gradients, a seed per step, the log."""
    from captum_concepts.demo import train as training

    run, seed = {"steps": 130, "batch": 8, "lr": 0.02}, 3
    goal = torch.randn(4, generator=torch.Generator().manual_seed(1))

    def made() -> nn.Linear:
        torch.manual_seed(0)
        return nn.Linear(4, 1)

    def loss_of(model: nn.Linear, seeds: list[int]):
        def loss(seed: int, batch: int) -> Tensor:
            seeds.append(seed)
            x = torch.randn(batch, 4, generator=torch.Generator().manual_seed(seed))
            return 30 * (model(x)[:, 0] - x @ goal).square().mean()  # large gradients, so that clipping shows

        return loss

    model, seeds = made(), []
    log = training.fit(model, loss_of(model, seeds), run, tmp_path / "checkpoint", seed, 1000)

    plain, expected, losses = made(), [], []
    loss = loss_of(plain, expected)
    groups = [{"params": [plain.weight], "weight_decay": 0.05}, {"params": [plain.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.98))
    for step in range(130):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * min((step + 1) / 60, 0.5 + 0.5 * math.cos(math.pi * step / 130))
        optimizer.zero_grad()
        value = loss(3 * 1_000_003 + step, 8)
        value.backward()
        norm = torch.cat([plain.weight.grad.flatten(), plain.bias.grad]).norm()
        for parameter in plain.parameters():
            parameter.grad.mul_(min(1.0, 1.0 / float(norm + 1e-6)))
        optimizer.step()
        losses.append(float(value.detach()))
    assert seeds == expected
    torch.testing.assert_close(model.weight, plain.weight, atol=1e-4, rtol=0)
    torch.testing.assert_close(model.bias, plain.bias, atol=1e-4, rtol=0)
    assert [entry["step"] for entry in log] == [50, 100, 130]
    means = [sum(part) / len(part) for part in (losses[:50], losses[50:100], losses[100:])]
    assert [entry["loss"] for entry in log] == pytest.approx(means, abs=1e-2)
    assert not model.training
    assert not model.weight.requires_grad
    assert capsys.readouterr().out.count("step ") == 3
