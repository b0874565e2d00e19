"""Models of transformers as encoders: the same embeddings as their own processor and model give, and dense regions."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from captum_concepts import ConceptFusionMap, FeatureActivationMap, discover_concepts, fit_salf_cbm
from captum_concepts.errors import InputError, InputWarning
from captum_concepts.store import RegionEmbeddingStore
from captum_concepts.vlm import DenseRegions, ImageTextEncoder, RegionPrompt, check_encoder, from_transformers

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
transformers = pytest.importorskip("transformers")

TEXT = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 10, "bos_token_id": 1, "eos_token_id": 39, "pad_token_id": 0,
}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 8}


class Tokenizer:
    """Words to ids, with the calling convention of transformers."""

    def __call__(self, texts, padding=False, truncation=False, max_length=None, return_tensors=None):
        rows = [[1, *(2 + sum(map(ord, word)) % 37 for word in text.split()), 39] for text in texts]
        if truncation:
            rows = [row if len(row) <= max_length else [*row[: max_length - 1], 39] for row in rows]
        if padding == "max_length":
            rows = [row + [0] * (max_length - len(row)) for row in rows]
        return {"input_ids": torch.tensor(rows) if return_tensors == "pt" else rows}


def clip() -> tuple[nn.Module, SimpleNamespace]:
    config = transformers.CLIPConfig(
        text_config=TEXT, vision_config={**VISION, "image_size": 32, "projection_dim": 24}, projection_dim=24
    )
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return transformers.CLIPModel(config), SimpleNamespace(image_processor=images, tokenizer=Tokenizer())


def siglip() -> tuple[nn.Module, SimpleNamespace]:
    text = {**TEXT, "hidden_size": 32}
    config = transformers.SiglipConfig(text_config=text, vision_config={**VISION, "image_size": 32})
    images = transformers.SiglipImageProcessor(size={"height": 32, "width": 32})
    return transformers.SiglipModel(config), SimpleNamespace(image_processor=images, tokenizer=Tokenizer())


def siglip2() -> tuple[nn.Module, SimpleNamespace]:
    text = {**TEXT, "hidden_size": 32}
    config = transformers.Siglip2Config(text_config=text, vision_config={**VISION, "num_patches": 16})
    images = transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
    return transformers.Siglip2Model(config), SimpleNamespace(image_processor=images, tokenizer=Tokenizer())


KINDS = {"clip": clip, "siglip": siglip, "siglip2": siglip2}


def made(kind: str):
    torch.manual_seed(0)
    model, processor = KINDS[kind]()
    return model.eval(), processor, from_transformers(model, processor)


def picture(height: int, width: int, seed: int = 0) -> tuple[Tensor, Image.Image]:
    """Smooth, so that rounding to 8 bits between two passes of resizing matters little."""
    noise = torch.rand(1, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
    pixels = (nn.functional.interpolate(noise, (height, width), mode="bilinear")[0] * 255).round().to(torch.uint8)
    return pixels.float()[None] / 255, Image.fromarray(pixels.permute(1, 2, 0).numpy())


def pooled(found) -> Tensor:
    return found if isinstance(found, Tensor) else found.pooler_output


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(32, 32), (48, 64), (80, 50)])
def test_images_as_by_their_own_processor(kind, size):
    model, processor, encoder = made(kind)
    x, image = picture(*size)
    with torch.no_grad():
        expected = pooled(model.get_image_features(**processor.image_processor(image, return_tensors="pt")))
    found = encoder.encode_image(x)
    assert isinstance(encoder, ImageTextEncoder)
    assert nn.functional.cosine_similarity(found, expected).item() > 0.9999
    if kind != "siglip2":
        pixels = processor.image_processor(image, return_tensors="pt")["pixel_values"]
        assert (encoder.transform(x) - pixels).abs().max() < 3 / 255 / min(encoder.preprocess["std"])
    other = encoder.encode_image(picture(*size, seed=1)[0])
    assert nn.functional.cosine_similarity(found, other).item() < 0.9999


def test_a_crop_of_a_larger_resized_image():
    model, processor = clip()
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 41}, crop_size={"height": 32, "width": 32})
    encoder = from_transformers(model, SimpleNamespace(image_processor=images, tokenizer=processor.tokenizer))
    x, image = picture(70, 60)
    expected = images(image, return_tensors="pt")["pixel_values"]
    assert (encoder.transform(x) - expected).abs().max() < 3 / 255 / min(encoder.preprocess["std"])


@pytest.mark.parametrize("kind", KINDS)
def test_texts_scale_and_bias(kind):
    model, processor, encoder = made(kind)
    texts = ["red ball", "a long blue box", "x"]
    ids = processor.tokenizer(texts, padding="max_length", truncation=True, max_length=10, return_tensors="pt")
    with torch.no_grad():
        expected = pooled(model.get_text_features(**ids))
    torch.testing.assert_close(encoder.encode_text(texts), expected)
    assert encoder.logit_scale == pytest.approx(float(model.logit_scale.exp()))
    assert encoder.probability == ("softmax" if kind == "clip" else "sigmoid")
    assert encoder.logit_bias == (0.0 if kind == "clip" else pytest.approx(float(model.logit_bias)))
    with pytest.warns(InputWarning, match="1 texts are longer than the 10 tokens .* 'w1 w2 w3"):
        encoder.encode_text(["w1 w2 w3 w4 w5 w6 w7 w8 w9", "short"])


@pytest.mark.parametrize("attention", ["value", "qq", "kk"])
def test_dense_regions_of_clip_by_hand(attention):
    model, _, encoder = made("clip")
    x = torch.rand(2, 3, 32, 32)
    vision, kept = model.vision_model, {}
    block = vision.encoder.layers[-1]
    handle = block.register_forward_pre_hook(lambda _m, args, kw: kept.update(x=args[0]), with_kwargs=True)
    with torch.no_grad():
        encoder.encode_image(x)
        handle.remove()
        y = block.layer_norm1(kept["x"])
        own, heads = block.self_attn, block.self_attn.num_heads
        q, k, v = (p(y).unflatten(2, (heads, -1)) for p in (own.q_proj, own.k_proj, own.v_proj))
        like = {"qq": q, "kk": k}.get(attention)
        if like is not None:
            weights = torch.einsum("nihd,njhd->nhij", like, like).div(like.shape[3] ** 0.5).softmax(3)
            v = torch.einsum("nhij,njhd->nihd", weights, v)
        expected = model.visual_projection(vision.post_layernorm(own.out_proj(v.flatten(2))[:, 1:]))
    found = encoder.encode_regions(x, 4, attention=attention, remove_outliers=False)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["siglip", "siglip2"])
def test_dense_regions_of_attention_pooling(kind):
    """Where all positions are equal, each cell is the image; a cell is what the head says of that position alone."""
    model, _, encoder = made(kind)
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        found = encoder.encode_regions(x, 4)
        norm = model.vision_model.post_layernorm
        handle = norm.register_forward_hook(lambda _m, _a, out: out[:, 5:6].expand_as(out).clone())
        torch.testing.assert_close(encoder.encode_image(x), found[:, 5], rtol=1e-4, atol=1e-5)
        handle.remove()
    with pytest.raises(InputError, match="for towers that read a class token"):
        encoder.encode_regions(x, 4, attention="kk")


@pytest.mark.parametrize("kind", ["ChineseCLIP", "AltCLIP"])
def test_padding_is_not_read(kind):
    """By text towers like BERT, which read all that is not masked, and whose table of positions may be longer."""
    torch.manual_seed(0)
    text = {**TEXT, "max_position_embeddings": 12, "project_dim": 24, "pad_token_id": 0}
    config = getattr(transformers, f"{kind}Config")(
        text_config=text, vision_config={**VISION, "image_size": 32}, projection_dim=24
    )
    model = getattr(transformers, f"{kind}Model")(config).eval()
    for weights in model.text_model.parameters():
        weights.data.mul_(8 if weights.ndim > 1 else 1)
    tokenizer, images = Tokenizer(), clip()[1].image_processor
    tokenizer.pad_token_id, tokenizer.model_max_length = 0, 10
    encoder = from_transformers(model, SimpleNamespace(image_processor=images, tokenizer=tokenizer))
    texts = ["red", "a long green stripe"]
    with torch.no_grad():
        ids = [tokenizer([text], return_tensors="pt")["input_ids"] for text in texts]
        expected = torch.cat([pooled(model.get_text_features(input_ids=one)) for one in ids])
    assert torch.allclose(encoder.encode_text(texts), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_layers_of_an_encoder_of_images_that_are_not_square(kind):
    """Its tokens are the squares of what it sees, not cells of the image; what it cuts off is said."""
    _, _, encoder = made(kind)
    fam = FeatureActivationMap(
        encoder, "model.model.vision_model.encoder.layers.1", encoder.encode_text(["red", "green"])
    )
    x = picture(30, 40)[0]
    if kind == "siglip":  # squashes
        maps = fam.attribute(x, target=0)
    else:
        with pytest.warns(InputWarning, match="only the center of images of 30 x 40"):
            maps = fam.attribute(x, target=0)
    assert maps.shape[2:] == (4, 4)


def test_a_store(tmp_path):
    _, _, encoder = made("siglip2")
    x = torch.rand(5, 3, 40, 56)
    for name, regions in {"dense": DenseRegions((2, 3)), "crops": RegionPrompt("crop", (2, 3), 12)}.items():
        store = RegionEmbeddingStore.build(tmp_path / name, x, encoder, regions, batch_size=4)
        assert store.embeddings(slice(None)).shape == (5, 6, 32)
        assert len(RegionEmbeddingStore.open(tmp_path / name, encoder=encoder).similarity(["red"]).tensor()) == 5


class TestRefusals:
    def test_half_a_model(self):
        model, processor = clip()
        with pytest.raises(InputError, match=r"CLIPVisionModel has no get_image_features.*not its image or text half"):
            from_transformers(transformers.CLIPVisionModel(model.config.vision_config), processor)

    def test_half_a_processor(self):
        model, processor = clip()
        with pytest.raises(InputError, match="must have an image_processor and a tokenizer"):
            from_transformers(model, processor.image_processor)

    def test_a_model_given_as_encoder(self, tmp_path):
        """Wherever an encoder is asked for."""
        model, _ = clip()
        x, net = torch.rand(9, 3, 32, 32), nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        for call in (
            lambda: RegionEmbeddingStore.build(tmp_path, x, model, RegionPrompt("crop", 2, 8)),
            lambda: ConceptFusionMap(net, ["0"]).fit(x, model, ["red"]),
            lambda: ConceptFusionMap(net, ["0"]).fit(x, model),
            lambda: discover_concepts(net, "0", x, n_concepts=2, encoder=model, words=["red"]),
            lambda: fit_salf_cbm(net, "0", (x, [0, 1, 2] * 3), model, ["red", "blue"], 3, store_path=tmp_path / "fit"),
        ):
            with pytest.raises(InputError, match=r"CLIPModel is a Hugging Face model.*pass vlm.from_transformers"):
                call()
        for wrong in (object(), nn.Linear(2, 2), "ViT-B-32", None):
            with pytest.raises(InputError, match="has no encode_image"):
                RegionEmbeddingStore.build(tmp_path, x, wrong, RegionPrompt("crop", 2, 8))

    def test_an_unknown_interpolation(self):
        model, processor = clip()
        processor.image_processor.resample = 0
        with pytest.raises(InputError, match="method 0"):
            from_transformers(model, processor)


def test_an_encoder_is_an_instance_with_numbers():
    class Encoder:
        logit_scale, logit_bias = 10.0, 0.0

        def encode_image(self, images):
            return images.mean((2, 3))

        def encode_text(self, texts):
            return torch.eye(3)[: len(texts)]

    check_encoder(Encoder(), words=True)
    with pytest.raises(InputError, match=r"encoder is the class Encoder; pass an instance of it"):
        check_encoder(Encoder, words=True)
    for name, value in (("logit_scale", 0.0), ("logit_scale", "x"), ("logit_bias", float("nan"))):
        encoder = Encoder()
        setattr(encoder, name, value)
        with pytest.raises(InputError, match=f"encoder.{name} must be a"):
            check_encoder(encoder)
    for value in (10, torch.tensor(10.0), torch.nn.Parameter(torch.tensor([10.0]))):
        encoder = Encoder()
        encoder.logit_scale = value
        check_encoder(encoder)
    with torch.device("meta"):
        encoder.model = torch.nn.Linear(2, 2)
    with pytest.raises(InputError, match=r"encoder is on the meta device.*load_state_dict"):
        check_encoder(encoder)
