"""`evaluate`: any explainer over any data, confidence intervals, and what the table says about it."""

from __future__ import annotations

import csv
import gc
import io
import json
import math
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from captum.attr import LayerGradCam, Saliency
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from captum_concepts import ConceptExplanation, metrics
from captum_concepts.errors import InputError


def scenes(n: int = 20, size: int = 12) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noise with a bright square; the class says whether it is red or green."""
    g = torch.Generator().manual_seed(0)
    masks = torch.zeros(n, size, size, dtype=torch.bool)
    at = torch.randint(0, size - 4, (n, 2), generator=g)
    for mask, (y, x) in zip(masks, at.tolist(), strict=True):
        mask[y : y + 4, x : x + 4] = True
    target = torch.randint(0, 2, (n,), generator=g)
    images = 0.3 * torch.rand(n, 3, size, size, generator=g)
    images[torch.arange(n), target] += masks
    return images, masks, target


class Net(nn.Module):
    """Two channels that see red and green, and a linear head: its Grad-CAM is the square."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1, bias=False)
        self.conv.weight.data = torch.eye(3)[:2, :, None, None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).relu().mean((2, 3)) * 5


class Scenes(Dataset):
    def __init__(self) -> None:
        self.data = scenes()

    def __len__(self) -> int:
        return len(self.data[0])

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        return self.data[0][i], self.data[1][i], int(self.data[2][i])


def test_every_kind_of_explainer_and_data_gives_the_functional_value():
    net = Net()
    images, masks, target = scenes()
    cam = LayerGradCam(net, net.conv)
    maps = cam.attribute(images, target=target).detach()
    expected = metrics.nra(maps, masks).double().mean().item()
    explanation = ConceptExplanation(["object"], torch.ones(20, 1), maps)
    explainers = {
        "captum": cam,
        "callable": lambda x, target: cam.attribute(x, target=target),
        "explains": lambda x, target: ConceptExplanation(["o"], torch.ones(len(x), 1), cam.attribute(x, target=target)),
        "explanation": explanation,
    }
    sets = {
        "dataset": Scenes(),
        "loader": DataLoader(Scenes(), batch_size=7),
        "tensors": TensorDataset(images, masks, target),
        "one batch": [(images, masks, target)],
        "generator": ({"inputs": a, "masks": m, "target": t} for a, m, t in zip(images, masks, target, strict=True)),
    }
    for name, data in sets.items():
        table = metrics.evaluate(explainers, data, ["nra"], batch_size=6, n_bootstrap=0)
        for row in table.rows:
            assert row["value"] == pytest.approx(expected, abs=1e-6), (name, row)
            assert row["examples"] == row["counted"] == 20


def test_every_named_metric_and_functions_of_ones_own():
    net = Net()
    images, masks, target = scenes()
    pairs = torch.stack([masks, ~masks], 1)

    def probabilities(x: torch.Tensor) -> torch.Tensor:
        return net(x).softmax(1)

    words = ("top1_present", "concept_auroc", "presence_brier", "concept_existence")
    names = [name for name in metrics.METRICS if name not in ("concept_specificity", *words)]
    table = metrics.evaluate(
        LayerGradCam(net, net.conv),
        [(images, masks, target)],
        {**{name: name for name in names}, "mine": lambda maps, masks: maps.flatten(1).amax(1)},
        score_fn=probabilities,
        n_bootstrap=20,
    )
    maps = LayerGradCam(net, net.conv).attribute(images, target=target).detach()
    value = {row["metric"]: row["value"] for row in table.rows}
    for name in names:
        if name in ("average_drop", "increase_in_confidence", "insertion", "deletion"):
            expected = getattr(metrics, name)(probabilities, images, maps, target=target).mean()
        elif name == "nra_exact":
            expected = metrics.nra(maps, masks, baseline="exact").mean()
        else:
            expected = getattr(metrics, name)(maps, masks).mean()
        assert value[name] == pytest.approx(expected.item(), abs=1e-5), name
    assert value["mine"] == pytest.approx(maps.flatten(1).amax(1).mean().item(), abs=1e-6)
    both = metrics.evaluate(
        lambda x: torch.stack([x.sum(1), -x.sum(1)], 1), [(images, pairs)], ["concept_specificity"], n_bootstrap=0
    )
    assert both.rows[0]["counted"] == 40
    assert both.rows[0]["value"] > 0.5


