"""Video, most activating images and segmentation by class prompts, on a SALFCBM."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from salf_networks import CONCEPTS, ConvNet, awake, conv_model, pictures, slow_activations, slow_maps, standardised
from torch.utils.data import DataLoader, TensorDataset

from captum_concepts import published
from captum_concepts.concepts import Vocabulary
from captum_concepts.errors import InputError, InputWarning, TargetError
from captum_concepts.metrics import mean_iou
from captum_concepts.models.salf_cbm import SALFCBM


class TestVideo:
    def test_a_frame_at_a_time(self):
        model, frames = conv_model(), pictures(5)
        found = list(model.explain_video(frames, top_k=2))
        assert len(found) == 5
        for n, explanation in enumerate(found):
            expected = model.explain(frames[n : n + 1], top_k=2)
            assert explanation.concepts == expected.concepts
            torch.testing.assert_close(explanation.scores, expected.scores)
            torch.testing.assert_close(explanation.maps, expected.maps)
            assert explanation.target.tolist() == expected.target.tolist()

    @pytest.mark.parametrize("batch_size", [1, 2, 3])
    def test_a_concept_followed_through_frames_of_two_sizes(self, batch_size):
        model = conv_model()
        frames = [*pictures(3), *pictures(2, 40, 40)[:, None]]  # single frames and batches of one
        found = list(model.explain_video(iter(frames), "car", concepts=["grass"], batch_size=batch_size))
        assert [f.concepts for f in found] == [["grass"]] * 5
        for frame, explanation in zip(frames, found, strict=True):
            x = frame if frame.ndim == 4 else frame[None]
            torch.testing.assert_close(explanation.maps, slow_maps(model, x)[:, 2:3])
            assert explanation.target.tolist() == [1]

    def test_memory_is_constant(self):
        model = conv_model()
        alive: list[weakref.ref] = []
        most = 0

        def camera():
            for i in range(12):
                frame = pictures(1, seed=i)[0]
                alive.append(weakref.ref(frame))
                yield frame

        gc.freeze()  # what other tests left behind need not be searched twelve times
        try:
            for _ in model.explain_video(camera()):
                gc.collect()
                most = max(most, sum(frame() is not None for frame in alive))
        finally:
            gc.unfreeze()
        assert len(alive) == 12
        assert most <= 2

    @pytest.mark.parametrize(("size", "passes"), [(1, [1] * 5), (2, [2, 2, 1]), (5, [5]), (8, [5])])
    def test_a_batch_is_explained_as_soon_as_it_is_full(self, size, passes):
        model, seen = conv_model(), []
        model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
        assert len(list(model.explain_video(pictures(5), batch_size=size))) == 5
        assert seen == passes

    def test_frames_are_read_as_they_come(self):
        model, read = conv_model(), []

        def camera():
            while True:  # a live stream
                read.append(1)
                yield pictures(1)[0]

        video = model.explain_video(camera())
        assert read == []
        next(video), next(video)
        assert len(read) == 2

    def test_bad(self):
        model = conv_model()
        with pytest.raises(InputError, match="Did you mean 'grass'"):
            model.explain_video(pictures(), concepts=["gras"])
        with pytest.raises(TargetError):
            model.explain_video(pictures(), "cra")
        with pytest.raises(InputError, match="must be an integer"):
            model.explain_video(pictures(), batch_size=0)
        with pytest.raises(InputError, match="image 1 cannot be read"):
            list(model.explain_video([pictures(1)[0], "frame.png"]))


def slow_best(model, images, k):
    activations = slow_activations(model, images)
    return {
        name: [(i, activations[i, m].item()) for i in sorted(range(len(images)), key=lambda i: -activations[i, m])[:k]]
        for m, name in enumerate(CONCEPTS)
    }


class TestMostActivating:
    @pytest.mark.parametrize("batch_size", [1, 4, 50])
    def test_the_highest_of_the_data(self, batch_size):
        model, images = conv_model(), pictures(11)
        found = model.most_activating(images, k=3, batch_size=batch_size)
        expected = slow_best(model, images, 3)
        assert list(found) == CONCEPTS
        for name in CONCEPTS:
            assert [i for i, _ in found[name]] == [i for i, _ in expected[name]]
            assert [v for _, v in found[name]] == pytest.approx([v for _, v in expected[name]], abs=1e-4)

    def test_forms_of_data(self):
        model, images = conv_model(), pictures(7)
        expected = model.most_activating(images, ["grass", 0], k=2)
        assert list(expected) == ["grass", "striped fur"]
        labels = torch.arange(7)
        forms = [
            TensorDataset(images, labels),
            DataLoader(TensorDataset(images, labels), batch_size=3),
            DataLoader(TensorDataset(images, labels), batch_size=3, shuffle=True),  # read in the data's order
            [{"image": image, "label": 0} for image in images],
            (image for image in images),
            [images[:4], images[4:]],
        ]
        for data in forms:
            found = model.most_activating(data, ["grass", 0], k=2, batch_size=3)
            assert {n: [i for i, _ in v] for n, v in found.items()} == {
                n: [i for i, _ in v] for n, v in expected.items()
            }

    def test_images_of_several_sizes_ties_and_nan(self):
        model = conv_model()
        same = pictures(1)[0]
        images = [same, pictures(1, 40, 40)[0], same, same]
        found = model.most_activating(images, k=10)
        assert all(len(v) == 4 for v in found.values())
        assert [i for i, _ in found["grass"] if i != 1] == [0, 2, 3]
        images[2] = torch.full_like(same, float("nan"))
        with pytest.warns(UserWarning, match="NaN"):
            found = model.most_activating(images, k=10)
        assert sorted(i for i, _ in found["grass"]) == [0, 1, 3]

    def test_memory_is_bounded(self):
        model = conv_model()
        alive: list[weakref.ref] = []
        most = 0

        def images():
            nonlocal most
            for i in range(40):
                image = pictures(1, seed=i)[0]
                alive.append(weakref.ref(image))
                most = max(most, sum(x() is not None for x in alive))
                yield image

        model.most_activating(images(), batch_size=2)
        gc.collect()
        assert most <= 6

    def test_bad(self):
        model = conv_model()
        for data in ([], torch.empty(0, 3, 8, 8)):
            with pytest.raises(InputError, match=r"no image|no example"):
                model.most_activating(data)
        with pytest.raises(InputError, match="Did you mean 'grass'"):
            model.most_activating(pictures(), "gras")
        with (
            pytest.raises(InputError, match="no file or folder at folder"),
            pytest.warns(InputWarning, match="the preprocessing of .* is unknown"),
        ):
            model.most_activating("folder")
        with pytest.raises(InputError, match="integer of at least 1"):
            model.most_activating(pictures(), k=0)

    def test_progress(self, capsys):
        conv_model().most_activating(pictures(), show_progress=True)
        assert "most activating images" in capsys.readouterr().err


CLASSES = ["zebra", "tench", "crane"]


def prompted(**options) -> SALFCBM:
    torch.manual_seed(0)
    vocabulary = Vocabulary.from_classes(CLASSES)
    return standardised(SALFCBM(awake(ConvNet()), "body", vocabulary, 3, class_names=CLASSES, **options))


class TestZeroShotSegmentation:
    def test_the_papers_protocol(self):
        model, x = prompted(), pictures()
        found = model.zero_shot_segmentation(x, "tench", **published.ZERO_SHOT_SEGMENTATION)
        large = F.interpolate(slow_maps(model, x), (32, 24), mode="bilinear", align_corners=False)[:, 1]
        for n in range(4):
            heat = (large[n] - large[n].min()) / (large[n].max() - large[n].min())
            torch.testing.assert_close(found.heatmaps[n], heat, atol=1e-4, rtol=1e-4)
            assert (found.masks[n] != (heat > heat.mean())).float().mean() < 0.01  # rounding at the mean itself
        assert found.concepts == ["An image of a tench"] * 4
        truth = found.masks
        assert mean_iou(found.heatmaps, truth) == pytest.approx(1.0)

    def test_targets(self):
        model, x = prompted(), pictures()
        predicted = model(x).argmax(1).tolist()
        assert model.zero_shot_segmentation(x).concepts == [f"An image of a {CLASSES[c]}" for c in predicted]
        each = model.zero_shot_segmentation(x, ["crane", 0, 1, "zebra"])
        assert [c.split()[-1] for c in each.concepts] == ["crane", "zebra", "tench", "zebra"]
        alone = model.zero_shot_segmentation(x[:1], "crane")
        torch.testing.assert_close(each.heatmaps[:1], alone.heatmaps)
        by_concept = model.zero_shot_segmentation(x[:1], "An image of a crane")
        assert torch.equal(by_concept.masks, alone.masks)
        nameless = SALFCBM(model.backbone, "body", model.concepts, 3).eval()
        assert nameless.zero_shot_segmentation(x, 2).concepts == ["An image of a crane"] * 4

    def test_size_and_threshold(self):
        model, x = prompted(), pictures(2)
        found = model.zero_shot_segmentation(x, 0, size=(64, 50), threshold=0.75)
        assert found.heatmaps.shape == found.masks.shape == (2, 64, 50)
        assert torch.equal(found.masks, found.heatmaps > 0.75)

    def test_a_constant_map_has_no_foreground(self):
        model = prompted()
        with torch.no_grad():
            model.bottleneck.weight.zero_()
        found = model.zero_shot_segmentation(pictures(), 0)
        assert not found.masks.any()
        assert found.heatmaps.isfinite().all()

    def test_bad(self):
        model, x = prompted(), pictures()
        with pytest.raises(TargetError, match="Did you mean 'crane'"):
            model.zero_shot_segmentation(x, "crain")
        with pytest.raises(InputError, match="threshold"):
            model.zero_shot_segmentation(x, 0, threshold=2)
        with pytest.raises(InputError, match="threshold"):
            model.zero_shot_segmentation(x, 0, threshold="otsu")
        with pytest.raises(InputError, match="must contain the field"):
            model.zero_shot_segmentation(x, 0, template="An image")
        with pytest.raises(InputError, match="'A photo of zebra' is not among the 3 concepts"):
            model.zero_shot_segmentation(x, 0, template="A photo of {class}")
        other = standardised(SALFCBM(model.backbone, "body", CONCEPTS, 3))
        with pytest.raises(InputError, match="no class_names"):
            other.zero_shot_segmentation(x, 0)
