# %% [markdown]
# # Is this map any good?
#
# A heat map nearly always looks plausible, because photographs have their object in the center, and most maps are
# brightest there. This tutorial compares maps with exact masks, with concept-agnostic baselines, with the model itself,
# and with a model whose weights are randomized.

# %%
# %matplotlib inline
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from captum.attr import LayerAttribution, LayerGradCam

from captum_concepts import FeatureActivationMap, demo
from captum_concepts.activations import spatial_activations
from captum_concepts.datasets import CaptionedScenes
from captum_concepts.metrics import (
    CenterGaussian,
    Deletion,
    EvaluationTable,
    Insertion,
    RandomMaps,
    activation_energy,
    evaluate,
    nra,
    parameter_randomization,
)
from captum_concepts.visualization import overlay

torch.manual_seed(0)
model = demo.load("classifier")
data = CaptionedScenes(48, seed=71, size=64)
scenes = data.stack()

# %% [markdown]
# **Your own** data can be anything with masks: `MaskFolder`, `PascalVOC`, `COCOPanoptic`, `ImageNetS` or `Broden` from
# `captum_concepts.datasets`, or a `DataLoader` of `(images, masks, target)`.
#
# ## Does it find the region?
#
# `evaluate` accepts anything that computes maps: Captum's attributions, this package's methods, plain functions. The
# last three rows are baselines that do not depend on the class. They belong in every table.


# %%
def energy(images: torch.Tensor) -> torch.Tensor:
    """Where the layer is active at all."""
    return activation_energy(spatial_activations(model, images, ["layer4"]).maps[0])


outputs = torch.eye(len(data.classes))
explainers = {
    "LayerGradCam": LayerGradCam(model, model.layer4),
    "FAM": FeatureActivationMap(model, "layer4", outputs, similarity="dot", normalize="none"),
    "activation energy": energy,
    "centre Gaussian": CenterGaussian(),
    "random": RandomMaps((8, 8)),
}
regions = evaluate(
    explainers,
    [(scenes.image, scenes.object_masks[:, 0], scenes.label)],
    metrics=["nra", "nra_exact", "epg", "pointing_game"],
    n_bootstrap=500,
)
regions

# %% [markdown]
# - **NRA** uses the order of the pixels at all thresholds at once, and 1 is the ideal order. With the published
#   baseline, a random map still scores above 0. With the exact one (`nra_exact`), a constant map scores 0 and a random
#   one about 0.05, because values below 0 are clipped.
# - **EPG** is the fraction of the map's energy inside the mask. It rewards concentrated maps.
# - The **pointing game** checks whether the highest value is inside the mask.
#
# Look at the third row. Activation energy, which shows where the layer is active for any class, is a good map here,
# because one object stands out in these scenes. Without that row, the table would have made the other maps look better
# than they are.
#
# The intervals overlap, but the examples are the same, so compare pairs. If the interval of the difference excludes 0,
# the difference is more than chance.

# %%
for other in ("LayerGradCam", "activation energy", "centre Gaussian"):
    pair = regions.compare("nra", "FAM", other)
    print(f"NRA of FAM minus {other}: {pair['difference']:+.3f} [{pair['ci_low']:+.3f}, {pair['ci_high']:+.3f}]")

# %% [markdown]
# The next figure shows the maps of one scene, the median of FAM's NRA, each on its own color scale.