def test_worse_maps_score_worse_and_blind_maps_have_no_specificity():
    images, masks, target = scenes(40)
    net = Net()
    cam = LayerGradCam(net, net.conv)
    explainers = {
        "cam": cam,
        "other class": lambda x, target: cam.attribute(x, target=1 - target),
        "other image": lambda x, target: cam.attribute(x, target=target).roll(1, 0),
        "random": metrics.RandomMaps(),
        "centre": metrics.CenterGaussian(),
    }
    table = metrics.evaluate(explainers, [(images, masks, target)], ["nra", "epg", "mean_iou", "average_precision"])
    for metric in ("nra", "epg", "mean_iou", "average_precision"):
        best = table.row("cam", metric)
        for worse in list(explainers)[1:]:
            assert best["ci_low"] > table.row(worse, metric)["ci_high"], (metric, worse)
            assert table.compare(metric, "cam", worse)["ci_low"] > 0
    regions = torch.stack([masks, masks.roll(5, 1)], 1)
    blind = metrics.evaluate(
        {"random": metrics.RandomMaps(n_maps=2), "centre": metrics.CenterGaussian(n_maps=2)},
        [(images, regions)],
        ["concept_specificity"],
    )
    assert blind.row("centre", "concept_specificity")["value"] == pytest.approx(0, abs=1e-9)
    random = blind.row("random", "concept_specificity")
    assert random["ci_low"] < 0 < random["ci_high"]


def test_bootstrap_intervals_cover_and_are_paired():
    """95 % intervals of a mean cover the truth about 95 times in 100, for means and for ratios of sums."""
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(100):
        values = torch.tensor(rng.random(40), dtype=torch.float32).reshape(40, 1, 1)
        table = metrics.evaluate(
            {"a": lambda x: x[:, 0], "b": lambda x: x[:, 0] + 0.01},
            [(values[:, None], values > 2)],
            {"mean": lambda maps, masks: maps.flatten(1).mean(1)},
            n_bootstrap=200,
            seed=trial,
        )
        row = table.row("a", "mean")
        covered += row["ci_low"] <= 0.5 <= row["ci_high"]
    assert 85 <= covered <= 100
    paired = table.compare("mean", "b", "a")  # the images are the same, so the difference is certain
    assert paired["ci_low"] == pytest.approx(0.01, abs=1e-6)
    assert paired["ci_high"] == pytest.approx(0.01, abs=1e-6)


def test_skipped_values_are_in_the_table_and_streaming_state_is_not_touched():
    images, masks, _ = scenes(6)
    masks[0] = False
    metric = metrics.NormalizedRegionAccuracy(baseline="exact")
    table = metrics.evaluate(lambda x: x.sum(1), [(images, masks)], {"nra": metric, "pixels": "pixel_accuracy"})
    row = table.row("<lambda>", "nra")
    assert (row["examples"], row["counted"], row["skipped"]) == (6, 5, 1)
    assert int(metric.counted) == 0
    assert "nra 1 (counted 5)" in table.to_markdown()
    masks[:] = False
    empty = metrics.evaluate(lambda x: x.sum(1), [(images, masks)], ["nra"])
    assert math.isnan(empty.rows[0]["value"])
    assert "undefined" in str(empty)


def test_names_are_neither_formulas_nor_columns():
    images, masks, _ = scenes(2)
    names = ["=HYPERLINK(1)", "a|b\nc", "-2+3"]
    table = metrics.evaluate({name: lambda x: x.sum(1) for name in names}, [(images, masks)], ["epg"])
    rows = list(csv.DictReader(io.StringIO(table.to_csv())))
    assert [row["explainer"] for row in rows] == ["'=HYPERLINK(1)", "a|b\nc", "'-2+3"]
    lines = table.to_markdown().splitlines()
    assert lines[3].startswith("| a\\|b c | ")
    assert all(line.replace("\\|", "").count("|") == 3 for line in lines[:5])


