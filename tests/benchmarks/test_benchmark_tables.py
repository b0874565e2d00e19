"""The tables of the benchmarks notice what is wrong with maps: a method made worse on purpose falls in every one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks.peers import maps as peers
from benchmarks.report.cells import COLUMNS, OTHER, SHUFFLED
from benchmarks.run import map_tables
from benchmarks.run.fam import tasks as fam_tasks
from benchmarks.run.map_tables import Regions, measure, pairs, quality
from benchmarks.run.papers import maps as paper_maps
from benchmarks.run.salf_cbm import maps as salf_cbm_maps
from captum_concepts import FeatureActivationMap, demo, metrics
from captum_concepts.datasets import CaptionedScenes

BLIND = {"activation energy", "centre Gaussian", "random"}


def class_maps():
    """The bundled classifier's class activation maps: a method that is known to be good on its scenes."""
    model = demo.load("classifier")
    encoder = torch.nn.Sequential()
    encoder.add_module("trunk", model)
    bank = model.fc.weight.detach()
    model.fc = torch.nn.Identity()
    cam = FeatureActivationMap(model, "layer4", bank, similarity="dot", weights="gradient")
    whole = demo.load("classifier")
    return lambda x, target: cam.attribute(x, target=target), lambda x: whole(x).softmax(1), whole


def by_name(table) -> dict[str, dict]:
    return {row["method"]: row for row in table.rows}


def assert_worse(good: dict, bad: dict, columns) -> None:
    for column in columns:
        more_is_better = COLUMNS[column][1] if column in COLUMNS else True
        a, b = good[column][0], bad[column][0]
        assert (b < a) if more_is_better else (b > a), (column, a, b)


@pytest.fixture(scope="module")
def classes():
    """One object an image, its class the target; with scores."""
    explain, score, model = class_maps()
    regions = fam_tasks.scenes(40, 1, 0).queries
    read = peers.activations(model, "layer4")
    return by_name(measure("classes", "", {"CAM": explain}, regions, score=score, energy=read))


@pytest.fixture(scope="module")
def words():
    """Several words an image, so that specificity is defined."""
    clip = demo.load("clip")
    names, regions = fam_tasks.scene_words(16, 3)
    layer = clip.model.visual.trunk.layer4
    cam = FeatureActivationMap(clip.encode_image, layer, clip.encode_text(names), weights="gradient")
    read = peers.activations(clip.encode_image, layer)
    explainers = {"CAM": lambda x, target: cam.attribute(x, target=target)}
    return by_name(measure("words", "", explainers, regions, energy=read))


