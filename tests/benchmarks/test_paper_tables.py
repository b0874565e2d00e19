"""The commands of the papers' tables, run on tiny trees in the data sets' own formats with the bundled models."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from comparisons import within
from PIL import Image
from safetensors.torch import save_file

from benchmarks.data.published import COMMAND, PROTOCOLS, PUBLISHED
from benchmarks.report import sections
from benchmarks.run.papers import maps as paper_maps, tables as paper_tables
from benchmarks.run.papers.inputs import classifier, words_of
from captum_concepts import ConceptFusionMap, demo, published
from captum_concepts.datasets import CaptionedScenes, ImageNetS

SIZE = 64
DEMO = ["--model", "demo:classifier", "--encoder", "demo:clip", "--size", str(SIZE), "--device", "cpu"]
BLIND = {"activation energy", "centre Gaussian", "random"}
CATEGORY = {"circle": "object", "red": "color", "grass": "scene", "striped": "texture"}


@pytest.fixture(scope="module")
def scenes() -> CaptionedScenes:
    return CaptionedScenes(40, seed=5, size=SIZE)


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch) -> Path:
    """Where records go."""
    monkeypatch.setattr("benchmarks.record.RESULTS", tmp_path / "results")
    return tmp_path / "results"


def picture(image: torch.Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


def save(path: Path, image: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def rgb(ids: np.ndarray) -> Image.Image:
    """Ids as R + 256 G, as Broden and ImageNet-S write them."""
    return Image.fromarray(np.stack([ids % 256, ids // 256, np.zeros_like(ids)], -1).astype(np.uint8))


@pytest.fixture
def train(tmp_path: Path, scenes) -> Path:
    for i in range(24, 40):
        save(tmp_path / "train" / f"{i}.png", picture(scenes[i].image))
    return tmp_path / "train"


def table_of(record: dict) -> dict[str, dict]:
    (part,) = record["parts"].values()
    return {row["method"]: row for row in part["tables"][0]["rows"]}


def written(results: Path, name: str) -> dict:
    return json.loads((results / f"paper_{name}.json").read_text())


def check_page(record: dict, *shown: str) -> None:
    text = "\n".join(sections.sections({"paper_x": record}, [])[0].lines)
    assert all(f"| {name} |" in text for name in shown)


# ------------------------------------------------------------------------------------------------ CE-FAM


def write_broden(root: Path, scenes: CaptionedScenes, n: int) -> None:
    """As broden1_224: index.csv, label.csv, category.csv, and RGB label maps at half the picture's size."""
    numbers = {word: i for i, word in enumerate(CATEGORY, start=255)}  # beyond one byte
    kinds = sorted(set(CATEGORY.values()))
    rows = []
    for i in range(n):
        scene, files = scenes[i], {}
        for word, kind in CATEGORY.items():
            mask = scene.masks[scenes.concepts.index(word)][::2, ::2].numpy()
            if mask.any():
                files[kind] = f"ade/{i}_{kind}.png"
                save(root / "images" / files[kind], rgb(np.where(mask, numbers[word], 0)))
        save(root / "images" / "ade" / f"{i}.png", picture(scene.image))
        half = SIZE // 2
        rows.append([f"ade/{i}.png", "val", SIZE, SIZE, half, half, *(files.get(kind, "") for kind in kinds)])
    tables = {
        "index.csv": [["image", "split", "ih", "iw", "sh", "sw", *kinds], *rows],
        "label.csv": [["number", "name", "category", "frequency", "coverage", "syns"]]
        + [[numbers[word], word, f"{kind}(9)", 9, 0.5, word] for word, kind in CATEGORY.items()],
        "category.csv": [["name", "first", "last", "count", "frequency"]] + [[kind, 255, 300, 9, 9] for kind in kinds],
    }
    for name, lines in tables.items():
        with (root / name).open("w", newline="") as file:
            csv.writer(file).writerows(lines)