def test_csv_json_and_markdown(tmp_path):
    images, masks, _ = scenes(6)
    data = [(images, masks)]
    table = metrics.evaluate({"a": lambda x: x.sum(1), "b": lambda x: -x.sum(1)}, data, ["nra", "epg"])
    rows = list(csv.DictReader(io.StringIO(table.to_csv(tmp_path / "t.csv"))))
    assert [(r["explainer"], r["metric"]) for r in rows] == [("a", "nra"), ("a", "epg"), ("b", "nra"), ("b", "epg")]
    assert float(rows[0]["value"]) == table.rows[0]["value"]
    assert (tmp_path / "t.csv").read_text() == table.to_csv()
    text = table.to_json(tmp_path / "t.json")
    assert json.loads(text)["rows"][0] == table.rows[0]
    again = metrics.EvaluationTable.from_json((tmp_path / "t.json").read_text())
    assert again.to_markdown() == table.to_markdown()
    with pytest.raises(InputError, match="digits"):
        table.to_markdown(digits=-1)
    lines = table.to_markdown(digits=2).splitlines()
    assert lines[0] == "| explainer | nra ↑ | epg ↑ |"
    assert lines[2].startswith(f"| a | {table.rows[0]['value']:.2f} [{table.rows[0]['ci_low']:.2f}, ")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.csv", "t.json"]
    no_interval = metrics.evaluate(lambda x: x.sum(1), data, ["nra"], n_bootstrap=0)
    assert json.loads(no_interval.to_json())["rows"][0]["ci_low"] is None
    with pytest.raises(InputError, match="n_bootstrap"):
        no_interval.compare("nra", "<lambda>", "<lambda>")
    with pytest.raises(InputError, match="Did you mean"):
        table.row("a", "nar")
    with pytest.raises(InputError, match="the JSON of an evaluation table"):
        metrics.EvaluationTable.from_json("{}")


@pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients")
def test_input_attributions_become_one_map():
    net = Net()
    images, masks, target = scenes()
    for channels, reduce in (("sum", lambda a: a.sum(1)), ("abs_sum", lambda a: a.abs().sum(1))):
        saliency = Saliency(net)
        table = metrics.evaluate(saliency, [(images, masks, target)], ["epg"], channels=channels, n_bootstrap=0)
        expected = metrics.epg(reduce(saliency.attribute(images, target=target)), masks).mean().item()
        assert table.rows[0]["value"] == pytest.approx(expected, abs=1e-6)
        assert table.rows[0]["explainer"] == "Saliency"


def test_examples_of_several_sizes_and_a_progress_bar(capsys):
    data = [(torch.rand(3, s, s), torch.eye(s).bool()) for s in (8, 8, 10, 8)]
    table = metrics.evaluate(lambda x: x.mean(1), data, ["nra"], n_bootstrap=0, show_progress=True)
    assert table.rows[0]["examples"] == 4
    assert "evaluate" in capsys.readouterr().err


def test_of_an_example_only_numbers_are_kept():
    """Of an image 24 bytes per explainer and metric, not the 700 of an array object, and no tensor."""
    found = {}

    def data():
        for i in range(401):
            if i in (100, 400):
                gc.collect()
                tensors = sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())
                found[i] = (tensors, tracemalloc.get_traced_memory()[0])
            # Every other one has another shape, so that each is a batch of its own.
            yield torch.rand(3, 8 + i % 2, 8), torch.eye(8 + i % 2, 8).bool()

    explainers = {"mean": lambda x: x.mean(1), "inverse": lambda x: -x.mean(1)}
    tracemalloc.start()
    try:
        table = metrics.evaluate(explainers, data(), ["nra", "hit_rate"], n_bootstrap=0)
    finally:
        tracemalloc.stop()
    assert table.row("mean", "nra")["examples"] == 401
    tensors, size = found[400][0] - found[100][0], found[400][1] - found[100][1]
    assert tensors < 300  # not one per image: other threads of the process may make or drop a few
    assert size < 300 * 2 * 2 * 150