class TestMadeWorse:
    @pytest.mark.parametrize("way", [SHUFFLED, OTHER])
    def test_classes(self, classes, way: str):
        columns = set(COLUMNS) - {"specificity"}
        assert set(classes) == {"CAM", *BLIND, f"CAM: {SHUFFLED}", f"CAM: {OTHER}"}
        assert classes["CAM"]["specificity"] is None  # one object an image
        assert_worse(classes["CAM"], classes[f"CAM: {way}"], columns)

    @pytest.mark.parametrize("way", [SHUFFLED, OTHER])
    def test_words(self, words, way: str):
        assert_worse(words["CAM"], words[f"CAM: {way}"], set(map_tables.WITH_MASKS))

    def test_what_knows_no_concept_has_no_specificity(self, words):
        for name in ("activation energy", "centre Gaussian"):
            assert words[name]["specificity"] == pytest.approx([0, 0, 0], abs=1e-6)
        assert words["CAM"]["specificity"][0] > 0.05

    @pytest.mark.parametrize("name", ["insertion", "deletion", "pointing_game", "pixel_accuracy", "average_precision"])
    def test_the_other_metrics(self, name: str):
        explain, score, _ = class_maps()
        regions = fam_tasks.scenes(40, 1, 0).queries
        images = regions.images[regions.index]
        own = map_tables.maps_of(explain, regions, regions.target, 16)
        other = map_tables.maps_of(explain, regions, regions.other, 16)
        values = []
        for maps in (own, own[regions.shuffled], other):
            if name in ("insertion", "deletion"):
                options = {"target": regions.target, "baseline": "mean", "n_steps": 16}
                found = getattr(metrics, name)(score, images, maps, **options)
            else:
                found = getattr(metrics, name)(maps, regions.masks)
            values.append(float(found.mean()))
        good, *bad = values
        assert all((v > good) if name == "deletion" else (v < good) for v in bad), values

    def test_the_papers_tables(self):
        """The rows that the commands of the papers' tables put beside the method."""
        explain, _, model = class_maps()
        scenes = CaptionedScenes(40, seed=9, size=64)
        items = [scenes[i] for i in range(40)]
        clip = demo.load("clip")
        words = FeatureActivationMap(clip.encode_image, clip.model.visual.trunk.layer4,
                                     clip.encode_text(scenes.concepts), weights="gradient")  # fmt: skip

        class Data:
            def __init__(self, of_words: bool, n: int) -> None:
                self.of_words, self.n = of_words, n

            def __len__(self) -> int:
                return self.n

            def __getitem__(self, i: int):
                scene = items[i]
                target = scene.presence.nonzero().flatten()
                masks = scene.masks[target] if self.of_words else scene.object_masks[0]
                nothing = torch.zeros(64, 64, dtype=torch.bool)
                return type("Item", (), {"image": scene.image, "masks": masks, "ignore": nothing, "target": target})

        def of_word(x, target):
            return words.attribute(x, target=target)[:, 0]

        rows = {"own": of_word, **paper_maps.worse("own", of_word, len(scenes.concepts))}
        own, *bad = paper_maps.region_rows(Data(True, 12), rows)
        for row in bad:
            assert_worse(own, row, paper_maps.REGION_COLUMNS)
        rows = {"own": explain, **paper_maps.worse("own", explain, 6)}
        own, *bad = paper_maps.segmentation_rows(Data(False, 40), model, rows, "cpu")
        for row in bad:
            assert_worse(own, row, ("pixel_accuracy", "mean_iou", "average_precision"))

    def test_the_table_of_concept_maps(self):
        """As SALF-CBM's benchmark makes it: all concepts of an image at once."""
        scenes = CaptionedScenes(24, seed=7, size=64).stack()
        clip = demo.load("clip")
        names = CaptionedScenes(1, seed=7, size=64).concepts
        cam = FeatureActivationMap(clip.encode_image, clip.model.visual.trunk.layer4, clip.encode_text(names),
                                   weights="gradient")  # fmt: skip
        maps = torch.cat([cam.attribute(scenes.image, target=t) for t in range(len(names))], 1)

        def row(found):
            return salf_cbm_maps.summary(salf_cbm_maps.score_maps(found, scenes.masks, scenes.presence.bool()))

        own = row(maps)
        for bad in (maps.roll(1, 0), maps.roll(1, 1)):  # another image's, another concept's
            assert_worse(own, row(bad), salf_cbm_maps.COLUMNS)


