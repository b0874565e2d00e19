"""What the papers printed, as shares of 1, their protocols and settings: the rows beside which ours are put."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]

#: How CE-FAM's published map gets its layer: by relevance, or by the NRA of the map itself against the true mask.
TOP_1, TOP_4 = "top-1", "top-4, uses the mask"
LAST_LAYER = "last layer"
#: What the authors of CE-FAM embed for a concept of each category of Broden (of ImageNet-S: the object's).
TEMPLATES = {
    "color": "a photo of a {} object",
    "material": "a photo of an object made of {}",
    "object": "a photo of a {}",
    "part": "a photo of a {}",
    "scene": "a photo of an object on {}",
    "texture": "a photo of a {} object",
}
#: The categories whose means are averaged in their table of Broden.
AVERAGED = ("color", "material", "object", "part")


def _rows(
    columns: tuple[str, ...], values: dict[str, tuple[float | str | None, ...]], percent: bool = False
) -> list[Row]:
    """A row for each method; numbers in percent become shares."""
    out = []
    for method, found in values.items():
        row: Row = {"method": f"{method} (published)"}
        for column, value in zip(columns, found, strict=True):
            row[column] = round(value / 100, 6) if percent and isinstance(value, float) else value
        out.append(row)
    return out


_REGIONS = ("epg", "nra", "hit_rate")
_MEANS = tuple(f"{column}, mean of categories" for column in _REGIONS)
_OBJECTS = tuple(f"{column}, object" for column in _REGIONS)

#: CE-FAM, tables 1 and 2. The authors' command of Broden is the protocol ``TOP_4``, that of ImageNet-S a translator of
#: the last layer alone.
CE_FAM_BRODEN = _rows(
    ("protocol", *_MEANS, *_OBJECTS),
    {
        "CLIP-Dissect": (TOP_4, 0.146, 0.334, 0.199, 0.197, 0.327, 0.215),
        "WWW": (TOP_4, 0.117, 0.278, 0.114, 0.179, 0.322, 0.154),
        "CE-FAM": (TOP_4, 0.154, 0.361, 0.247, 0.233, 0.459, 0.436),
    },
)
CE_FAM_IMAGENET_S = _rows(
    ("protocol", *_REGIONS),
    {
        "CLIP-Dissect": (LAST_LAYER, 0.047, 0.105, 0.013),
        "WWW": (LAST_LAYER, 0.076, 0.232, 0.017),
        "CE-FAM": (LAST_LAYER, 0.138, 0.273, 0.193),
    },
)
#: SALF-CBM, table 2.
SALF_SEGMENTATION = _rows(
    ("pixel_accuracy", "mean_iou", "average_precision"),
    {
        "LRP": (69.52, 36.85, 69.95),
        "integrated gradients": (68.49, 46.59, 73.46),
        "Grad-CAM": (71.34, 53.34, 83.88),
        "Grad-CAM++": (71.31, 53.56, 83.93),
        "Score-CAM": (69.56, 51.44, 81.78),
        "FullGrad": (73.04, 55.78, 88.35),
        "SALF-CBM": (76.94, 58.30, 85.31),
    },
    percent=True,
)
#: SALF-CBM, table 1.
SALF_ACCURACY = _rows(
    ("head", "CUB-200", "Places365", "ImageNet"),
    {
        "backbone, sparse": ("sparse", 75.96, 38.46, 74.35),
        "P-CBM": ("sparse", 59.60, None, None),
        "LF-CBM": ("sparse", 74.31, 43.68, 71.95),
        "SALF-CBM, sparse": ("sparse", 74.35, 46.73, 75.32),
        "backbone, its own head": ("dense", 76.70, 48.56, 76.13),
        "SALF-CBM, dense": ("dense", 76.21, 49.38, 76.26),
    },
    percent=True,
)

PUBLISHED: dict[str, list[Row]] = {
    "ce-fam-broden": CE_FAM_BRODEN,
    "ce-fam-imagenet-s": CE_FAM_IMAGENET_S,
    "salf-segmentation": SALF_SEGMENTATION,
    "salf-accuracy": SALF_ACCURACY,
}

COMMAND = "python -m benchmarks.run.papers.tables --table"

#: Table -> what it is, its protocol, and the command that fills it where the data is at hand.
PROTOCOLS: dict[str, tuple[str, str, str]] = {
    "ce-fam-broden": (
        "CE-FAM, regions of concepts on Broden",
        "EPG, NRA (`published.NRA`) and hit rate at 0.5 of every (image, concept) of Broden. The published rows take "
        f"for each region whichever of four layers has the best NRA against its mask (`{TOP_4}`), and average means "
        f"of {', '.join(AVERAGED)}; a prompt for each category; SGD with the similarity loss on `--train`. Ours beside "
        f'them: the same, the layer of highest relevance (`{TOP_1}`), and `map_layer="fused"` with the default '
        f"training. Of a ViT the authors read one encoder layer: `--last-layer` (`{LAST_LAYER}`). Two differences "
        "remain: training images are not augmented anew in every epoch (`--crops` of each, four by default, drawn "
        "once), and `--model` is timm's, where the authors take torchvision's second weights of ResNet-50.",
        f"{COMMAND} ce-fam-broden --root broden1_224 --train IMAGENET/train",
    ),
    "ce-fam-imagenet-s": (
        "CE-FAM, regions of concepts on ImageNet-S",
        "The same on the validation images of ImageNet-S, the mask of each class that is in the image, with a "
        f"translator of the last of `--layers` alone (`{LAST_LAYER}`; of a ViT the last block's tokens). The authors "
        "take one class of each image, the last of its label map.",
        f"{COMMAND} ce-fam-imagenet-s --root ImageNetS919 --train IMAGENET/train --model vit_base_patch16_224 "
        "--layers net.blocks.2 net.blocks.5 net.blocks.8 net.blocks.11",
    ),
    "salf-accuracy": (
        "SALF-CBM, accuracy",
        "Class folders `ROOT/train` and `ROOT/val` of CUB-200, Places365 or ImageNet: SALF-CBM, LF-CBM, heads on the "
        "backbone's features; CLIP ViT-B/16, red circles of radius 32 on 7 x 7 positions; concept list, lam and "
        "presence cutoff of LF-CBM's public training commands (`--name`).",
        f"{COMMAND} salf-accuracy --root CUB --name CUB-200 --model resnet18 --model-weights resnet18_cub.safetensors "
        "--concepts cub_filtered.txt --cache regions/",
    ),
    "salf-segmentation": (
        "SALF-CBM, zero-shot segmentation on ImageNet-segmentation",
        "Pixel accuracy, mean IoU (both from sums over all images) and mAP; pictures squashed to 224 px, maps of the "
        "predicted class binarised at their mean. `--salf` is a SALF-CBM that `salf-accuracy --save` left, its "
        'concepts "An image of a {class}", a class a line, fitted with both cutoffs `none`.',
        f"{COMMAND} salf-segmentation --root gtsegs_ijcv.mat --salf FOLDER",
    ),
}
