# %% [markdown]
# # Is it the stripes?
#
# "Is it a zebra because of the stripes?" TCAV answers with one number per class. `SpatialACV` (SACV) answers for every
# position of an image. Its *concept map* (labeled "relevance" in the figures) shows whether the layer sees stripes
# *here*, and its *conceptual sensitivity* shows whether more stripes here would raise the output. It also reports when
# a layer does not encode the concept at all, so that you do not interpret a map of nothing.
#
# It needs only concept examples (called "guidance images" in the code): some images that show the concept and nothing
# else, and negative examples that do not show it.

# %%
# %matplotlib inline
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

from captum_concepts import SpatialACV, demo
from captum_concepts.activations.receptive_field import strongest_crops
from captum_concepts.attr.layer_sweep import layer_sweep
from captum_concepts.datasets import CaptionedScenes
from captum_concepts.visualization import panel

torch.manual_seed(0)
model = demo.load("classifier")
data = CaptionedScenes(300, seed=31, size=64)
scenes = data.stack()

# %% [markdown]
# **Your own model** is `model = torchvision.models.vgg19(weights="DEFAULT").eval()`. **Your own images** are one folder
# for the concept and one for the negative examples:
# `acv.fit({"striped": "guidance/striped"}, "guidance/other", transform=weights.transforms())`.
#
# ## Concept examples
#
# The examples are patches from the inside of objects, mirrored until they fill an image. They contain no outlines and
# no background, so neither can be learned by mistake. The patches are mirrored instead of enlarged, because a network
# treats a texture at another scale as another texture.


# %%
def filled(patch: torch.Tensor, size: int) -> torch.Tensor:
    """An image of ``size`` pixels, filled with a patch and its mirror images."""
    while min(patch.shape[1:]) < size:
        patch = torch.cat([patch, patch.flip(1)], 1)
        patch = torch.cat([patch, patch.flip(2)], 2)
    return patch[:, :size, :size]


def patches(texture: str, scenes, most: int = 30) -> torch.Tensor:
    """Inner squares of objects with this texture, as images."""
    wanted, found = data.concepts.index(texture), []
    parts = scenes.image, scenes.objects, scenes.boxes, scenes.object_masks
    for image, objects, boxes, masks in zip(*parts, strict=True):
        for words, (x0, y0, x1, y1), mask in zip(objects.tolist(), boxes.tolist(), masks, strict=True):
            dx, dy = (x1 - x0) / 4, (y1 - y0) / 4
            inner = slice(round(y0 + dy), round(y1 - dy) + 1), slice(round(x0 + dx), round(x1 - dx) + 1)
            if wanted in words and mask[inner].all():
                found.append(filled(image[(slice(None), *inner)], 64))
    return torch.stack(found[:most])


textures = data.concept_groups["texture"]
guidance = {texture: patches(texture, scenes) for texture in textures}

# %%
figure, axes = plt.subplots(4, 8, figsize=(6.4, 3.4), layout="constrained")
for row, texture in zip(axes, textures, strict=True):
    for each, image in zip(row, guidance[texture], strict=False):
        each.imshow(image.permute(1, 2, 0))
        each.set(xticks=[], yticks=[])
    row[0].set_ylabel(texture, rotation=0, ha="right", va="center")
_ = figure.suptitle("Guidance images", fontsize=11)

# %% [markdown]
# Look at the examples before you fit anything. The plain patches are nearly all red, because in these scenes most plain
# circles and squares are red. A vector learned from them represents *red* as much as *plain*, so we do not rely on it.
# Stripes and dots come in many colors.
#
# ## Which layer encodes stripes?
#
# One call fits every layer and compares accuracy on held-out *images* (positions of one image are not independent
# examples). `n_random` permutes the labels among whole images, which gives each concept a p-value. As a control, we
# also ask for a concept that does not exist: 30 images drawn at random from all textures. The negative examples are the
# same for both, namely all images of the other textures and 30 more random draws. Many images of the control are
# therefore negative examples as well, so its accuracy may fall below 0.5.

# %%
everything = torch.cat(list(guidance.values()))
shuffled = everything[torch.randperm(len(everything), generator=torch.Generator().manual_seed(1))]
concepts = {"striped": guidance["striped"], "nothing": shuffled[:30]}
others = torch.cat([guidance[t] for t in textures if t != "striped"])
layers = ["act1", "layer1", "layer2", "layer3", "layer4"]
sweep = layer_sweep(model, layers, concepts, torch.cat([others, shuffled[30:60]]), n_random=20)
print(sweep.best())