def test_broden(tmp_path: Path, scenes, train: Path, results: Path):
    write_broden(tmp_path / "broden1_64", scenes, 16)
    record = paper_tables.main(
        ["--table", "ce-fam-broden", "--root", str(tmp_path / "broden1_64"), "--train", str(train)]
        + ["--layers", "layer3", "layer4", "--epochs", "30", *DEMO]
    )
    assert record == written(results, "ce_fam_broden")
    rows = table_of(record)
    assert [m for m in rows if m.endswith("(published)")] == [r["method"] for r in PUBLISHED["ce-fam-broden"]]
    ours = {m: r for m, r in rows.items() if not m.endswith("(published)")}
    assert set(ours) >= {"CE-FAM", "CE-FAM, best layer", 'CE-FAM, map_layer="fused"', "CLIP-Dissect", "WWW", *BLIND}
    assert [rows[name]["protocol"] for name in ("CE-FAM (published)", "CE-FAM", "CE-FAM, best layer")] == [
        "top-4, uses the mask", "top-1", "top-4, uses the mask",
    ]  # fmt: skip
    for name in ("CE-FAM", "CLIP-Dissect", "WWW"):  # the printed rows are of the same protocol
        assert rows[f"{name}, best layer"]["protocol"] == rows[f"{name} (published)"]["protocol"]
        assert ours[f"{name}, best layer"]["nra"][0] >= ours[name]["nra"][0]
    assert ours["CLIP-Dissect"]["protocol"] == "last layer"
    lines = paper_tables.compared("ce-fam-broden", list(ours.values()))
    (line,) = [x for x in lines if x.startswith("WWW | top-4, uses the mask | nra, mean of categories | 0.2780 | ")]
    printed = torch.tensor([float(line.rsplit(" | ", 1)[1])], dtype=torch.float64)
    value = torch.tensor([ours["WWW, best layer"]["nra, mean of categories"][0]], dtype=torch.float64)
    within(printed, value, 5.001e-5)  # four digits are printed
    count = sum(
        int(scenes[i].masks[scenes.concepts.index(word), ::2, ::2].any()) for i in range(16) for word in CATEGORY
    )
    for row in ours.values():
        assert row["regions"] == count
        for column in ("epg", "nra", "hit_rate"):
            mean, low, high = row[column]
            assert 0 <= low <= mean <= high <= 1
            parts = [row[f"{column}, {kind}"][0] for kind in ("color", "object")]  # not scene, not texture
            assert row[f"{column}, mean of categories"][0] == pytest.approx(np.mean(parts))
    for blind in BLIND - {"random"}:
        assert ours[blind]["specificity"][0] == pytest.approx(0, abs=1e-6)
    check_page(record, *rows)
    assert str(tmp_path) not in json.dumps(record)


