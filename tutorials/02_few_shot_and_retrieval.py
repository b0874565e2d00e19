# %% [markdown]
# # Few-shot classes and retrieval: where does a similarity come from?
#
# Grad-CAM needs a class score. Few-shot classifiers, face verification, image search and CLIP have none: they compare
# embeddings. `FeatureActivationMap` (FAM) is the class activation map of a *similarity*. It splits $s(f, r)$ into the
# contribution of each channel, and adds up the channels' maps with these weights.
#
# We ask three questions about bundled models. Why was this class predicted from five examples? Why does this image
# match this text? Why did the search return that image?

# %%
# %matplotlib inline
import matplotlib.pyplot as plt
import torch
from safetensors.torch import save_file
from torch import nn

from captum_concepts import FeatureActivationMap, demo
from captum_concepts.datasets import CaptionedScenes
from captum_concepts.metrics import CenterGaussian, RandomMaps, evaluate
from captum_concepts.visualization import overlay, panel

torch.manual_seed(0)
data = CaptionedScenes(48, seed=11, size=64)
queries = data.stack()

# %% [markdown]
# ## Five images per class
#
# The model is an encoder, that is, a network without its head. **Your own** is
# `encoder = torchvision.models.resnet50(weights="DEFAULT")` with `encoder.fc = nn.Identity()`, or any callable that
# returns one embedding per image.

# %%
encoder = demo.load("classifier")
encoder.fc = nn.Identity()  # (N, 3, 64, 64) -> (N, 128)

pool = CaptionedScenes(120, seed=12, size=64).stack()
support = torch.cat([torch.nonzero(pool.label == c).flatten()[:5] for c in range(len(data.classes))])
fam = FeatureActivationMap(encoder, "layer4", normalize="l1")
fam.fit(pool.image[support], [data.classes[k] for k in pool.label[support]])
print(fam, tuple(fam.references.shape))

# %% [markdown]
# A prototype is the mean embedding of its class, and each query is assigned the class of the most similar prototype.
# This classifier has no other parts, and it works. The second row of the figure shows its only error. The map shows
# which object it mistook for the predicted class.

# %%
order = [data.classes.index(name) for name in fam.concepts]  # sorted by name
truth = torch.tensor([order.index(k) for k in queries.label])
similarity = fam.scores(queries.image)  # (48, 6) cosines
print(f"{(similarity.argmax(1) == truth).float().mean():.0%} of {len(data)} queries correct (chance 17%)")

# %% picture="fam" alt="Three scenes, each with the maps of its similarity to three class prototypes"
missed = int(torch.nonzero(similarity.argmax(1) != truth)[0])
shown = [0, missed, 5]
panel(
    fam.explain(queries.image[shown]),
    queries.image[shown],
    top_k=3,
    class_names=fam.concepts,
    image_names=[f"truth: {data.classes[queries.label[i]]}" for i in shown],
    title="Where the similarity to each class prototype comes from",
    map_label="weighted activation",
)

# %% [markdown]
# Is that better than pointing at the center of the image? The scenes come with exact masks of the object that defines
# the class, so we can measure it. `nra` is 0 for a map that orders the pixels no better than chance and 1 for the ideal
# order. `epg` is the fraction of the map's energy inside the mask. Every table of maps needs a concept-agnostic
# baseline.

# %%
table = evaluate(
    {"FAM": fam, "centre Gaussian": CenterGaussian(), "random": RandomMaps()},
    [(queries.image, queries.object_masks[:, 0], truth)],
    metrics=["nra", "epg", "pointing_game"],
    n_bootstrap=300,
)
table

# %% [markdown]
# ## Save it, and explain a new image
#
# Nothing was trained, so the file contains only the prototypes, their names and the options.

# %%
fam.save("prototypes.safetensors")
again = FeatureActivationMap.load("prototypes.safetensors", encoder)
new = CaptionedScenes(1, seed=2026, size=64).stack()
print(again.explain(new.image, top_k=3))
print("true label:", data.classes[new.label[0]])

# %% [markdown]
# ## Text: a vision-language model
#
# For CLIP, the references are text embeddings. **Your own** is
# `clip = OpenCLIPEncoder.from_pretrained("ViT-B-32", "openai")`. The image tower of the bundled VLM ends in attention
# pooling, which Grad-CAM recipes do not cover. FAM differentiates through whatever lies between the layer and the
# embedding, and never below the layer.