# %% picture="sacv_layers" alt="Held-out accuracy and map contrast of stripes and of a concept that does not exist, over five layers"
sweep.plot()

# %% [markdown]
# Hollow points are *not encoded here*. Stripes are encoded from the first of these layers on. The control is hollow and
# no better than chance at every layer.
#
# ## Where are the stripes, and do they matter?

# %%
acv = SpatialACV(model, "layer3").fit(guidance, n_random=20)  # each texture against the other three
print(acv.summary())

# %% picture="sacv" alt="Three scenes with the concept maps of three textures and bars of their contributions to the class"
shown = [i for i in range(len(data)) if data.classes[scenes.label[i]] == "striped square"][:3]
explanation = acv.explain(scenes.image[shown], target=scenes.label[shown])
panel(
    explanation,
    scenes.image[shown],
    top_k=3,
    class_names=data.classes,
    significant=acv,
    title="Where layer3 sees each texture, and what more of it would do to “striped square”",
    map_label="relevance",
)

# %% [markdown]
# The map is *where the layer sees it*. The bar is the contribution: the derivative of the class score along the
# concept, summed over all positions. Is it the stripes? The next table covers all scenes. It lists the fraction of
# scenes in which more of a texture raises the class score (TCAV's sign count), and the mean effect.

# %%
print(f"{'class':16s} {'texture':10s} sign  magnitude")
for name in ("striped square", "dotted star", "red circle"):
    scores = acv.tcav(scenes.image, target=data.classes.index(name))
    for texture, sign, size in zip(acv.concepts, scores["sign_count"], scores["magnitude"], strict=True):
        print(f"{name:16s} {texture:10s} {sign:.2f}  {size:+9.1f}")

# %% [markdown]
# Stripes support the striped square, and dots oppose it. Dots support the dotted star, and stripes oppose it. For the
# red circle, which may have any texture, the effects are smaller. Note that this is a derivative: it describes a small
# change of the activations, and it can be small for a concept that already determines the class.
#
# ## Compared with the ground truth
#
# The scenes have exact masks, so "where" can be checked. The next numbers are the mean of the concept map of stripes on
# striped objects, on other objects, and on the background.

# %%
relevance = F.interpolate(acv.concept_maps(scenes.image, "striped"), (64, 64))[:, 0]
striped = scenes.masks[:, data.concepts.index("striped")]
objects = scenes.object_masks.any(1)
for name, mask in (("striped objects", striped), ("other objects", objects & ~striped), ("background", ~objects)):
    print(f"{name}: {relevance[mask].mean():+.2f}")

# %% [markdown]
# ## What exactly did it see? The strongest patches
#
# The receptive field shows which pixels a position depends on, and `share=0.9` keeps the box that carries most of the
# influence. The crops around the strongest positions show what the vector responds to (Fig. 2D of the paper).

# %%
maps = acv.concept_maps(scenes.image, "striped")[:, 0]
crops = strongest_crops(model, "layer3", scenes.image, maps, k=6, share=0.9)
figure, axes = plt.subplots(1, len(crops), figsize=(8, 1.8), layout="constrained")
for each, crop in zip(axes, crops, strict=True):
    each.imshow(crop.image.permute(1, 2, 0))
    each.set_title(f"{crop.value:.1f}", fontsize=9)
    each.set_axis_off()
_ = figure.suptitle("Crops around the six positions with the highest relevance for “striped”", fontsize=10)

# %% [markdown]
# All six objects are striped, and all are yellow, the color with the strongest contrast to its dark stripes. The
# concept map is therefore not about the pattern alone.
#
# ## Save it, and explain a new image

# %%
acv.save("textures.safetensors")
again = SpatialACV.load("textures.safetensors", model)
new = CaptionedScenes(1, seed=2026, size=64).stack()
print("caption:", new.caption[0])
print(again.explain(new.image, target=new.label))

# %% [markdown]
# ## Remember
#
# - Concept examples should show the concept everywhere, because every position becomes an example of it.
# - The negative examples are half of the question. Without any, the question is *which* of the concepts a position
#   shows. With images like those to be explained, it is whether the concept *is* there.
# - Look at `significant_` before you look at a map.
# - `SpatialACV` also serves as `layer_attr_method` inside Captum's own `TCAV`: see
#   [SACV in Captum's TCAV](08_beside_captum.ipynb).
