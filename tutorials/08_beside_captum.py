# %% [markdown]
# # Alongside Captum: one-line replacements
#
# You have a Captum pipeline. The methods here are Captum attributions with `attribute(inputs, target=...)`, a layer,
# and the same targets. Each replacement below is therefore one line, and `NoiseTunnel`, `LayerAttribution.interpolate`,
# `TCAV` and `captum.metrics` work on them.

# %%
# %matplotlib inline
import warnings

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from captum.attr import LayerAttribution, LayerGradCam, LayerGradientXActivation, NoiseTunnel
from captum.concept import TCAV, Concept
from captum.metrics import sensitivity_max
from torch.utils.data import DataLoader

from captum_concepts import FeatureActivationMap, SpatialACV, demo
from captum_concepts.datasets import CaptionedScenes
from captum_concepts.metrics import nra
from captum_concepts.visualization import overlay

torch.manual_seed(0)
model = demo.load("classifier")  # yours: torchvision.models.resnet50(weights="DEFAULT").eval(), layers named likewise
data = CaptionedScenes(200, seed=81, size=64)
scenes = data.stack()
images, target, masks = scenes.image[:16], scenes.label[:16], scenes.object_masks[:16, 0]

# %% [markdown]
# ## The pipeline
#
# The pipeline computes an attribution, resizes it to the image, and evaluates it with the mask. It works with any
# attribution method.


# %%
def pipeline(attribution, **options) -> torch.Tensor:
    """Maps (N, H, W) at the size of the images."""
    maps = attribution.attribute(images, target=target, **options)
    return LayerAttribution.interpolate(maps, (64, 64), "bilinear")[:, 0]


def report(name: str, maps: torch.Tensor) -> None:
    print(f"{name:32s} NRA {nra(maps, masks).mean():.3f}")


# %% [markdown]
# ## LayerGradCam → FeatureActivationMap

# %%
gradcam = LayerGradCam(model, model.layer4)
fam = FeatureActivationMap(model, model.layer4, torch.eye(6), similarity="dot", weights="gradient")  # <- the one line
first, second = pipeline(gradcam), pipeline(fam)
report("captum LayerGradCam", first)
report("FAM, gradient weights", second)

# %% [markdown]
# With unit vectors as references and gradient weights, the two are the same map up to a factor (Grad-CAM takes the mean
# gradient, and FAM the sum; Captum adds a ReLU only on request).

# %%
ratio = second.flatten(1).norm(dim=1) / first.flatten(1).norm(dim=1)
cosine = F.cosine_similarity(first.flatten(1), second.flatten(1))
print(f"ratio {ratio.min():.1f} to {ratio.max():.1f} (positions: {8 * 8}), cosine {cosine.min():.6f}")

# %% [markdown]
# FAM adds references other than classes, for instance the prototypes of five images per class.

# %%
encoder = demo.load("classifier")
encoder.fc = torch.nn.Identity()
support = torch.cat([torch.nonzero(scenes.label[16:] == c).flatten()[:5] + 16 for c in range(6)])
few_shot = FeatureActivationMap(encoder, "layer4", normalize="l1").fit(scenes.image[support], scenes.label[support])
report("FAM to class prototypes", pipeline(few_shot))

# %% [markdown]
# ## NoiseTunnel
#
# Captum's wrapper works with these methods as it does with Captum's own.

# %%
noise = {"nt_type": "smoothgrad", "nt_samples": 8, "stdevs": 0.05}
torch.manual_seed(0)
report("NoiseTunnel(LayerGradCam)", pipeline(NoiseTunnel(gradcam), **noise))
torch.manual_seed(0)
report("NoiseTunnel(FAM)", pipeline(NoiseTunnel(few_shot), **noise))

# %%
shown = [0, 1, 2]
rows = {"LayerGradCam": first, "FAM to class prototypes": pipeline(few_shot)}
figure, axes = plt.subplots(3, 3, figsize=(6.6, 6.2), layout="constrained")
for column, i in enumerate(shown):
    axes[0, column].imshow(images[i].permute(1, 2, 0))
    axes[0, column].set_title(data.classes[target[i]], fontsize=10)
    for row, maps in enumerate(rows.values(), 1):
        axes[row, column].imshow(overlay(images[i], maps[i], signed=True).permute(1, 2, 0))