# %%
clip = demo.load("clip")
words = ["circle", "star", "red", "striped", "grass", "brick"]
layer = "model.visual.trunk.layer4"
to_words = FeatureActivationMap(clip, layer, clip.encode_text(words), reference_names=words, normalize="l1")
panel(
    to_words.explain(queries.image[[1, 6]]),
    queries.image[[1, 6]],
    top_k=4,
    class_names=words,
    title="Where the similarity of image and word comes from",
    map_label="weighted activation",
)

# %% [markdown]
# Read such maps with care. FAM shows which positions carry the channels that produce the similarity. In a network in
# which every position has already mixed with its neighbors, these are not always the positions of the object. The next
# table measures how much FAM finds here, with the exact masks of all concepts in all queries.

# %%
every = FeatureActivationMap(clip, layer, clip.encode_text(data.concepts), normalize="l1")
table = evaluate(
    {
        "FAM": lambda images: every.explain(images).maps,
        "centre Gaussian": CenterGaussian(n_maps=len(data.concepts)),
    },
    [(queries.image, queries.masks)],
    metrics=["nra", "concept_specificity"],
    n_bootstrap=300,
)
table

# %% [markdown]
# `concept_specificity` subtracts what the maps of the other concepts would have found as well. It is 0 for any map that
# ignores its concept.
#
# ## Retrieval: why did I get this image?
#
# A gallery is a bank of image embeddings. Search it with a text, then ask the reverse question: *where in each result*
# does the similarity to the query come from?

# %%
gallery = CaptionedScenes(200, seed=13, size=64).stack()
with torch.no_grad():
    stored = torch.cat([clip.encode_image(part) for part in gallery.image.split(50)])
save_file({"gallery": stored}, "gallery.safetensors")

query = "a photo of a blue triangle on snow"
text = clip.encode_text([query])
cosines = nn.functional.cosine_similarity(stored, text)
found = cosines.topk(4).indices
for i in found:
    print(f"{cosines[i]:.3f}  {gallery.caption[i]}")

# %% picture="fam_retrieval" alt="Four images retrieved for a text, each with the map of its similarity to the text"
maps = FeatureActivationMap(clip, layer, text, normalize="l1").attribute(gallery.image[found], target=0)[:, 0]
high = float(maps.max())
figure, axes = plt.subplots(1, 5, figsize=(10, 2.7), layout="constrained", width_ratios=[1, 1, 1, 1, 0.06])
for i, one, each in zip(found, maps, axes, strict=False):
    each.imshow(overlay(gallery.image[i], one, vmin=0, vmax=high).permute(1, 2, 0))
    each.set_title(f"cosine {cosines[i]:.3f}", fontsize=9)
    each.set_axis_off()
scale = plt.cm.ScalarMappable(plt.Normalize(0, high), "inferno")
figure.colorbar(scale, cax=axes[-1], label="weighted activation")
_ = figure.suptitle(f"found for “{query}”", fontsize=11)

# %% [markdown]
# Pairs of images work in the same way. `references` are the embeddings of the second images, and
# `target=torch.arange(N)` pairs example *i* with reference *i*. A second call with the roles exchanged shows the other
# side of the match.

# %%
left, right = queries.image[[0, 4]], queries.image[[2, 9]]
with torch.no_grad():
    a, b = clip.encode_image(left), clip.encode_image(right)
pairs = torch.arange(2)
in_left = FeatureActivationMap(clip, layer, b, normalize="l1").attribute(left, target=pairs)
in_right = FeatureActivationMap(clip, layer, a, normalize="l1").attribute(right, target=pairs)
print(in_left.shape, in_right.shape)

# %% [markdown]
# ## Remember
#
# - References may be prototypes, texts or gallery items, and `similarity` may be `"cosine"`, `"dot"`, `"euclidean"` or
#   your own.
# - `weights="gradient"` returns maps whose mean is the similarity itself (for mean pooling and a linear head).
# - In the last blocks of vision transformers, channel weights carry little information: see
#   [your own model](06_your_own_model.ipynb).
