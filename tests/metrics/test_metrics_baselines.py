"""Maps that know no concept, on synthetic and on real masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from captum_concepts import metrics
from captum_concepts.errors import InputError


def test_random_maps_belong_to_their_image_not_to_the_batch():
    images = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    explainer = metrics.RandomMaps((4, 6), n_maps=3)
    maps = explainer(images)
    assert maps.shape == (5, 3, 4, 6)
    assert torch.equal(torch.cat([explainer(image[None]) for image in images]), maps)
    assert torch.equal(metrics.RandomMaps((4, 6), n_maps=3)(images, target=2), maps)
    assert not torch.equal(metrics.RandomMaps((4, 6), n_maps=3, seed=1)(images), maps)
    assert not torch.equal(maps[0], maps[1])
    assert metrics.RandomMaps()(images).shape == (5, 7, 7)
    with pytest.raises(InputError, match="n_maps"):
        metrics.RandomMaps(n_maps=0)


def test_center_gaussian_is_centred_and_scales_with_the_image():
    heat = metrics.center_gaussian(1, (9, 21), sigma=0.2)[0]
    assert heat.argmax().item() == 4 * 21 + 10
    torch.testing.assert_close(heat, heat.flip(0).flip(1))
    edge = np.exp(-((0.5 - 0.5 / 9) ** 2) / (2 * 0.2**2))
    assert heat[0, 10].item() == pytest.approx(edge, rel=1e-5)
    assert metrics.CenterGaussian()(torch.rand(2, 3, 6, 4)).shape == (2, 6, 4)
    for sigma in (0, torch.nan, "0.2", None):
        with pytest.raises(InputError, match="sigma"):
            metrics.center_gaussian(1, (4, 4), sigma=sigma)


def test_options_of_the_baselines_are_checked_where_they_are_made():
    for n_maps in (0, 1.5, "3"):
        with pytest.raises(InputError, match="n_maps"):
            metrics.CenterGaussian(n_maps=n_maps)
    with pytest.raises(InputError, match=r"size must be \(H, W\)"):
        metrics.RandomMaps(7)


def test_activation_energy_is_the_norm_over_channels():
    a = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(metrics.activation_energy(a), a.square().sum(1).sqrt())
    assert metrics.activation_energy(a.half() * 200).isfinite().all()
    with pytest.raises(InputError, match=r"\(N, C, h, w\)"):
        metrics.activation_energy(a[0])


def test_what_blind_maps_get_on_real_masks(shared_data: Path):
    """Why tables show both baselines and a centre row: by the published NRA, noise is far from 0 on COCO regions."""
    masks = []
    for file in sorted((shared_data / "images" / "coco" / "masks").iterdir())[:30]:
        labels = torch.from_numpy(np.array(Image.open(file).resize((112, 112), Image.Resampling.NEAREST))).long()
        masks += [labels == i for i in labels.unique().tolist() if i and (labels == i).float().mean() > 0.01]
    masks = torch.stack(masks)
    noise = torch.rand(masks.shape, generator=torch.Generator().manual_seed(0))
    centre = metrics.center_gaussian(len(masks), (112, 112))
    assert 0.1 < metrics.nra(noise, masks).mean() < 0.2
    assert metrics.nra(noise, masks, baseline="exact").mean() < 0.01
    assert metrics.nra(centre, masks, baseline="exact").mean() > 0.05