class Colors:
    """A ConceptExplainer that sees colors; its order and spelling are its own."""

    concepts = ("Green_light", "red", "blue, azure")

    def __init__(self, presence: bool = True) -> None:
        self.presence = presence
        self.asked: list[list[str]] = []

    def scores(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.amax((2, 3))[:, [1, 0, 2]]

    def concept_maps(self, inputs: torch.Tensor, concepts=None) -> torch.Tensor:
        names = list(self.concepts) if concepts is None else list(concepts)
        self.asked.append(names)
        return inputs[:, [{"Green_light": 1, "red": 0, "blue, azure": 2}[name] for name in names]]

    def attribute(self, inputs: torch.Tensor, target=None) -> torch.Tensor:
        return self.concept_maps(inputs)

    def explain(self, inputs, target=None, *, concepts=None, top_k=5, rank_by="scores", contributions=True):
        names = list(concepts)
        columns = [self.concepts.index(name) for name in names]
        scores = self.scores(inputs)[:, columns]
        presence = (scores > 0.5).float() * 0.8 + 0.1 if self.presence else None
        return ConceptExplanation(names, scores, self.concept_maps(inputs, names), presence=presence)


def colored(n: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of one red and one green square, and the masks of red, green light, purple."""
    g = torch.Generator().manual_seed(3)
    images, masks = 0.2 * torch.rand(n, 3, 12, 12, generator=g), torch.zeros(n, 3, 12, 12, dtype=torch.bool)
    masks[:, 0, 1:5, 1:5] = masks[:, 1, 7:11, 6:10] = masks[:, 2, 0, 0] = True
    images[:, :2] += masks[:, :2]
    return images, masks


class TestConceptExplainers:
    names = ("red", "green-light", "purple")

    def test_maps_are_matched_by_name_and_unknown_names_are_listed(self):
        images, masks = colored()
        explainer = Colors()
        data = [(images, masks)]
        by_order = lambda x: torch.stack([x[:, 0], x[:, 1], x[:, 2]], 1)  # noqa: E731
        table = metrics.evaluate(
            {"colors": explainer, "callable": by_order}, data, ["nra", "concept_specificity"],
            concepts=self.names, n_bootstrap=50,
        )  # fmt: skip
        assert explainer.asked == [["red", "Green_light"]]
        expected = metrics.nra(images[:, :2], masks[:, :2]).mean().item()
        for name in ("colors", "callable"):
            row = table.row(name, "nra")
            assert row["value"] == pytest.approx(expected, abs=1e-6)
            assert row["counted"] == 24
        assert table.unmatched == ["purple"]
        assert "1 concepts of the data are not among the explainers': purple" in table.to_markdown()
        assert metrics.EvaluationTable.from_json(table.to_json()).unmatched == ["purple"]

    @pytest.mark.parametrize("ignored", [(12, 12), (1, 12, 12)])
    def test_an_image_without_known_concepts_may_have_ignored_pixels(self, ignored):
        images, masks = colored()
        metric_names = ["nra", "epg", "iou", "hit_rate", "box_iou"]
        items = [
            {"image": images[i], "masks": masks[i, :1], "concepts": [name], "ignore": torch.zeros(ignored).bool()}
            for i, name in enumerate(("red", "purple"))
        ]
        table = metrics.evaluate({"colors": Colors()}, items, metric_names, n_bootstrap=0)
        alone = metrics.evaluate({"colors": Colors()}, items[:1], metric_names, n_bootstrap=0)
        assert table.unmatched == ["purple"]
        for name in metric_names:
            assert table.row("colors", name)["value"] == alone.row("colors", name)["value"]
            assert table.row("colors", name)["counted"] == 1

    def test_items_name_their_own_masks(self):
        images, masks = colored()
        items = [
            {"image": images[i], "masks": masks[i, rows], "concepts": [self.names[k] for k in rows]}
            for i, rows in enumerate([[0, 1], [1, 0], [1], [0]] * 3)
        ]
        table = metrics.evaluate(Colors(), items, ["nra"], n_bootstrap=0)
        pairs = [(images[i], masks[i, k]) for i, rows in enumerate([[0, 1], [1, 0], [1], [0]] * 3) for k in rows]
        rows = [k for rows in [[0, 1], [1, 0], [1], [0]] * 3 for k in rows]
        expected = [metrics.nra(x[None, k], m[None]).item() for (x, m), k in zip(pairs, rows, strict=True)]
        assert table.rows[0]["value"] == pytest.approx(sum(expected) / len(expected), abs=1e-6)

    def test_one_mask_an_image_with_the_name_of_its_concept(self):
        images, masks = colored()
        items = [{"inputs": images[i], "masks": masks[i, i % 3], "concepts": self.names[i % 3]} for i in range(12)]
        table = metrics.evaluate(Colors(), items, ["nra"], n_bootstrap=0, batch_size=5)
        expected = [
            metrics.nra(images[i : i + 1, i % 3], masks[i : i + 1, i % 3]).item() for i in range(12) if i % 3 < 2
        ]
        row = table.rows[0]
        assert (row["counted"], row["skipped"]) == (8, 0)
        assert row["value"] == pytest.approx(sum(expected) / 8, abs=1e-6)
        assert table.unmatched == ["purple"]

    def test_names_that_are_unknown_are_left_out_of_every_metric_of_every_explainer(self):
        images, masks = colored()
        names = [self.names[i % 3] for i in range(12)]
        items = [
            {"inputs": images[i], "masks": masks[i, i % 3], "concepts": names[i], "target": torch.tensor(i)}
            for i in range(12)
        ]
        known = [i for i in range(12) if i % 3 < 2]
        seen = []

        def own(maps, region):
            seen.extend(region.flatten(1).sum(1).tolist())
            return maps.flatten(1).amax(1)

        whole = ConceptExplanation(["object"], torch.ones(12, 1), images[:, :1])
        explainers = {
            "colors": Colors(), "callable": lambda x, target: x[:, 0] + target[:, None, None], "explanation": whole,
        }  # fmt: skip
        measures = {"iou": "iou", "drop": "average_drop", "own": own}
        score = lambda x: x.flatten(1).mean(1)  # noqa: E731
        for batch_size in (1, 5, 12):  # 1: batches in which no name is known
            seen.clear()
            table = metrics.evaluate(explainers, items, measures, n_bootstrap=9, batch_size=batch_size, score_fn=score)
            alone = metrics.evaluate(
                explainers | {"explanation": ConceptExplanation(["o"], torch.ones(8, 1), images[known, :1])},
                [items[i] for i in known], measures, n_bootstrap=9, batch_size=batch_size, score_fn=score,
            )  # fmt: skip
            assert table.unmatched == ["purple"]
            assert min(seen) > 0
            for row, expected in zip(table.rows, alone.rows, strict=True):
                assert (row["counted"], row["skipped"], row["examples"]) == (8, 0, 12)
                assert row["value"] == pytest.approx(expected["value"], abs=1e-6), row

    def test_whether_words_are_right_needs_all_that_an_image_shows(self):
        images, masks = colored()
        items = [{"inputs": images[i], "masks": masks[i, 0], "concepts": "red"} for i in range(4)]
        with pytest.raises(InputError, match="need all concepts of an image"):
            metrics.evaluate(Colors(), items, ["top1_present"], concepts=self.names)

    def test_class_labels_never_become_concepts(self):
        images, masks = colored()
        labels = torch.zeros(12, dtype=torch.long)
        with pytest.raises(InputError, match="3 maps for one mask per image"):
            metrics.evaluate(Colors(), [(images, masks[:, 0], labels)], ["nra"])
        asks_for_concepts = Colors()
        asks_for_concepts.target_is_concept = True
        with pytest.raises(InputError, match="class labels are not concepts"):
            metrics.evaluate(asks_for_concepts, [(images, masks[:, 0], labels)], ["nra"])
        with pytest.raises(InputError, match="have no names"):
            metrics.evaluate(Colors(), [(images, masks)], ["nra"])
        with pytest.raises(InputError, match="do not fit the 2 concepts"):
            metrics.evaluate(Colors(), [(images, masks)], ["nra"], concepts=["red", "purple"])

    def test_is_the_word_right(self):
        images, masks = colored()
        images[0, 0] = 0.1  # the first image does not show red, and its mask is empty; the last shows nothing of either
        masks[0, 0] = False
        masks[-1, :2] = False
        table = metrics.evaluate(
            Colors(), [(images, masks)], ["top1_present", "concept_auroc", "presence_brier"],
            concepts=self.names, n_bootstrap=0,
        )  # fmt: skip
        top1, auroc, brier = (table.rows[k] for k in range(3))
        assert (top1["value"], top1["counted"], top1["skipped"]) == (1, 11, 1)
        assert (auroc["value"], auroc["counted"]) == (1, 1)  # the first image alone shows one of the two
        assert brier["value"] == pytest.approx((11 * 0.01 + 0.81) / 12, abs=1e-6)
        colors = Colors()
        with pytest.raises(InputError, match="no contributions"):
            metrics.evaluate(colors, [(images, masks)], ["concept_existence"], concepts=self.names)
        colors.contributions = lambda x, target=None, concepts=None: torch.tensor([[1.0, 2.0]]).expand(len(x), -1)
        table = metrics.evaluate(
            colors, [(images, masks)], {"one": metrics.ConceptExistence(k=1), "all": "concept_existence"},
            concepts=self.names, n_bootstrap=0,
        )  # fmt: skip
        assert [row["value"] for row in table.rows] == [pytest.approx(11 / 12), pytest.approx((10 + 0.5) / 12)]
        with pytest.raises(InputError, match="does not decide which concepts are present"):
            metrics.evaluate(Colors(presence=False), [(images, masks)], ["presence_brier"], concepts=self.names)
        with pytest.raises(InputError, match="require ConceptExplainers"):
            metrics.evaluate(lambda x: x, [(images, masks)], ["top1_present"], concepts=self.names)

    def test_baselines_beside_words_say_none(self):
        """One table with "where" and "is the word right" columns, and rows that only know where."""
        images, masks = colored()
        table = metrics.evaluate(
            {"colors": Colors(), "centre": metrics.CenterGaussian()}, [(images, masks)], ["nra", "top1_present"],
            concepts=self.names, n_bootstrap=20,
        )  # fmt: skip
        assert table.row("colors", "top1_present")["value"] == 1
        row = table.row("centre", "top1_present")
        assert math.isnan(row["value"])
        assert (row["counted"], row["skipped"]) == (0, 0)
        assert table.row("centre", "nra")["counted"] == 24
        assert "undefined |" in table.to_markdown()


def test_the_target_of_the_score_is_not_that_of_the_explainer():
    images, masks, target = scenes(6)
    net, asked = Net(), []

    class Explainer:
        def attribute(self, inputs, target):
            asked.append(target)
            return inputs.sum(1)

    items = [
        {"inputs": x, "masks": m, "target": int(t), "score_target": 1 - int(t)}
        for x, m, t in zip(images, masks, target, strict=True)
    ]
    table = metrics.evaluate(Explainer(), items, ["deletion", "nra"], score_fn=net, n_bootstrap=0)
    assert torch.cat(asked).tolist() == target.tolist()
    expected = metrics.deletion(net, images, images.sum(1), target=1 - target).mean()
    assert table.rows[0]["value"] == pytest.approx(float(expected), abs=1e-6)


def write_masks(root, images, masks):
    """A tree of :class:`MaskFolder`."""
    from PIL import Image

    for part in ("images", "masks"):
        (root / part).mkdir(parents=True)
    for i, (image, mask) in enumerate(zip(images, masks, strict=True)):
        pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(root / "images" / f"{i}.png")
        ids = (mask * torch.arange(1, 4)[:, None, None]).amax(0).byte().numpy()
        Image.fromarray(ids).save(root / "masks" / f"{i}.png")
    (root / "classes.json").write_text('{"1": "red", "2": "green-light", "3": "purple"}')
    return root


@pytest.mark.parametrize("regions", ["present", "all"])
def test_a_folder_of_masks_as_it_is(tmp_path, regions):
    from captum_concepts.datasets import MaskFolder

    images, masks = colored()
    data = MaskFolder(write_masks(tmp_path, images, masks), regions=regions, unlabelled="background")
    explainers = {"colors": Colors(), "centre": metrics.CenterGaussian()}
    table = metrics.evaluate(explainers, data, ["nra", "epg", "top1_present", "concept_auroc"], n_bootstrap=20)
    assert table.unmatched == ["purple"]
    read = (images.clamp(0, 1) * 255).round() / 255
    expected = metrics.nra(read[:, :2], masks[:, :2]).mean().item()
    assert table.row("colors", "nra")["value"] == pytest.approx(expected, abs=1e-6)
    assert table.row("colors", "nra")["counted"] == 24
    assert table.row("colors", "top1_present")["value"] == 1
    assert table.row("centre", "nra")["examples"] == 12


def test_images_of_a_reader_for_a_network_that_wants_normalized_ones(tmp_path):
    from torchvision.models import squeezenet1_1

    from captum_concepts.datasets import MaskFolder
    from captum_concepts.errors import InputWarning
    from captum_concepts.images import preprocessing_of

    images, masks = colored(5)
    data = MaskFolder(write_masks(tmp_path, images, masks), unlabelled="background")
    normalize, seen = preprocessing_of("squeezenet1_1"), []

    def keep(x):
        seen.append(x)
        return x.mean(1)

    metrics.evaluate(
        {"keep": keep}, data, {"mine": lambda maps, _: maps.mean((1, 2))}, transform=normalize, n_bootstrap=0
    )
    torch.testing.assert_close(seen[0], normalize(torch.stack([item.image for item in data])[: len(seen[0])]))
    network = Colors()
    network.forward_func = squeezenet1_1()
    with pytest.warns(InputWarning, match=r"MaskFolder returns images in \[0, 1\].*pass transform="):
        metrics.evaluate({"colors": network}, data, ["nra"], n_bootstrap=0)
    metrics.evaluate({"colors": network}, data, ["nra"], n_bootstrap=0, transform=lambda x: x)


def test_few_examples_have_no_interval():
    images, masks, _ = scenes(8)
    for n, known in ((2, False), (4, False), (5, True), (8, True)):
        table = metrics.evaluate({"a": lambda x: x.sum(1)}, [(images[:n], masks[:n])], ["nra"])
        assert math.isfinite(table.rows[0]["ci_low"]) is known
        assert ("No intervals for fewer than 5 examples" in table.to_markdown()) is not known
    few = metrics.evaluate({"a": lambda x: x.sum(1), "b": lambda x: -x.sum(1)}, [(images[:2], masks[:2])], ["nra"])
    assert math.isnan(few.compare("nra", "a", "b")["ci_low"])
    many = masks[:2, None].expand(-1, 4, -1, -1)  # eight values, but of two images
    both = {"a": lambda x: x[:, :1].expand(-1, 4, -1, -1), "b": lambda x: -x[:, :1].expand(-1, 4, -1, -1)}
    assert math.isnan(metrics.evaluate(both, [(images[:2], many)], ["nra"]).compare("nra", "a", "b")["ci_low"])


def test_the_confidence_is_that_of_the_intervals():
    images, masks, _ = scenes()
    noisy = {"a": lambda x: x.sum(1).roll(2, 1)}
    widths = []
    for confidence in (0.5, 0.95):
        row = metrics.evaluate(noisy, [(images, masks)], ["nra"], confidence=confidence, n_bootstrap=500).rows[0]
        widths.append(row["ci_high"] - row["ci_low"])
    assert 0 < widths[0] < widths[1]


IMAGE, MASK = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.ones(2, 8, 8)


@pytest.mark.parametrize(
    ("explainer", "data", "names", "message"),
    [
        (lambda x: x, [(IMAGE, MASK)], ["nar"], "Did you mean 'nra'"),
        (lambda x: x, [(IMAGE, MASK)], "nra", "list or a dict"),
        (lambda x: x, [(IMAGE, MASK)], ["deletion"], "score_fn"),
        (lambda x: x, [(IMAGE, MASK)], ["nra", "nra"], "two metrics"),
        (lambda x: x, [(IMAGE, MASK)], [3], "a metric is"),
        (lambda x: x, [], ["nra"], "empty"),
        (3, [(IMAGE, MASK)], ["nra"], "not callable"),
        (lambda x: x.sum(), [(IMAGE, MASK)], ["nra"], "must return maps"),
        (lambda x: x[:1, 0], [(IMAGE, MASK)], ["nra"], "must return maps"),
        ({1: lambda x: x}, [(IMAGE, MASK)], ["nra"], "name of each explainer must be a string, got 1"),
        (lambda x: x, [(IMAGE, MASK)], {1: "nra"}, "name of each metric must be a string, got 1"),
        (lambda x: x, [(IMAGE, MASK)], [metrics.MeanIoU], r"pass an instance, MeanIoU\(\)"),
        (lambda x: x, [(IMAGE, MASK)], [lambda maps, masks: torch.tensor(1.0)], r"\(2,\) for this batch, got \(\)"),
        (lambda x: x, [(IMAGE, MASK)], [lambda maps, masks: torch.ones(1)], r"one value per example.* got \(1,\)"),
        (lambda x: x, [(IMAGE, MASK)], [lambda maps, masks: 1.0], "one value per example.* got float"),
        (lambda x: x, [(IMAGE[0], MASK[0], {"a": 1})], ["nra"], "cannot be put into one batch"),
        (lambda x: x, [(IMAGE[0], MASK[0], "a"), (IMAGE[1], MASK[1], 0)], ["nra"], "cannot be put into one batch"),
        (lambda x: x, [(IMAGE, None)], ["nra"], "needs masks"),
        (lambda x: x, [IMAGE], ["nra"], "must yield"),
        (lambda x: x, IMAGE, ["nra"], "must yield"),
        (lambda x: x, {"inputs": IMAGE, "masks": MASK}, ["nra"], r"\[data\]"),
        (lambda x: x, [{"pictures": IMAGE, "masks": MASK}], ["nra"], "keys"),
        (lambda x: x, [(IMAGE, MASK[:1])], ["nra"], "masks must be"),
        (ConceptExplanation(["a"], torch.ones(1, 1), torch.ones(1, 1, 2, 2)), [(IMAGE, MASK)], ["nra"], "more"),
        (ConceptExplanation(["a"], torch.ones(3, 1), torch.ones(3, 1, 2, 2)), [(IMAGE, MASK)], ["nra"], "contains 2"),
        (ConceptExplanation(["a", "b"], torch.ones(2, 2), torch.ones(2, 2, 2, 2)), [(IMAGE, MASK)], ["nra"], "select"),
    ],
)
def test_wrong_input_says_what_is_allowed(explainer, data, names, message):
    with pytest.raises(InputError, match=message):
        metrics.evaluate(explainer, data, names)


def never(x):
    raise AssertionError("the options are checked before the work")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"seed": -1}, "seed"), ({"seed": "a"}, "seed"), ({"n_bootstrap": -5}, "n_bootstrap"), ({"confidence": 95}, "95")],
)
def test_options_of_the_bootstrap_are_checked_before_the_work(options, message):
    with pytest.raises(InputError, match=message):
        metrics.evaluate(never, [(IMAGE, MASK)], ["nra"], **options)


@pytest.mark.parametrize("transform", [lambda x: x[:1], lambda x: None, lambda x: x.sum()])
def test_a_transform_returns_the_images_of_its_batch(transform):
    with pytest.raises(InputError, match="transform must return a tensor with 2 images"):
        metrics.evaluate(never, [(IMAGE, MASK)], ["nra"], transform=transform)


def test_targets_by_name_reach_the_explainer_from_single_examples_as_from_batches():
    asked = []

    def explain(x, target):
        asked.append(target)
        return x.mean(1)

    for data in ([(IMAGE, MASK, ["cat", "dog"])], [(IMAGE[0], MASK[0], "cat"), (IMAGE[1], MASK[1], "dog")]):
        metrics.evaluate(explain, data, ["region_auc"], n_bootstrap=0)
    assert asked == [["cat", "dog"]] * 2


def test_functions_alone_do_not_load_torchmetrics_and_all_names_exist():
    code = "import sys; from captum_concepts import metrics; metrics.nra; sys.exit('torchmetrics' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0
    assert all(hasattr(metrics, name) for name in metrics.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nr'"):
        metrics.nr


def test_images_in_other_holders(tmp_path):
    import numpy as np
    from PIL import Image
    from torch.utils.data import IterableDataset

    class Stream(IterableDataset):
        def __len__(self):
            return len(IMAGE)

        def __iter__(self):
            return iter(zip(IMAGE, masks, strict=True))

    def brightness(x):
        return x.mean(1)

    masks = torch.zeros(2, 8, 8)
    masks[:, 2:4, 3:7] = 1
    expected = metrics.evaluate(brightness, [(IMAGE, masks)], ["epg"], n_bootstrap=0).to_markdown()
    pictures = [Image.fromarray((x.permute(1, 2, 0) * 255).round().byte().numpy()) for x in IMAGE]
    pictures[0].save(tmp_path / "a.png")
    for data in (
        Stream(),
        [{"pixel_values": x, "masks": m} for x, m in zip(IMAGE, masks, strict=True)],
        [{"image": x, "masks": m} for x, m in zip(pictures, masks, strict=True)],
        [(tmp_path / "a.png", masks[0]), (np.asarray(pictures[1]), masks[1])],
    ):
        assert metrics.evaluate(brightness, data, ["epg"], n_bootstrap=0).to_markdown() == expected
