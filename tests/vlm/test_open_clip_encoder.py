"""`OpenCLIPEncoder`: open_clip's own results from tensors, frozen, and clear about what it cannot load."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file

from captum_concepts.errors import ArtifactError, InputError, InputWarning
from captum_concepts.vlm import ImageTextEncoder, OpenCLIPEncoder, build_tower, tower_names
from captum_concepts.vlm._preprocessing import check_preprocess, resize_and_normalize

TEXT = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "patch_size": 8, "width": 16, "layers": 2, "head_width": 8}
CLIP = {"embed_dim": 12, "vision_cfg": VIT, "text_cfg": TEXT}
SIGLIP = {
    "embed_dim": 12,
    "init_logit_bias": -10.0,
    "custom_text": True,
    "vision_cfg": {**VIT, "pool_type": "avg", "no_ln_pre": True},
    "text_cfg": {**TEXT, "no_causal_mask": True, "pool_type": "last", "proj_bias": True},
}
RESNET = {"embed_dim": 12, "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16,
                                          "patch_size": None}, "text_cfg": TEXT}  # fmt: skip
SIGLIP_PREPROCESS = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}


def words(texts):
    """A tokenizer with one id for each letter; the end has the largest id, as open_clip's text towers expect."""
    ids = torch.zeros(len(texts), 8, dtype=torch.long)
    for row, text in zip(ids, texts, strict=True):
        codes = [1 + ord(c) % 47 for c in text[:6]]
        row[: len(codes) + 2] = torch.tensor([48, *codes, 49])
    return ids


def write_folder(path: Path, model_cfg, preprocess=None, seed=0) -> tuple[Path, torch.nn.Module]:
    """A folder as open_clip saves one: config and weights."""
    path.mkdir()
    (path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess or {}})
    )
    torch.manual_seed(seed)
    model = open_clip.create_model(f"local-dir:{path}")
    save_file(model.state_dict(), path / "open_clip_model.safetensors")
    return path, model.eval()


@pytest.fixture
def tiny_names(tmp_path):
    """Two small architectures that open_clip knows by name; forgotten again afterwards."""
    import open_clip.factory as factory

    before = dict(factory._MODEL_CONFIGS), list(factory._MODEL_CONFIG_PATHS)
    for name, config in (("tiny-clip", CLIP), ("tiny-siglip", SIGLIP)):
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(tmp_path / f"{name}.json")
    yield
    factory._MODEL_CONFIGS.clear()
    factory._MODEL_CONFIGS.update(before[0])
    factory._MODEL_CONFIG_PATHS[:] = before[1]