# %% alt="One scene and its maps by LayerGradCam, FAM, activation energy, a center Gaussian and random"
quality = nra(explainers["FAM"].attribute(scenes.image, target=scenes.label)[:, 0], scenes.object_masks[:, 0])
i = int(quality.argsort()[len(quality) // 2])
figure, axes = plt.subplots(1, 6, figsize=(10, 2.1), layout="constrained")
axes[0].imshow(scenes.image[i].permute(1, 2, 0))
axes[0].set_title(f"“{data.classes[scenes.label[i]]}”", fontsize=9)
for each, (name, explainer) in zip(axes[1:], explainers.items(), strict=True):
    if hasattr(explainer, "attribute"):
        heat = explainer.attribute(scenes.image[i : i + 1], target=scenes.label[i : i + 1])[0, 0]
    else:
        heat = explainer(scenes.image[i : i + 1])[0]
    each.imshow(overlay(scenes.image[i], heat).permute(1, 2, 0))
    each.set_title(name, fontsize=9)
for each in axes:
    each.set_axis_off()

# %% [markdown]
# ## Does it find *this* concept, or just objects?
#
# With several concepts per image, a map may score well for each of them without separating any. Activation energy does,
# although it is the same map for all concepts. *Specificity* subtracts what the maps of the other concepts would have
# found.

# %%
clip = demo.load("clip")
fam = FeatureActivationMap(clip, "model.visual.trunk.layer4", clip.encode_text(data.concepts), normalize="l1")


def same_for_all(images: torch.Tensor) -> torch.Tensor:
    maps = spatial_activations(clip, images, ["model.visual.trunk.layer4"]).maps[0]
    return activation_energy(maps)[:, None].expand(-1, len(data.concepts), -1, -1)


evaluate(
    {"FAM": lambda images: fam.explain(images).maps, "activation energy": same_for_all},
    [(scenes.image, scenes.masks)],
    metrics=["nra", "concept_specificity"],
    n_bootstrap=500,
)

# %% [markdown]
# ## Does it change the model's output?
#
# Masks show what *we* consider the object. Insertion and deletion test the model. Insertion measures how fast the
# probability rises when pixels appear in the map's order (higher is better), and deletion measures how fast it falls
# when they are removed (lower is better).


# %%
def probability(images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(images).softmax(1)


few = scenes.image[:24], scenes.object_masks[:24, 0], scenes.label[:24]
moves = evaluate(
    {name: explainers[name] for name in ("LayerGradCam", "FAM", "centre Gaussian", "random")},
    [few],
    metrics={"insertion": Insertion(probability, n_steps=16), "deletion": Deletion(probability, n_steps=16)},
    n_bootstrap=500,
)
moves

# %% [markdown]
# The numbers depend on what replaces a pixel (`baseline=`), so compare only tables with the same baseline.
#
# ## Does it depend on what the model has learned?
#
# This test randomizes the weights, from the last layer to the first. A map that stays the same explains edges, not the
# model. The model is restored afterwards.


# %%
def edges(images: torch.Tensor) -> torch.Tensor:
    grey = images.mean(1)
    return (grey[:, 1:, 1:] - grey[:, :-1, :-1]).abs()


stages = ["fc", "layer4", "layer3", "layer2", "layer1", "conv1"]
for name, explain in (("LayerGradCam", explainers["LayerGradCam"]), ("FAM", explainers["FAM"]), ("edges", edges)):
    target = None if name == "edges" else scenes.label[:16]
    print(f"{name}: {parameter_randomization(explain, model, scenes.image[:16], target=target, layers=stages)}\n")

# %% [markdown]
# ## Save the table
#
# Tables are written atomically as Markdown, CSV and JSON, so you can produce a report later without running anything
# again.

# %%
regions.to_json("regions.json")
same = EvaluationTable.from_json(Path("regions.json").read_text(encoding="utf-8"))
print(same.row("FAM", "nra"))

# %% [markdown]
# Finally, apply the better of the two methods that depend on the class, FAM, to a new image.

# %%
new = CaptionedScenes(1, seed=2026, size=64).stack()
heat = explainers["FAM"].attribute(new.image, target=new.label)
print(tuple(LayerAttribution.interpolate(heat, (64, 64)).shape), "caption:", new.caption[0])

# %% [markdown]
# ## Which method, and which number?
#
# | your question | method | look at | compare with |
# | --- | --- | --- | --- |
# | where does a similarity come from? | FAM | NRA, EPG on the object | center Gaussian, activation energy |
# | does this layer encode my concept, and where? | SACV | held-out accuracy and p-value first, then NRA | random directions, other concepts |
# | which of my concepts, where, how much? | CE-FAM | specificity next to NRA; contributions on images you changed | activation energy |
# | a model that explains itself | SALF-CBM | its accuracy compared with the black box; intervention | the backbone with a dense head |
#
# One number is not enough: a table needs concept-agnostic baselines, an interval, and a second kind of metric.