class AnyWord:
    """The bundled image-text model for words that it does not know: each stands for one that it does."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.model = demo.load("clip")
        self.words = CaptionedScenes(1, seed=0, size=SIZE).concepts
        self.logit_scale, self.logit_bias = float(self.model.logit_scale), 0.0
        self.encode_image = self.model.encode_image

    def encode_text(self, texts: list[str]) -> torch.Tensor:
        self.asked += texts
        return self.model.encode_text([self.words[sum(map(ord, text)) % len(self.words)] for text in texts])


@pytest.fixture
def any_word(monkeypatch) -> AnyWord:
    encoder = AnyWord()
    monkeypatch.setattr(paper_maps, "image_text", lambda *_: encoder)
    return encoder


def test_broden_of_a_vision_transformer(tmp_path: Path, scenes, train: Path, any_word, monkeypatch):
    """The published rows read one encoder layer, the fused one all; a prompt per category; as many crops as asked."""
    fits: list[tuple[int, dict]] = []
    fit = ConceptFusionMap.fit

    def remembered(self, *args, **options):
        fits.append((len(self.layers), options))
        return fit(self, *args, **options)

    monkeypatch.setattr(ConceptFusionMap, "fit", remembered)
    write_broden(tmp_path / "broden1_64", scenes, 6)
    record = paper_tables.main(
        ["--table", "ce-fam-broden", "--root", str(tmp_path / "broden1_64"), "--train", str(train), *DEMO]
        + ["--model", "demo:vit", "--layers", *(f"blocks.{i}" for i in range(4)), "--last-layer"]
        + ["--epochs", "2", "--crops", "2"]
    )
    (published_layers, recipe), (fused_layers, default) = fits
    assert (published_layers, fused_layers) == (1, 4)
    assert recipe["crops"] == default["crops"] == 2
    assert recipe["training"] == {**published.CONCEPT_FUSION_FIT["training"], "epochs": 2}
    assert "training" not in default
    rows = table_of(record)
    assert rows["CE-FAM"]["protocol"] == rows["CLIP-Dissect"]["protocol"] == "last layer"
    assert not [name for name in rows if "best layer" in name]
    assert 0 < rows["CE-FAM"]["nra"][0] < 1
    assert set(any_word.asked) == {
        "a photo of a circle", "a photo of a red object", "a photo of an object on grass",
        "a photo of a striped object", "a photo of a",
    }  # fmt: skip


def test_imagenet_s(tmp_path: Path, scenes, train: Path, results: Path, any_word):
    """As ImageNet-S: class folders of pictures and of RGB label maps, 1000 ignored, a table of WordNet ids."""
    wnids = ["n02012849", "n01443537", "n03126707"]
    root = tmp_path / "ImageNetS919"
    for i in range(9):
        scene, own = scenes[i], i % 3
        name = f"ILSVRC2012_val_{i:08}"
        save(root / "validation" / wnids[own] / f"{name}.png", picture(scene.image))
        picture_file = root / "validation" / wnids[own] / f"{name}.png"
        picture_file.rename(picture_file.with_suffix(".JPEG"))
        ids = np.where(scene.object_masks[0].numpy(), own + 1, 0)
        ids[:2] = 1000
        save(root / "validation-segmentation" / wnids[own] / f"{name}.png", rgb(ids))
    (tmp_path / "ImageNetS_categories_im919.txt").write_text("\n".join(wnids))
    record = paper_tables.main(
        ["--table", "ce-fam-imagenet-s", "--root", str(root), "--train", str(train), "--limit", "6"]
        + ["--layers", "layer4", "--epochs", "2", *DEMO]
    )
    assert record == written(results, "ce_fam_imagenet_s")
    rows = table_of(record)
    assert rows["CE-FAM"]["regions"] == rows["random"]["regions"] == 6
    printed = {"method": "CE-FAM (published)", "protocol": "last layer", "epg": 0.138, "nra": 0.273, "hit_rate": 0.193}
    assert rows["CE-FAM (published)"] == printed
    assert rows["CE-FAM"]["protocol"] == "last layer"
    words = words_of(ImageNetS(root, "validation", size=SIZE).concepts)
    assert set(any_word.asked) == {"a photo of a", *(f"a photo of a {word}" for word in words)}
    check_page(record, *rows)


# ------------------------------------------------------------------------------------------------ SALF-CBM


def test_accuracy_then_segmentation(tmp_path: Path, scenes, results: Path):
    """A model of the accuracy table is saved, and its maps are rows of the segmentation table."""
    root, words = tmp_path / "classes", ["circle", "striped", "square", "checkered", "triangle", "star"]
    labels = [int(scenes[i].label) for i in range(40)]
    for i, label in enumerate(labels):
        save(root / ("train" if i < 28 else "val") / f"class {label}" / f"{i}.png", picture(scenes[i].image))
    (tmp_path / "concepts.txt").write_text("\n".join(words) + "\n\n")
    accuracy = ["--table", "salf-accuracy", "--root", str(root), "--name", "CUB-200", "--layers", "layer4", *DEMO]
    files = ["--concepts", str(tmp_path / "concepts.txt"), "--cache", str(tmp_path / "regions")]
    free = ["--presence-cutoff", "none", "--interpretability-cutoff", "none", "--lam", "0.01"]
    record = paper_tables.main([*accuracy, *files, *free, "--save", str(tmp_path / "salf")])
    assert record == written(results, "salf_accuracy")
    rows = table_of(record)
    assert rows["SALF-CBM, sparse (published)"]["CUB-200"] == 0.7435
    most = max(range(6), key=labels[:28].count)
    assert rows["the most frequent class, always"]["CUB-200"][0] == pytest.approx(labels[28:].count(most) / 12)
    with torch.no_grad():
        right = demo.load("classifier")(torch.stack([scenes[i].image for i in range(28, 40)])).argmax(1)
    own = float((right == torch.tensor(labels[28:])).float().mean())
    assert rows["backbone, its own head"]["CUB-200"][0] == pytest.approx(own, abs=1 / 12)  # files round to 8 bits
    effective = [f"{name}, NEC=5" for name in ("SALF-CBM", "P-CBM", "LF-CBM")]
    for name in ("SALF-CBM, sparse", "SALF-CBM, dense", "P-CBM", "LF-CBM", "backbone, sparse", *effective):
        assert 0 <= rows[name]["CUB-200"][0] <= 1
        assert rows[name].get("concepts", 6) == 6
    assert rows["backbone's features, dense"]["CUB-200"][0] > rows["the most frequent class, always"]["CUB-200"][0]
    check_page(record, *rows)

    seg = tmp_path / "segmentation"
    for i in range(8):
        save(seg / "images" / f"{i}.png", picture(scenes[i].image))
        save(seg / "masks" / f"{i}.png", Image.fromarray(scenes[i].object_masks[0].byte().numpy() * 255))
    command = ["--table", "salf-segmentation", "--root", str(seg), "--layers", "layer4", *DEMO]
    saved = ["--salf", str(tmp_path / "salf" / "dense")]
    record = paper_tables.main([*command, *saved, "--score-cam", "--limit", "3"])
    assert record == written(results, "salf_segmentation")
    rows = table_of(record)
    assert set(rows) >= {"Grad-CAM (captum)", "integrated gradients (captum)", *BLIND}
    if importlib.util.find_spec("pytorch_grad_cam") is not None:  # a peer, of the benchmark extra
        assert set(rows) >= {"Score-CAM (pytorch-grad-cam)", "Grad-CAM++ (pytorch-grad-cam)"}
    for name in ("Grad-CAM (captum)", "SALF-CBM"):
        assert rows[name]["images"] == 3
        for column in ("pixel_accuracy", "mean_iou", "average_precision"):
            mean, low, high = rows[name][column]
            assert 0 < low <= mean <= high < 1
    check_page(record, *rows)
    (tmp_path / "concepts.txt").write_text("circle\nsquare\n")
    files = ["--concepts", str(tmp_path / "concepts.txt"), "--cache", str(tmp_path / "regions")]
    paper_tables.main([*accuracy, *files, *free, "--save", str(tmp_path / "two")])
    with pytest.raises(SystemExit, match="2 concepts, but the model has 6 classes"):
        paper_tables.main([*command, "--salf", str(tmp_path / "two" / "dense")])


class TestProtocols:
    def test_ideal_maps_are_ideal_and_nothing_is_nothing(self, scenes):
        """The rows of segmentation and regions from maps that are known."""
        items = [scenes[i] for i in range(4)]

        class Data:
            def __len__(self):
                return len(items)

            def __getitem__(self, index):
                scene = items[index]
                masks = scene.masks[scene.presence.bool()]
                return type("Item", (), {
                    "image": scene.image, "masks": masks if self.regions else scene.object_masks[0],
                    "ignore": torch.zeros(SIZE, SIZE, dtype=torch.bool), "target": scene.presence.nonzero().flatten(),
                })  # fmt: skip

            regions = True

        def find(x):
            return next(s for s in items if torch.equal(s.image, x))

        def ideal(x, target):
            return find(x[0]).masks[target].float()

        (row,) = paper_maps.region_rows(Data(), {"ideal": ideal})
        assert row["nra_exact"] == row["epg"] == row["hit_rate"] == pytest.approx([1, 1, 1])
        assert row["nra"] == pytest.approx([1, 1, 1], abs=1e-3)  # on the authors' grid
        assert row["specificity"][0] > 0.5
        data = Data()
        data.regions = False
        explainers = {
            "ideal": lambda x, _: find(x[0]).object_masks[:1].float(),
            "inverse": lambda x, _: 1 - find(x[0]).object_masks[:1].float(),
            "broken": lambda x, _: torch.full((1, 8, 8), torch.nan),
        }
        rows = paper_maps.segmentation_rows(data, demo.load("classifier"), explainers, "cpu")
        ideal_row, inverse, broken = rows
        assert ideal_row["pixel_accuracy"] == ideal_row["average_precision"] == pytest.approx([1, 1, 1])
        assert inverse["pixel_accuracy"][0] == inverse["mean_iou"][0] == 0
        ground = np.mean([1 - float(s.object_masks[0].float().mean()) for s in items])
        assert broken["pixel_accuracy"][0] == pytest.approx(ground)  # nothing is drawn, as in the public code
        assert broken["average_precision"][0] == pytest.approx(0.5)  # all pixels tie

    @pytest.mark.parametrize("table", list(PROTOCOLS))
    def test_documented_commands_are_understood(self, table: str):
        command = PROTOCOLS[table][2]
        args = paper_tables.arguments([*command.removeprefix(COMMAND.removesuffix(" --table")).split()])
        assert args.table == table
        assert paper_tables.TABLES[table]
        for layer in args.layers if "vit" in args.model else []:
            assert re.fullmatch(r"net\.blocks\.\d+", layer)

    def test_every_row_has_the_papers_number_the_protocol_and_ours(self):
        rows = [
            {"method": "SALF-CBM, sparse", "head": "sparse", "concepts": 9, "CUB-200": [0.5, 0.4, 0.6]},
            {"method": "SALF-CBM, NEC=5", "head": "NEC=5", "concepts": 9, "CUB-200": [0.25, 0.2, 0.3]},
        ]
        lines = paper_tables.compared("salf-accuracy", rows)
        assert lines[:2] == ["salf-accuracy: SALF-CBM, accuracy", "method | protocol | column | paper | ours"]
        assert "SALF-CBM, sparse | sparse | CUB-200 | 0.7435 | 0.5000" in lines
        assert "SALF-CBM, sparse | sparse | Places365 | 0.4673 | -" in lines
        assert "P-CBM | sparse | CUB-200 | 0.5960 | -" in lines
        assert lines[-1] == "SALF-CBM, NEC=5 | NEC=5 | CUB-200 | - | 0.2500"

    def test_a_bank_of_vectors_follows_what_the_image_text_model_says(self):
        """P-CBM's vectors, from examples that the similarities choose."""
        from benchmarks.peers.salf_cbm import fit_p_cbm

        generator = torch.Generator().manual_seed(0)
        pooled = torch.randn(400, 8, generator=generator)
        similarity = pooled[:, :3] + 0.1 * torch.randn(400, 3, generator=generator)
        bank = fit_p_cbm(pooled, similarity, ["a", "b", "c"])
        assert bank.weight.norm(dim=1).tolist() == pytest.approx([1] * 3, abs=1e-5)
        assert bank.weight[:, :3].diagonal().min() > 0.8
        assert bank.activations(pooled).mean(0).abs().max() < 1e-5
        assert bank.similarity.min() > 0.8

    def test_words(self):
        names = ["swimming_pool-s", "red-c", "crane (134)", "wall", "bird (crane)"]
        assert words_of(names) == ["swimming pool", "red", "crane", "wall", "bird (crane)"]

    def test_weights_of_any_number_of_classes(self, tmp_path: Path):
        timm = importlib.import_module("timm")
        net = timm.create_model("resnet10t", num_classes=7).eval()
        save_file(net.state_dict(), tmp_path / "birds.safetensors")
        model = classifier("resnet10t", str(tmp_path / "birds.safetensors"), "cpu")
        x = torch.rand(2, 3, 64, 64)
        about = importlib.import_module("timm.data").resolve_model_data_config(net)
        mean, std = (torch.tensor(about[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
        torch.testing.assert_close(model(x), net((x - mean) / std))

    def test_published_rows(self):
        assert {name: len(rows) for name, rows in PUBLISHED.items()} == {
            "ce-fam-broden": 3, "ce-fam-imagenet-s": 3, "salf-segmentation": 7, "salf-accuracy": 6
        }  # fmt: skip
        for rows in PUBLISHED.values():
            for row in rows:
                values = [v for v in row.values() if not isinstance(v, str) and v is not None]
                assert values
                assert all(0 < v < 1 for v in values)
        assert set(published.SALF_CBM_DATA) <= set(PUBLISHED["salf-accuracy"][0])

    def test_what_is_missing_is_said(self, tmp_path: Path, capsys):
        assert paper_tables.main(["--list"]) == {}
        shown = capsys.readouterr().out
        assert "SALF-CBM, dense (published)" in shown
        assert all(command in shown for _, _, command in PROTOCOLS.values())
        with pytest.raises(SystemExit, match="--root"):
            paper_tables.main(["--table", "salf-accuracy"])
        with pytest.raises(SystemExit, match="--concepts"):
            paper_tables.main(["--table", "salf-accuracy", "--root", str(tmp_path)])