def photograph(height: int, width: int, seed: int = 0) -> np.ndarray:
    """8-bit picture with edges, gradients and noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = 127 + 90 * np.sin(x / 5 + np.array([0, 1, 2])[:, None, None]) * np.cos(y / 9)
    waves[:, height // 3 : height // 2, width // 4 : width // 2] = 255
    waves[:, : height // 5] = 0
    return np.clip(waves + rng.normal(0, 12, waves.shape), 0, 255).astype(np.uint8).transpose(1, 2, 0)


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [48, (40, 56)])
@pytest.mark.parametrize("shape", [(97, 131), (131, 97), (30, 77), (48, 48), (33, 20), (300, 48)])
def test_transform_equals_open_clips_pil_transform(resize_mode, interpolation, size, shape):
    config = {"size": size, "interpolation": interpolation, "resize_mode": resize_mode, "fill_color": 60}
    pixels = photograph(*shape)
    expected = image_transform_v2(PreprocessCfg(**config), is_train=False)(Image.fromarray(pixels))
    got = resize_and_normalize(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255, check_preprocess(config))[0]
    assert got.shape == expected.shape
    levels = (got - expected).abs() * torch.tensor(PreprocessCfg.std)[:, None, None] * 255
    assert levels.mean() < 0.5
    assert (levels > 2.01).float().mean() < 0.005
    if resize_mode == "squash":
        # Pillow 13 resizes some anisotropic shapes by columns first; with the classic order of passes made explicit:
        height, width = expected.shape[1:]
        kind = getattr(Image.Resampling, interpolation.upper())
        picture = Image.fromarray(pixels).resize((width, shape[0]), kind).resize((width, height), kind)
        expected = image_transform_v2(PreprocessCfg(**config), is_train=False)(picture)
        levels = (got - expected).abs() * torch.tensor(PreprocessCfg.std)[:, None, None] * 255
    assert levels.max() < 2.01


@pytest.mark.parametrize("config", [CLIP, SIGLIP, RESNET], ids=["clip", "siglip", "resnet"])
def test_embeddings_are_open_clips_own(tmp_path, config):
    path, model = write_folder(tmp_path / "m", config, SIGLIP_PREPROCESS if config is SIGLIP else {"mean": [0.4] * 3})
    encoder = OpenCLIPEncoder.from_pretrained(f"local-dir:{path}", tokenizer=words)
    assert isinstance(encoder, ImageTextEncoder)
    assert encoder.preprocess["resize_mode"] == ("squash" if config is SIGLIP else "shortest")
    pixels = photograph(70, 90)
    reference = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    expected = model.encode_image(reference(Image.fromarray(pixels))[None])
    got = encoder.encode_image(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255)
    assert F.cosine_similarity(got, expected).item() > 0.9995
    exact = model.encode_image(encoder.transform(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255))
    assert torch.allclose(got, exact, atol=1e-5)
    texts = ["red", "a dog", "stripes"]
    assert torch.allclose(encoder.encode_text(texts), model.encode_text(words(texts)), atol=1e-5)
    assert torch.equal(encoder(torch.ones(1, 3, 40, 40)), encoder.encode_image(torch.ones(1, 3, 40, 40)))


def test_scale_bias_and_probability(tmp_path):
    for name, config, probability, bias in (("c", CLIP, "softmax", 0.0), ("s", SIGLIP, "sigmoid", -10.0)):
        _, model = write_folder(tmp_path / name, config)
        with torch.no_grad():
            model.logit_scale.fill_(3.0)
        encoder = OpenCLIPEncoder(model, words)
        assert encoder.logit_scale == pytest.approx(np.exp(3.0))
        assert isinstance(encoder.logit_scale, float)
        assert (encoder.logit_bias, encoder.probability) == (bias, probability)
        # The same logits as the model's own forward.
        images, texts = torch.rand(2, 3, 32, 32), ["a", "bc"]
        image, text = (F.normalize(e, dim=1) for e in (encoder.encode_image(images), encoder.encode_text(texts)))
        expected = model.get_logits(encoder.transform(images), words(texts))[0]
        assert torch.allclose(encoder.logit_scale * image @ text.T + encoder.logit_bias, expected, atol=1e-4)


def test_results_do_not_depend_on_batching(tmp_path):
    _, model = write_folder(tmp_path / "m", CLIP)
    encoder = OpenCLIPEncoder(model, words, text_batch_size=2)
    images = torch.rand(5, 3, 50, 45)
    one_by_one = torch.cat([encoder.encode_image(x[None]) for x in images])
    assert torch.allclose(encoder.encode_image(images), one_by_one, atol=1e-5)
    assert torch.allclose(encoder.encode_image(list(images)), one_by_one, atol=1e-5)
    mixed = encoder.encode_image([torch.ones(3, 40, 90), images[0]])
    assert torch.allclose(mixed[1], one_by_one[0], atol=1e-5)
    texts = ["a", "bb", "ccc", "dd", "e"]
    whole = OpenCLIPEncoder(model, words).encode_text(texts)
    assert torch.allclose(encoder.encode_text(texts), whole, atol=1e-5)


def test_templates_are_averaged_on_the_sphere(tmp_path):
    _, model = write_folder(tmp_path / "m", CLIP)
    plain = OpenCLIPEncoder(model, words)
    encoder = OpenCLIPEncoder(model, words, templates=("x{}", "{}yz"), text_batch_size=3)
    for text, row in zip(["a", "b"], encoder.encode_text(["a", "b"]), strict=True):
        parts = F.normalize(plain.encode_text([f"x{text}", f"{text}yz"]), dim=1)
        assert torch.allclose(row, F.normalize(parts.mean(0), dim=0), atol=1e-5)
    assert OpenCLIPEncoder(model, words, templates="a {}").templates == ("a {}",)


def test_frozen_and_gradient_flows_to_the_images_only(tmp_path):
    _, model = write_folder(tmp_path / "m", CLIP)
    encoder = OpenCLIPEncoder(model.train(), words)
    assert not any(m.training for m in encoder.modules())
    assert not any(m.training for m in encoder.train().modules())
    assert not any(m.training for m in torch.nn.Sequential(encoder).train()[0].modules())
    images = torch.rand(2, 3, 40, 40, requires_grad=True)
    embedding = encoder.encode_image(images)
    (gradient,) = torch.autograd.grad(embedding[0].square().sum(), images)
    assert gradient[0].abs().sum() > 0
    assert gradient[1].abs().sum() == 0
    # A numeric derivative along the gradient confirms that resizing and normalising are inside it.
    step = gradient / gradient.norm() * 1e-2
    with torch.no_grad():
        up = encoder.encode_image(images + step)[0].square().sum()
        down = encoder.encode_image(images - step)[0].square().sum()
    assert float((up - down) / 2) == pytest.approx(float((gradient * step).sum()), rel=0.05)
    assert all(p.grad is None and not p.requires_grad for p in encoder.parameters())
    assert not encoder.encode_image(images.detach()).requires_grad
    assert not encoder.encode_text(["a"]).requires_grad


@pytest.mark.parametrize("precision", ["bf16", "pure_bf16", "fp16"])
def test_half_precision(tmp_path, precision):
    path, model = write_folder(tmp_path / "m", CLIP)
    encoder = OpenCLIPEncoder.from_pretrained(f"local-dir:{path}", precision=precision, tokenizer=words)
    images = torch.rand(3, 3, 32, 32)
    full = OpenCLIPEncoder(model, words).encode_image(images)
    got = encoder.encode_image(images)
    assert got.dtype == torch.float32
    assert F.cosine_similarity(got, full).min() > 0.98
    assert encoder.encode_image(images.half()).dtype == torch.float32
    assert encoder.encode_text(["a"]).dtype == torch.float32


def test_half_precision_of_a_tower_without_convolutions(tmp_path):
    model = write_folder(tmp_path / "m", CLIP)[1]
    model.visual = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3, 2)).half()
    assert OpenCLIPEncoder(model, words).image_dtype == torch.float16


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_local_file(tmp_path, tiny_names, suffix):
    torch.manual_seed(1)
    model = open_clip.create_model("tiny-siglip").eval()
    file = tmp_path / f"weights.{suffix}"
    if suffix == "pt":
        torch.save({"state_dict": model.state_dict()}, file)
    else:
        save_file(model.state_dict(), file)
    encoder = OpenCLIPEncoder.from_pretrained("tiny-siglip", file, tokenizer=words, preprocess=SIGLIP_PREPROCESS)
    images = torch.rand(2, 3, 32, 32)
    assert torch.allclose(encoder.encode_image(images), model.encode_image(images * 2 - 1), atol=1e-5)
    assert encoder.preprocess["size"] == (32, 32)
    assert encoder.preprocess["resize_mode"] == "squash"


def test_a_local_file_is_never_unpickled_into_code(tmp_path, tiny_names):
    class Harmful:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"state_dict": Harmful()}, tmp_path / "bad.pt")
    with pytest.raises(ArtifactError, match="state dict of this very model"):
        OpenCLIPEncoder.from_pretrained("tiny-clip", tmp_path / "bad.pt", tokenizer=words)
    assert not (tmp_path / "executed").exists()


def test_weights_of_another_model_are_refused(tmp_path, tiny_names):
    save_file(open_clip.create_model("tiny-clip").state_dict(), tmp_path / "clip.safetensors")
    with pytest.raises(ArtifactError, match="could not be loaded into 'tiny-siglip'"):
        OpenCLIPEncoder.from_pretrained(
            "tiny-siglip", tmp_path / "clip.safetensors", tokenizer=words, preprocess=SIGLIP_PREPROCESS
        )


def test_a_file_takes_the_published_preprocessing_of_its_model(tmp_path, monkeypatch):
    from captum_concepts.vlm._pretrained import published_preprocess

    found = published_preprocess(open_clip, "ViT-B-16-SigLIP", {})
    assert found["mean"] == (0.5, 0.5, 0.5)
    assert found["resize_mode"] == "squash"
    assert published_preprocess(open_clip, "RN50", {})["mean"] == open_clip.OPENAI_DATASET_MEAN
    with pytest.warns(InputWarning, match="differ in preprocessing"):
        assert published_preprocess(open_clip, "ViT-L-14", {}) == {}
    # Said by the user: no warning.
    assert published_preprocess(open_clip, "ViT-L-14", {"mean": (0.5,) * 3, "std": (0.5,) * 3}) == {}


def test_random_weights_are_announced(tiny_names):
    with pytest.warns(InputWarning, match="random weights"):
        OpenCLIPEncoder.from_pretrained("tiny-clip", tokenizer=words)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OpenCLIPEncoder.from_pretrained("tiny-clip", tokenizer=words, load_weights=False)


def test_unknown_names_offer_the_known(tmp_path):
    with pytest.raises(InputError, match="Did you mean 'ViT-B-32'"):
        OpenCLIPEncoder.from_pretrained("ViT-B32", "openai")
    with pytest.raises(InputError, match=r"neither a file nor a tag.*laion2b_s34b_b79k"):
        OpenCLIPEncoder.from_pretrained("ViT-B-32", "laion2b_s34b")
    with pytest.raises(InputError, match="neither a file"):
        OpenCLIPEncoder.from_pretrained("ViT-B-32", tmp_path / "missing.safetensors")
    with pytest.raises(ArtifactError, match="no_such_folder"):
        OpenCLIPEncoder.from_pretrained(f"local-dir:{tmp_path / 'no_such_folder'}")
    with pytest.raises(InputError, match="includes its own weights"):
        OpenCLIPEncoder.from_pretrained(f"local-dir:{tmp_path}", "openai")


def test_offline_says_what_to_do(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("network is unreachable")

    monkeypatch.setattr(sys.modules["open_clip.factory"], "download_pretrained", unreachable)
    with pytest.raises(ArtifactError, match=r"network is unreachable.*connect once.*pass its path as pretrained="):
        OpenCLIPEncoder.from_pretrained("ViT-B-32", "laion2b_s34b_b79k")


def test_a_folder_without_weights_is_refused(tmp_path):
    path, _ = write_folder(tmp_path / "m", CLIP)
    (path / "open_clip_model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"could not be loaded.*open_clip_model.safetensors"):
        OpenCLIPEncoder.from_pretrained(f"local-dir:{path}", tokenizer=words)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "/ 255"),
        (torch.zeros(3, 8, 8), "not RGB"),
        (torch.zeros(2, 1, 8, 8), "not RGB"),
        (torch.zeros(0, 3, 8, 8), "no pixel"),
        ([], "empty"),
    ],
)
def test_wrong_images_are_named(tmp_path, images, message):
    encoder = OpenCLIPEncoder(write_folder(tmp_path / "m", CLIP)[1], words)
    for call in (encoder.encode_image, encoder):
        with pytest.raises(InputError, match=message):
            call(images)


def test_wrong_texts_templates_and_preprocessing_are_named(tmp_path):
    model = write_folder(tmp_path / "m", CLIP)[1]
    encoder = OpenCLIPEncoder(model, words)
    for bad in ("red", [], [3]):
        with pytest.raises(InputError, match="texts"):
            encoder.encode_text(bad)
    with pytest.warns(InputWarning, match="already normalized"):
        encoder.encode_image(torch.randn(2, 3, 32, 32))
    with pytest.raises(InputError, match="must be strings with a placeholder"):
        OpenCLIPEncoder(model, words, templates=("a photo",))
    with pytest.raises(InputError, match="Did you mean 'mean'"):
        OpenCLIPEncoder(model, words, {"means": 3})
    with pytest.raises(InputError, match="squash"):
        OpenCLIPEncoder(model, words, {"resize_mode": "crop"})


def test_con_se_satisfies_the_protocol_unchanged(shared_data, monkeypatch):
    monkeypatch.syspath_prepend(str(shared_data))
    from real_models import ConSE

    encoder = ConSE()
    assert isinstance(encoder, ImageTextEncoder)
    assert encoder.encode_image(torch.rand(1, 3, 224, 224)).shape[1] == encoder.encode_text(["cat"]).shape[1]


class TestLongTexts:
    @pytest.fixture
    def encoder(self):
        torch.manual_seed(0)
        text = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
        model = open_clip.model.CLIP(8, dict(VIT), text)
        return OpenCLIPEncoder(model, open_clip.SimpleTokenizer(context_length=12), {"size": 32})

    def test_those_that_are_cut_are_named(self, encoder):
        fits, over = " ".join(["cat"] * 10), " ".join(["cat"] * 11)
        encoder.encode_text([fits, "dog"])  # a warning would be an error
        with pytest.warns(InputWarning, match="1 texts are longer than the 12 tokens that the encoder reads.*'cat cat"):
            encoder.encode_text([over, "dog"])
        with pytest.warns(InputWarning, match="1 texts"):
            found = encoder.encode_text([over, over])
        assert torch.equal(found[0], found[1])

    def test_those_that_would_be_equal_are_refused(self, encoder):
        start = " ".join(["cat"] * 11)
        with pytest.raises(InputError, match=r"reads 12 tokens, and 'cat .* and 'cat .* are identical up to there"):
            encoder.encode_text([f"{start} on a mat", f"{start} on a sofa"])

    def test_in_templates(self, encoder):
        encoder.templates = ("{}", "a photo of a very old {} in the middle of a field")
        with pytest.warns(InputWarning, match="1 texts .* 'a photo of a very old cat"):
            encoder.encode_text(["cat"])

    def test_any_tokenizer(self, encoder):
        """A function: what changes nothing when its last word goes is cut."""

        def tokens(texts):
            rows = [[1, *(2 + sum(map(ord, w)) % 400 for w in text.split()), 410][:12] for text in texts]
            return torch.tensor([row + [0] * (12 - len(row)) for row in rows])

        encoder.tokenizer = tokens
        encoder.encode_text(["one two three four five"])
        with pytest.warns(InputWarning, match="12 tokens"):
            encoder.encode_text(["one two three four five six seven eight nine ten eleven twelve"])
        encoder.encode_text(["x" * 100])  # one word, which is one token here

    def test_the_message_stays_short(self, encoder):
        texts = [f"{i} " + "cat " * 200 for i in range(500)]
        with pytest.warns(InputWarning) as said:
            encoder.encode_text(texts)
        assert len(str(said[0].message)) <= 600


@pytest.mark.parametrize(
    ("name", "others"), [("RN50", {"RN101", "RN50x4"}), ("ViT-B-32", {"ViT-B-32-256", "ViT-B-16"})]
)
def test_a_tower_is_found_by_what_it_is(name, others):
    found = set(tower_names(build_tower(name)))
    assert name in found
    assert found & others == set()
