"""One image with NaN pixels, or one NaN embedding: every fit refuses, names the image, and writes nothing of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import DENSE, NET, POOLED, Colors

from captum_concepts import (
    ConceptFusionMap,
    FeatureActivationMap,
    SpatialACV,
    audit_dataset,
    discover_concepts,
    fit_salf_cbm,
)
from captum_concepts.errors import InputError

GOOD = torch.rand(60, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2] * 20)
BAD = GOOD.clone()
BAD[37, 1, 2, 3] = torch.nan


class Spoiled(Colors):
    """Its embeddings of image 37 are NaN."""

    def encode_image(self, images):
        return spoiled(images, super().encode_image(images))

    def encode_regions(self, images, grid):
        return spoiled(images, super().encode_regions(images, grid))


def spoiled(images, embeddings):
    if images.shape[1:] == GOOD.shape[1:]:
        embeddings[(images - GOOD[37]).abs().flatten(1).amax(1) < 1e-3] = torch.nan
    return embeddings


def salf(folder: Path, images, encoder, **options):
    return fit_salf_cbm(
        NET, "0", (images, LABELS), encoder, ["a", "b"], 3, store_path=folder, grid=2, prompt=DENSE,
        presence_cutoff=None, interpretability_cutoff=None, **options,
    )  # fmt: skip


def acv() -> SpatialACV:
    return SpatialACV(NET, "0").fit({"a": GOOD[:20], "b": GOOD[:20] * 0.1}, GOOD[40:])


def fusion() -> ConceptFusionMap:
    return ConceptFusionMap(NET, ["0"]).fit(GOOD, Colors(), ["a", "b"])


TABLE = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(30, 1)
#: What is fitted, and the name of the image in the message.
FITS: dict[str, tuple[Callable[[Path], object], str]] = {
    "ConceptFusionMap.fit": (lambda path: ConceptFusionMap(NET, ["0"]).fit(BAD, Colors(), ["a", "b"]), "image 37"),
    "ConceptFusionMap.fit, embedding": (
        lambda path: ConceptFusionMap(NET, ["0"]).fit(GOOD, Spoiled(), ["a", "b"]),
        "image 37",
    ),
    "ConceptFusionMap.fit, crops and cache": (
        lambda path: ConceptFusionMap(NET, ["0"]).fit(BAD, Colors(), ["a", "b"], crops=2, cache_dir=path),
        "image 37",
    ),
    "ConceptFusionMap.calibrate": (lambda path: fusion().calibrate(BAD, TABLE), "image 37"),
    "SpatialACV.fit": (lambda path: SpatialACV(NET, "0").fit({"a": BAD[30:50]}, GOOD[:20]), "image 7 of 'a'"),
    "SpatialACV.fit, negatives": (
        lambda path: SpatialACV(NET, "0").fit({"a": GOOD[:20]}, BAD[20:]),
        "image 17 of 'negatives'",
    ),
    "SpatialACV.calibrate": (lambda path: acv().calibrate(BAD, ["a", "b"] * 30), "image 37"),
    "FeatureActivationMap.fit": (lambda path: FeatureActivationMap(POOLED, "0").fit(BAD, LABELS), "image 37"),
    "FeatureActivationMap.calibrate": (
        lambda path: FeatureActivationMap(POOLED, "0").fit(GOOD, LABELS).calibrate(BAD, LABELS.tolist()),
        "image 37",
    ),
    "discover_concepts": (lambda path: discover_concepts(POOLED, "1", BAD, n_concepts=2), "image 37"),
    "fit_salf_cbm": (lambda path: salf(path, BAD, Colors()), "image 37"),
    "fit_salf_cbm, embedding": (lambda path: salf(path, GOOD, Spoiled()), "image 37"),
    "fit_salf_cbm, validation": (lambda path: salf(path, GOOD, Colors(), val_data=(BAD, LABELS)), "image 37"),
    "fit_salf_cbm, crops of the encoder alone": (
        lambda path: salf(path, BAD, Colors(), encoder_transform=torch.nan_to_num),
        "image 37",
    ),
    "audit_dataset": (
        lambda path: audit_dataset(acv(), BAD, labels=LABELS, n_bootstrap=20, store_path=path),
        "image 37",
    ),
}


@pytest.mark.filterwarnings("ignore:the inputs contain NaN")
@pytest.mark.parametrize("fit", FITS)
def test_it_is_refused_by_name(tmp_path, fit):
    run, image = FITS[fit]
    with pytest.raises(InputError, match=f"{image}( contain|,| hold|$)"):
        run(tmp_path)
    written = {file.name for file in tmp_path.rglob("*") if file.is_file()}
    assert not [name for name in written if name.startswith(("head", "bottleneck", "model", "part-"))]