class TestTable:
    @pytest.fixture
    def regions(self) -> Regions:
        generator = torch.Generator().manual_seed(0)
        masks = torch.zeros(3, 2, 8, 8, dtype=torch.bool)
        masks[:, 0, :3, :3], masks[:, 1, 5:, 5:] = True, True
        images = torch.rand(3, 3, 8, 8, generator=generator)
        return pairs([(images[i], [(0, masks[i, 0]), (2, masks[i, 1])]) for i in range(3)], 4, seed=0)

    def test_pairs(self, regions: Regions):
        assert regions.index.tolist() == [0, 0, 1, 1, 2, 2]
        assert regions.target.tolist() == [0, 2] * 3
        assert set(regions.other.tolist()) <= {1, 3}  # what is not in the image
        assert all(regions.index[regions.shuffled] != regions.index)
        with pytest.raises(ValueError, match="some have none"):
            pairs([(torch.rand(3, 8, 8), [(0, None), (1, torch.ones(8, 8).bool())])], 4, seed=0)

    def test_columns_against_the_metrics_one_by_one(self, regions: Regions):
        maps = torch.rand(6, 4, 4, generator=torch.Generator().manual_seed(1))
        score = lambda x: torch.stack([x.mean((1, 2, 3))] * 4, 1)  # noqa: E731
        row = quality(maps, regions, score, 2)
        assert set(row) == set(COLUMNS)
        masks = regions.masks
        means = {
            "nra": metrics.nra(maps, masks),
            "nra_exact": metrics.nra(maps, masks, baseline="exact"),
            "iou": metrics.iou(maps, masks, threshold="minmax:0.5"),
            "box_iou": metrics.box_iou(maps, masks),
            "epg": metrics.epg(maps, masks),
            "hit_rate": (metrics.nra(maps, masks) > 0.5).float(),
        }
        for key, values in means.items():
            assert row[key][0] == pytest.approx(float(values.mean()), abs=1e-6), key
        own = []
        for image in range(3):  # specificity by hand: two words an image
            first, second = 2 * image, 2 * image + 1
            for a, b in ((first, second), (second, first)):
                one = metrics.nra(maps[[a, b]], masks[[a, a]])
                own.append(float(one[0] - one[1]))
        assert row["specificity"][0] == pytest.approx(sum(own) / 6, abs=1e-6)
        shown = F.interpolate(maps[:, None], (8, 8), mode="bilinear")
        low, high = shown.amin((2, 3), keepdim=True), shown.amax((2, 3), keepdim=True)
        heat, x = (shown - low) / (high - low), regions.images[regions.index]
        left = (x * heat + x.mean((2, 3), keepdim=True) * (1 - heat)).mean((1, 2, 3))
        drop = ((x.mean((1, 2, 3)) - left).clamp(min=0) / x.mean((1, 2, 3))).mean()
        assert row["average_drop"][0] == pytest.approx(float(drop), abs=1e-6)

    def test_without_masks_and_without_scores(self, regions: Regions):
        bare = Regions(regions.images, regions.index, regions.target, regions.other, None)
        maps = torch.rand(6, 4, 4)
        assert quality(maps, bare, None, 2) == {}
        assert set(quality(maps, regions, None, 2)) == set(map_tables.WITH_MASKS)

    def test_interval_resamples_images(self):
        values, groups = torch.tensor([0.0, 1.0, 1.0, torch.nan]), torch.tensor([0, 1, 1, 2])
        mean, low, high = map_tables.interval(values, groups)
        assert mean == pytest.approx(2 / 3)
        assert (low, high) == (0.0, 1.0)  # all draws of image 0 alone, or of image 1 alone
        assert map_tables.interval(torch.tensor([torch.nan]), torch.tensor([0])) is None

    def test_one_image_cannot_be_shuffled(self, regions: Regions):
        alone = Regions(regions.images[:1], regions.index[:2], regions.target[:2], regions.other[:2], regions.masks[:2])
        with pytest.raises(ValueError, match="there is one image"):
            measure("", "", {"random": lambda x, _: torch.rand(len(x), 4, 4)}, alone)


class TestChannelRules:
    """The published rules that give a word one channel, against plain loops."""

    def test_soft_wpmi(self):
        generator = torch.Generator().manual_seed(0)
        channels, similarity = torch.rand(12, 3, generator=generator), torch.rand(12, 4, generator=generator)
        found = peers.soft_wpmi(channels, similarity, top=5)
        prob = torch.softmax(10 * similarity, 1)
        raw = torch.zeros(3, 4)
        for c in range(3):
            for rank, i in enumerate(channels[:, c].argsort(descending=True)[:5].tolist()):
                p = 0.998 - rank / 5 * (0.998 - 0.97)
                raw[c] += (1 + p * (prob[i] - 1) + 1e-7).log()
        expected = raw - raw.exp().mean(0).log()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)

    def test_adaptive_cosine(self):
        generator = torch.Generator().manual_seed(0)
        channels, similarity = torch.rand(12, 3, generator=generator), torch.rand(12, 4, generator=generator)
        template = torch.rand(12, generator=generator)
        found = peers.adaptive_cosine(channels, similarity, template, top=5)
        for c in range(3):
            rows = channels[:, c].argsort(descending=True)[:5]
            for t in range(4):
                expected = sum(float(similarity[i, t] - template[i]) for i in rows) / 5
                assert float(found[c, t]) == pytest.approx(expected, abs=1e-5)

    def test_single_channel(self):
        maps = torch.rand(2, 3, 4, 4)
        table = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0]])  # word 0: channel 0; word 1: channel 2
        explain = peers.single_channel(lambda _: maps, table)
        assert torch.equal(explain(torch.rand(2, 3, 8, 8), torch.tensor([1, 0])), torch.stack([maps[0, 2], maps[1, 0]]))
