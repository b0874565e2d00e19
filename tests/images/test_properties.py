"""Whatever the size, dtype, memory format and holder: the same images come out, in any batches."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from captum_concepts.images import Reading, batches, fingerprint, open_images, placement

sides = st.integers(1, 17)


@st.composite
def stacks(draw) -> torch.Tensor:
    """uint8 images of any size, whatever their memory looks like."""
    n, height, width = draw(st.integers(1, 5)), draw(sides), draw(sides)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    images = torch.randint(0, 256, (n, 3, height, width), generator=generator, dtype=torch.uint8)
    form = draw(st.sampled_from(["contiguous", "channels last", "flipped", "strided", "expanded"]))
    if form == "channels last":
        return images.contiguous(memory_format=torch.channels_last)
    if form == "flipped":
        return images.transpose(2, 3).contiguous().transpose(2, 3)
    if form == "strided":
        return torch.stack([images, images], -1)[..., 1]
    return images[:1].expand(n, -1, -1, -1) if form == "expanded" else images


@settings(max_examples=60, deadline=None)
@given(stacks(), st.integers(1, 7), st.sampled_from([torch.uint8, torch.float32, torch.float64, torch.bfloat16]))
def test_batches_hold_the_images(pixels: torch.Tensor, batch_size: int, dtype: torch.dtype):
    images = pixels if dtype == torch.uint8 else (pixels.double() / 255).to(dtype)
    expected = pixels.double() / 255
    tolerance = 0.004 if dtype == torch.bfloat16 else 1e-6
    holders = [
        images, list(images), TensorDataset(images), DataLoader(TensorDataset(images), 2, shuffle=True),
        ({"image": image} for image in images),
    ]  # fmt: skip
    if dtype == torch.uint8:
        holders.append([Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images])
    for holder in holders:
        found = list(batches(holder, batch_size))
        assert all(len(batch) <= batch_size for batch in found)
        assert [i for batch in found for i in batch.indices] == list(range(len(images)))
        got = torch.cat([batch.images for batch in found])
        assert torch.allclose(got.double(), expected, atol=tolerance)
    assert fingerprint(images) == fingerprint(list(images.clone()))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), sides, sides, st.sampled_from(["crop", "squash", "pad"]),
       st.floats(0.1, 1))  # fmt: skip
def test_placement_stays_inside(height, width, high, wide, resize, crop):
    place = placement(height, width, (high, wide), resize=resize, crop=crop)
    assert 0 <= place.left < place.right <= width + 1e-9
    assert 0 <= place.top < place.bottom <= height + 1e-9
    assert place.height <= high
    assert place.width <= wide
    if resize != "pad":
        assert (place.height, place.width) == (high, wide)
    if resize == "crop":  # the aspect ratio is kept
        scale = (place.bottom - place.top) / high
        assert np.isclose((place.right - place.left) / wide, scale, rtol=1e-6)


@settings(max_examples=40, deadline=None)
@given(stacks(), sides, sides, st.sampled_from(["crop", "squash", "pad"]), st.sampled_from(["bicubic", "bilinear"]))
def test_resizing_keeps_shape_range_and_constants(pixels, height, width, resize, interpolation):
    options = {"size": (height, width), "resize": resize, "interpolation": interpolation}
    for image in open_images(pixels, **options):
        assert image.shape == (3, height, width)
        assert image.min() >= 0
        assert image.max() <= 1
    gray = torch.full((1, 3, *pixels.shape[-2:]), 0.25)
    assert torch.allclose(open_images(gray, background=0.25, **options)[0], gray.new_tensor(0.25))


@settings(max_examples=40, deadline=None)
@given(stacks(), st.sampled_from(["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "I;16", "I", "F"]), sides)
def test_every_mode_is_read(pixels, mode, side):
    image = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    if mode in ("I;16", "I"):
        deep = np.asarray(image.convert("L")).astype(np.uint16 if mode == "I;16" else np.int32) * 257
        deep.flat[0] = 65535
        image = Image.fromarray(deep)
    elif mode == "F":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.float32) / 255)
    else:
        image = image.convert("L").convert(mode) if mode == "LA" else image.convert(mode)
    for reading in (Reading(), Reading(side), Reading(mode="L"), Reading(side, "L", "pad")):
        found = open_images([image], size=reading.size, mode=reading.mode, resize=reading.resize)[0]
        assert found.shape == (3 if reading.mode == "RGB" else 1, *(reading.size or pixels.shape[-2:]))
        assert 0 <= found.min() <= found.max() <= 1
