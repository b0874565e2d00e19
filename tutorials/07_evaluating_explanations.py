# %% [markdown]
# # Is this map any good?
#
# A heat map nearly always looks plausible: photographs have their object in the middle, and most maps are brightest
# there. This tutorial measures maps against exact masks, against maps that know nothing, against the model itself, and
# against a model with its knowledge taken away.

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
# **Your own:** any data with masks: `MaskFolder`, `PascalVOC`, `COCOPanoptic`, `ImageNetS`, `Broden` of
# `captum_concepts.datasets`, or a `DataLoader` of `(images, masks, target)`.
#
# ## Does it find the region?
#
# `evaluate` takes anything that makes maps: Captum's attributions, this package's methods, plain functions. The three last
# rows know nothing about the class. They belong into every table.


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
# - **NRA** looks at the order of the pixels at all thresholds at once: 1 is the ideal order. With the published baseline a
#   random map still gets more than 0; with the exact one (`nra_exact`) a constant map gets 0
#   and a random one about 0.05, because values below 0 are cut off.
# - **EPG** is the share of the map's energy inside the mask. It rewards concentrated maps.
# - **Pointing game**: is the highest value inside?
#
# Look at the third row. Where the layer is active at all, without any class, is a good map here: one object stands out in
# these scenes. A table without that row would have sold the others as better than they are.
#
# Intervals overlap, but the examples are the same: compare pairs. If the interval of the difference excludes 0, the
# difference is more than chance.

# %%
for other in ("LayerGradCam", "activation energy", "centre Gaussian"):
    pair = regions.compare("nra", "FAM", other)
    print(f"NRA of FAM minus {other}: {pair['difference']:+.3f} [{pair['ci_low']:+.3f}, {pair['ci_high']:+.3f}]")

# %% [markdown]
# The maps of one scene, the one in the middle of FAM's ranking, each on its own colour scale:

# %% alt="One scene and its maps by LayerGradCam, FAM, activation energy, a centre Gaussian and random"
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
# With several words an image, a map may score well for each of them without knowing any. Activation energy does: it is
# one and the same map for all words. *Specificity* takes away what the other words' maps would have found.

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
# ## Does it move the model?
#
# Masks say what *we* take for the object. Insertion and deletion ask the model: how fast does the probability rise when
# the pixels appear in the map's order (higher is better), how fast does it fall when they go (lower is better)?


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
# The numbers depend on what takes a pixel's place (`baseline=`), so compare only tables with the same one.
#
# ## Does it depend on what the model has learnt?
#
# Randomise the weights, from the last layer to the first. A map that stays the same explains edges, not the model. The
# model is restored afterwards.


# %%
def edges(images: torch.Tensor) -> torch.Tensor:
    grey = images.mean(1)
    return (grey[:, 1:, 1:] - grey[:, :-1, :-1]).abs()


stages = ["fc", "layer4", "layer3", "layer2", "layer1", "conv1"]
for name, explain in (("LayerGradCam", explainers["LayerGradCam"]), ("FAM", explainers["FAM"]), ("edges", edges)):
    target = None if name == "edges" else scenes.label[:16]
    print(f"{name}: {parameter_randomization(explain, model, scenes.image[:16], target=target, layers=stages)}\n")

# %% [markdown]
# ## Keep the table
#
# Tables write themselves as Markdown, CSV and JSON, whole or not at all; so a report can be made later without running
# anything again.

# %%
regions.to_json("regions.json")
same = EvaluationTable.from_json(Path("regions.json").read_text(encoding="utf-8"))
print(same.row("FAM", "nra"))

# %% [markdown]
# And the explainer that did best, on a new image:

# %%
new = CaptionedScenes(1, seed=2026, size=64).stack()
heat = explainers["FAM"].attribute(new.image, target=new.label)
print(tuple(LayerAttribution.interpolate(heat, (64, 64)).shape), "caption:", new.caption[0])

# %% [markdown]
# ## Which method, and which number?
#
# | You ask | method | look at | against |
# | --- | --- | --- | --- |
# | where does a similarity come from? | FAM | NRA, EPG on the object | centre Gaussian, activation energy |
# | does this layer know my concept, where? | SACV | held-out accuracy and p-value first, then NRA | random directions, other concepts |
# | which of my words, where, how much? | CE-FAM | specificity beside NRA; contributions on images you changed | activation energy |
# | a model that explains itself | SALF-CBM | its accuracy beside the black box; intervention | the backbone with a dense head |
#
# One number is none: a table needs its blind rows, an interval, and a second kind of number.