for each in axes.flat:
    each.set(xticks=[], yticks=[])
for row, name in enumerate(("image", *rows)):
    axes[row, 0].set_ylabel(name, fontsize=9)
scale = plt.cm.ScalarMappable(plt.Normalize(-1, 1), "RdBu_r")
_ = figure.colorbar(scale, ax=axes[1:], shrink=0.8, label="contribution, each map by its own maximum")

# %% [markdown]
# ## TCAV
#
# Captum's `TCAV` learns a vector per concept from whole activations and takes its dot product with the gradient. The
# method that computes the gradient is exchangeable: `layer_attr_method`. Here it is `SpatialACV`. The second `TCAV`
# reads the vectors that the first one saved, and the scores are the same.


# %%
def patches(word: str, most: int = 24) -> torch.Tensor:
    """Pictures of nothing but this texture: inner squares of objects, mirrored until they fill 64 pixels."""
    found = []
    parts = scenes.image, scenes.objects, scenes.boxes, scenes.object_masks
    for image, things, boxes, masks in zip(*parts, strict=True):
        for words, (x0, y0, x1, y1), mask in zip(things.tolist(), boxes.tolist(), masks, strict=True):
            dx, dy = (x1 - x0) / 4, (y1 - y0) / 4
            inner = slice(round(y0 + dy), round(y1 - dy) + 1), slice(round(x0 + dx), round(x1 - dx) + 1)
            if data.concepts.index(word) in words and mask[inner].all():
                patch = image[(slice(None), *inner)]
                while min(patch.shape[1:]) < 64:
                    patch = torch.cat([patch, patch.flip(1)], 1)
                    patch = torch.cat([patch, patch.flip(2)], 2)
                found.append(patch[:, :64, :64])
    return torch.stack(found[:most])


guidance = {word: patches(word) for word in ("striped", "dotted")}
concepts = [Concept(k, word, DataLoader(x, batch_size=8)) for k, (word, x) in enumerate(guidance.items())]
striped_square = data.classes.index("striped square")
queries = scenes.image

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # captum's default classifier says at length that it keeps its data in memory
    for name, method in (
        ("captum's own", LayerGradientXActivation(model, None, multiply_by_inputs=False)),
        ("SpatialACV", SpatialACV(model, "layer3")),  # <- the one line
    ):
        torch.manual_seed(0)
        tcav = TCAV(model, ["layer3"], layer_attr_method=method, save_path="cav")
        scores = tcav.interpret(queries, [concepts], target=striped_square)["0-1"]["layer3"]
        print(f"{name:14s} sign {[round(float(s), 2) for s in scores['sign_count']]}")

# %% [markdown]
# ## TCAV with positions
#
# Here the same concept examples are passed to `SpatialACV` itself. The score then comes with maps, an accuracy on
# held-out images and a p-value. `SpatialACV` accepts `captum.concept.Concept` objects unchanged.

# %%
acv = SpatialACV(model, "layer3").fit([concepts[0]], [concepts[1]], n_random=20)
print(acv.summary())
scores = acv.tcav(queries, target=striped_square)
print({word: round(float(sign), 2) for word, sign in zip(acv.concepts, scores["sign_count"], strict=True)})
print("maps:", tuple(acv.attribute(queries, target=striped_square).shape))

# %% [markdown]
# Like every fitted method here, it can be saved and used on a new image.

# %%
acv.save("striped.safetensors")
again = SpatialACV.load("striped.safetensors", model)
new = CaptionedScenes(1, seed=2026, size=64).stack()
print("caption:", new.caption[0])
print(again.explain(new.image))

# %% [markdown]
# ## captum.metrics

# %%
for name, attribution in (("LayerGradCam", gradcam), ("FAM", fam)):
    torch.manual_seed(0)
    value = sensitivity_max(
        attribution.attribute, images[:1], target=int(target[0]), perturb_radius=0.01, n_perturb_samples=4
    )
    print(f"{name:14s} sensitivity_max {float(value[0]):.3f}")

# %% [markdown]
# ## What is different
#
# - `layer` may be a name. The layout of transformers is inferred, and a layer whose positions do not reach the output
#   raises an error instead of returning zeros.
# - The model is unchanged afterwards, also after an error.
# - `explain` returns what, where and how much as one value that you can save, load and print.
