"""A SALFCBM saved and loaded: nothing lost, nothing foreign, broken or mismatched accepted."""

from __future__ import annotations

import copy
import json
import struct
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from salf_networks import CONCEPTS, ConvNet, awake, conv_model, pictures, token_model
from torch import nn

from captum_concepts.errors import ArtifactError, InputError
from captum_concepts.models.salf_cbm import SALFCBM

METADATA = {
    "data": {"train": {"images": 120}},
    "accuracy": {"validation": 0.8125},
    "encoder": "OpenCLIPEncoder",
    "drops": [{"concept": "a | very `long` one", "reason": "too long", "value": 41, "limit": 30}],
}


@pytest.fixture
def saved(tmp_path):
    model = conv_model(metadata=METADATA)
    model.save_pretrained(tmp_path / "cats")
    return model, tmp_path / "cats"


class TestRoundTrip:
    def test_rules_of_either_sign_are_counted(self, tmp_path):
        model = conv_model()
        with torch.no_grad():
            model.head.weight.zero_()
            model.head.weight[0, 1], model.head.weight[2, 3], model.head.weight[2, 4] = 0.5, -0.25, -1.0
        model.save_pretrained(tmp_path / "few")
        assert json.loads((tmp_path / "few" / "config.json").read_text())["nonzeros"] == 3

    def test_everything_comes_back(self, saved):
        model, folder = saved
        assert sorted(file.name for file in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
        loaded = SALFCBM.from_pretrained(folder, backbone=copy.deepcopy(model.backbone))
        x = pictures()
        assert torch.equal(loaded(x), model(x))
        for name in ("layer", "concepts", "num_classes", "grid", "cls_token", "class_names", "freeze_backbone"):
            assert getattr(loaded, name) == getattr(model, name), name
        assert loaded.metadata == METADATA
        assert not loaded.training
        assert loaded.explain(x).concepts == model.explain(x).concepts
        assert torch.equal(*(one.intervene(x, "grass", beta=1.0, units="map")[1] for one in (loaded, model)))

    def test_tokens_with_cls(self, tmp_path):
        model = token_model(cls_token=True)
        model.save_pretrained(str(tmp_path))
        loaded = SALFCBM.from_pretrained(str(tmp_path), backbone=model.backbone)
        x = pictures(2, 16, 16)
        assert torch.equal(loaded(x), model(x))
        torch.compiler.reset()
        torch.testing.assert_close(torch.compile(loaded, backend="eager", fullgraph=True)(x), model(x))

    def test_a_trained_backbone_is_stored(self, tmp_path):
        torch.manual_seed(0)
        model = SALFCBM(ConvNet(), "body", CONCEPTS, 3, freeze_backbone=False)
        model.train()
        model(pictures())  # batch statistics move
        model.eval().save_pretrained(tmp_path)
        loaded = SALFCBM.from_pretrained(tmp_path, backbone=ConvNet())
        assert torch.equal(loaded(pictures()), model(pictures()))
        assert loaded.backbone.stem[0].weight.requires_grad
        assert not loaded.backbone.fc.weight.requires_grad

    def test_a_frozen_backbone_can_be_stored(self, saved, tmp_path):
        model, _ = saved
        assert not any(name.startswith("backbone") for name in load_file(saved[1] / "model.safetensors"))
        model.save_pretrained(tmp_path / "whole", save_backbone=True)
        other = ConvNet()
        loaded = SALFCBM.from_pretrained(tmp_path / "whole", backbone=other)
        assert torch.equal(loaded(pictures()), model(pictures()))
        assert "stored with the model" in (tmp_path / "whole" / "README.md").read_text()

    def test_a_wrapped_backbone(self, saved):
        model, folder = saved
        loaded = SALFCBM.from_pretrained(folder, backbone=nn.DataParallel(copy.deepcopy(model.backbone)))
        torch.testing.assert_close(loaded(pictures()), model(pictures()))
        loaded.save_pretrained(folder, save_backbone=True)
        again = SALFCBM.from_pretrained(folder, backbone=ConvNet())
        torch.testing.assert_close(again(pictures()), model(pictures()))

    def test_dtype_follows_the_backbone(self, saved):
        model, folder = saved
        loaded = SALFCBM.from_pretrained(folder, backbone=copy.deepcopy(model.backbone).double(), check_backbone=False)
        assert loaded(pictures().double()).dtype == torch.float64

    def test_saving_again_replaces_all(self, saved):
        model, folder = saved
        part = model.select_concepts(["grass"])
        part.metadata = {"accuracy": 0.25}
        part.save_pretrained(folder)
        assert SALFCBM.from_pretrained(folder, backbone=model.backbone).concepts == ["grass"]
        card = (folder / "README.md").read_text()
        assert "0.25" in card
        assert "striped fur" not in card

    def test_names_and_metadata_may_be_corrected_by_hand(self, saved):
        model, folder = saved
        config = json.loads((folder / "config.json").read_text())
        config["class_names"] = ["Katze", "Auto", "Vogel"]
        config["metadata"]["note"] = "checked"
        (folder / "config.json").write_text(json.dumps(config))
        loaded = SALFCBM.from_pretrained(folder, backbone=model.backbone)
        assert loaded.class_names[0] == "Katze"
        assert loaded.metadata["note"] == "checked"

    def test_from_the_hub(self, saved, monkeypatch):
        model, folder = saved
        asked = {}

        def snapshot_download(repo_id, **options):
            asked.update(options, repo_id=repo_id)
            return str(folder)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        loaded = SALFCBM.from_pretrained("me/cats", backbone=model.backbone, revision="v1", local_files_only=True)
        assert torch.equal(loaded(pictures()), model(pictures()))
        assert asked["repo_id"] == "me/cats"
        assert asked["revision"] == "v1"
        assert asked["local_files_only"] is True
        assert set(asked["allow_patterns"]) == {"model.safetensors", "config.json"}

    def test_it_is_a_hub_model(self):
        model = conv_model()
        assert isinstance(model, huggingface_hub.PyTorchModelHubMixin)
        assert callable(model.push_to_hub)

    def test_pushed_to_the_hub(self, monkeypatch, tmp_path):
        sent = {}

        class HfApi:
            def __init__(self, **options):
                pass

            def create_repo(self, repo_id, **options):
                return type("Repo", (), {"repo_id": repo_id})()

            def upload_folder(self, *, folder_path, repo_id, **options):
                sent.update({file.name: file.read_bytes() for file in Path(folder_path).iterdir()}, repo_id=repo_id)
                return "https://hub/me/cats"

        monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", HfApi)
        model = conv_model()
        assert model.push_to_hub("me/cats") == "https://hub/me/cats"
        assert sent["repo_id"] == "me/cats"
        assert {"README.md", "config.json", "model.safetensors"} <= set(sent)
        sent.clear()
        address = model.save_pretrained(tmp_path, push_to_hub=True, repo_id="me/more", save_backbone=True)
        assert address == "https://hub/me/cats"
        assert b"# me/more" in sent["README.md"]
        assert (tmp_path / "config.json").read_bytes() == sent["config.json"]
        (tmp_path / "sent").write_bytes(sent["model.safetensors"])
        here, there = load_file(tmp_path / "model.safetensors"), load_file(tmp_path / "sent")
        assert "backbone.fc.weight" in here
        assert here.keys() == there.keys()

    def test_a_save_that_fails_leaves_the_old_model(self, saved, monkeypatch):
        from captum_concepts.models.salf_cbm import hub

        model, folder = saved
        before = {file.name: file.read_bytes() for file in folder.iterdir()}

        def full_disk(path, data):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(hub, "write_atomically", full_disk)
        with pytest.raises(OSError, match="No space"):
            model.select_concepts([0]).save_pretrained(folder)
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


class TestCard:
    def test_states_data_concepts_drops_and_accuracy(self, saved):
        card = (saved[1] / "README.md").read_text()
        parsed = huggingface_hub.ModelCard(card)
        assert parsed.data.library_name == "captum_concepts"
        assert "concept-bottleneck" in parsed.data.tags
        assert parsed.data.pipeline_tag == "image-classification"
        for text in ("# cats", "images: 120", "validation: 0.8125", "OpenCLIPEncoder", "layer: body", "grid: 7 x 7"):
            assert text in card, text
        assert all(f"- {concept}" in card for concept in CONCEPTS)
        assert r"| a \| very \`long\` one | too long | 41 | 30 |" in card

    def test_what_is_not_known_is_said(self, tmp_path):
        conv_model().save_pretrained(tmp_path)
        card = (tmp_path / "README.md").read_text()
        assert card.count("Not stated") == 3  # accuracy, data, drops

    def test_the_report_of_a_vocabulary(self):
        model = conv_model(metadata={"vocabulary": {"report": {"drops": [{"concept": "x", "reason": "duplicate"}]}}})
        assert "| x | duplicate |" in str(model.generate_model_card())
        model.metadata = {"drops": {"y": "too long"}}
        assert "| y | too long |" in str(model.generate_model_card("mine"))
        model.metadata = {"drops": []}
        assert "None." in str(model.generate_model_card())

    def test_long_lists_are_cut(self):
        torch.manual_seed(0)
        model = SALFCBM(awake(ConvNet()), "body", [f"concept {i}" for i in range(500)], 3)
        card = str(model.generate_model_card())
        assert "300 more in `config.json`" in card
        assert "concept 400" not in card

    def test_hostile_names_stay_text(self):
        torch.manual_seed(0)
        model = SALFCBM(awake(ConvNet()), "body", ["<script>x</script>\n# head", "[a](b)"], 3)
        card = str(model.generate_model_card())
        assert "<script>" not in card
        assert "\n# head" not in card
        assert "[a](b)" not in card


class TestRefused:
    def test_another_backbone(self, saved):
        _, folder = saved
        torch.manual_seed(8)
        other = ConvNet()
        with pytest.raises(ArtifactError, match="trained with a ConvNet whose weights or dtype differ"):
            SALFCBM.from_pretrained(folder, backbone=other)
        assert all(p.requires_grad for p in other.parameters())
        assert SALFCBM.from_pretrained(folder, backbone=other, check_backbone=False).concepts == CONCEPTS

    def test_a_backbone_that_does_not_fit_the_stored_weights_is_left_alone(self, saved):
        model, folder = saved
        model.save_pretrained(folder, save_backbone=True)
        other = ConvNet(classes=7)
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(ArtifactError, match=r"differ in the shapes of \['fc\.weight'"):
            SALFCBM.from_pretrained(folder, backbone=other)
        with pytest.raises(ArtifactError, match="differ in"):
            SALFCBM.from_pretrained(folder, backbone=nn.Sequential(other))
        assert all(torch.equal(v, before[name]) for name, v in other.state_dict().items())

    def test_no_backbone_or_no_folder(self, saved, tmp_path):
        model, folder = saved
        with pytest.raises(InputError, match="pass backbone="):
            SALFCBM.from_pretrained(folder)
        for path in (tmp_path / "none", str(tmp_path / "none"), "./none"):
            with pytest.raises(FileNotFoundError, match="no folder"):
                SALFCBM.from_pretrained(path, backbone=model.backbone)

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
    def test_a_missing_file(self, saved, name):
        model, folder = saved
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=name):
            SALFCBM.from_pretrained(folder, backbone=model.backbone)

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"{",
            b"[]",
            b"\xff\xfe",
            b"[" * 100_000,
            b'{"format": "other"}',
            b'{"format": "captum_concepts.SALFCBM/1"}',
        ],
        ids=range(7),
    )
    def test_a_broken_or_foreign_configuration(self, saved, content):
        model, folder = saved
        (folder / "config.json").write_bytes(content)
        with pytest.raises(ArtifactError, match=r"config\.json"):
            SALFCBM.from_pretrained(folder, backbone=model.backbone)

    def test_broken_or_foreign_weights(self, saved):
        model, folder = saved
        file = folder / "model.safetensors"
        whole = file.read_bytes()
        for content in (b"", whole[:40], whole[:-8], struct.pack("<Q", 2**62) + whole[8:], b"\x80\x04pickle"):
            file.write_bytes(content)
            with pytest.raises(ArtifactError, match=r"model\.safetensors"):
                SALFCBM.from_pretrained(folder, backbone=model.backbone)
        save_file({"weight": torch.zeros(3)}, file)
        with pytest.raises(ArtifactError, match="is not a saved SALFCBM"):
            SALFCBM.from_pretrained(folder, backbone=model.backbone)

    def test_files_of_two_models(self, saved, tmp_path):
        model, folder = saved
        model.select_concepts([1, 0, 2, 3, 4]).save_pretrained(tmp_path / "other")
        (folder / "config.json").write_bytes((tmp_path / "other" / "config.json").read_bytes())
        with pytest.raises(ArtifactError, match="do not belong together"):
            SALFCBM.from_pretrained(folder, backbone=model.backbone)

    @pytest.mark.parametrize(
        "change",
        [
            {"concepts": ["a", "a", "b", "c", "d"]},
            {"concepts": "abcde"},
            {"concepts": None},
            {"num_classes": 4},
            {"num_classes": float("inf")},
            {"num_classes": "3"},
            {"feature_dim": 10**12},
            {"grid": [7]},
            {"grid": "7"},
            {"layer": "nowhere"},
            {"layer": 5},
            {"layout": "x"},
            {"class_names": ["a"]},
            {"metadata": []},
            {"backbone": None},
            {"backbone": {"stored": True, "class": "x", "fingerprint": "y"}},
            {"reading": {"kind": 1}},
            {"reading": {"kind": "NCHW", "prefix_tokens": 0, "channels": 8, "image_size": [1], "grid": 5}},
        ],
        ids=str,
    )
    def test_a_consistent_forgery(self, saved, change):
        """Even if whoever changed the configuration also mended its digest."""
        from captum_concepts.models.salf_cbm import hub

        model, folder = saved
        config = {**json.loads((folder / "config.json").read_text()), **change}
        (folder / "config.json").write_text(json.dumps(config))
        tensors = load_file(folder / "model.safetensors")
        header = {"format": hub.FORMAT, "info": json.dumps({"config": hub._digest(config)})}
        save_file(tensors, folder / "model.safetensors", metadata=header)
        with pytest.raises(ArtifactError):
            SALFCBM.from_pretrained(folder, backbone=model.backbone)

    def test_values_that_are_not_finite(self, tmp_path):
        model = conv_model()
        with torch.no_grad():
            model.head.weight[0, 0] = float("nan")
        model.save_pretrained(tmp_path)
        with pytest.raises(ArtifactError, match="not finite"):
            SALFCBM.from_pretrained(tmp_path, backbone=model.backbone)

    def test_metadata_that_is_no_json(self, tmp_path):
        model = conv_model()
        model.metadata["set"] = {1, 2}
        with pytest.raises(InputError, match="JSON"):
            model.save_pretrained(tmp_path)
        assert not (tmp_path / "model.safetensors").exists()

    def test_a_replaced_bottleneck(self, tmp_path):
        model = conv_model()
        model.bottleneck = nn.Sequential(model.bottleneck)
        with pytest.raises(InputError, match="were replaced"):
            model.save_pretrained(tmp_path)


def test_a_file_is_not_looked_up_on_the_hub(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="pass the folder that save_pretrained wrote"):
        SALFCBM.from_pretrained(str(tmp_path / "model.safetensors"))
