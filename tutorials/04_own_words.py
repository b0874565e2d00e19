# %% [markdown]
# # Your classifier, your words
#
# Which of *your* words did *your* classifier see, where, and how much did each move its prediction? `ConceptFusionMap`
# (CE-FAM) keeps the three in one-to-one correspondence: one word, one score, one region, one contribution.
#
# It trains a small translator from the classifier's layers to the embedding of an image-text model. The translator
# needs images of your kind, no labels, no masks, and not even the words: those may come later, and change.

# %%
# %matplotlib inline
import matplotlib.pyplot as plt
import torch

from captum_concepts import ConceptFusionMap, demo
from captum_concepts.concepts import Vocabulary
from captum_concepts.datasets import CaptionedScenes
from captum_concepts.errors import InputError
from captum_concepts.metrics import CenterGaussian, evaluate
from captum_concepts.visualization import panel

torch.manual_seed(0)
classifier = demo.load("classifier")
clip = demo.load("clip")
data = CaptionedScenes(32, seed=41, size=64)
scenes = data.stack()

# %% [markdown]
# **Your own:** `classifier = torchvision.models.resnet50(weights="DEFAULT").eval()` and
# `clip = OpenCLIPEncoder.from_pretrained("ViT-B-32", "openai")`; images come as a tensor, a `Dataset`, a `DataLoader` or
# the path of a folder. Where the two want different preprocessing, `fit` takes `model_transform` and `encoder_transform`.
#
# ## A list of words
#
# A vocabulary cleans a list and keeps a reason for each word it drops. Here: duplicates, words that are a class's name
# (they would explain "red circle" by "red circle"), and words that the image-text model does not know.

# %%
words = ["Circle", "star", "stars", "red", "blue", "striped", "dotted", "plain", "grass", "sand", "brick"]
words = Vocabulary([*words, "red circle", "zebra"])
words = words.clean(lowercase=True).filter(data.classes).known_to(clip)
print(words.concepts)
for drop in words.report.drops:
    print(f"dropped {drop.concept!r}: {drop.reason}")

# %% [markdown]
# ## Train the translator, once
#
# `concepts=None`: it learns to give the image's embedding, whatever the words. `layers` are where it reads; four stages
# are a good choice, and `captum_concepts.activations.survey.suggest_stages(model, images)` finds them.

# %%
layers = ["layer1", "layer2", "layer3", "layer4"]
images = CaptionedScenes(400, seed=42, size=64).stack().image
translator = ConceptFusionMap(classifier, layers, map_layer="fused", batch_size=100).fit(images, clip)
history = translator.history_
print(f"{len(history['lr'])} epochs; held-out cosine to the image embedding {max(history['val_cosine']):.2f}")
cefam = translator.with_concepts(words.concepts, clip)

# %% [markdown]
# ## What: scores
#
# Softmax over the words, as CLIP has it: the words compete. Do they come out where they are true?

# %%
scores = cefam.scores(scenes.image)
truth = scenes.presence[:, [data.concepts.index(word) for word in words.concepts]]
for k, word in enumerate(words.concepts):
    there, not_there = scores[truth[:, k], k].mean(), scores[~truth[:, k], k].mean()
    print(f"{word:8s} mean score where it is {there:.2f}, where it is not {not_there:.2f}")

# %% [markdown]
# ## Where: regions
#
# `map_layer="auto"` is the published map: for each word the most relevant layer, whole channels weighted by one number each.
# `map_layer="fused"` adds the evidence of all layers and lets it spread over the rest of the thing. Measure before you
# choose; `explain` works with either.

# %%
published = cefam.with_options(map_layer="auto")
masks = scenes.masks[:, [data.concepts.index(word) for word in words.concepts]]
explainers = {
    "fused": cefam.concept_maps,
    "published": published.attribute,
    "centre Gaussian": CenterGaussian(n_maps=len(words.concepts)),
}
evaluate(explainers, [(scenes.image, masks)], metrics=["nra", "concept_specificity"], n_bootstrap=300)

# %% [markdown]
# ## How much: contributions
#
# Channels are taken away from the classifier in the order in which they speak for the word; the contribution is the mean
# relative drop of the class's probability. Positive: the word supports the class.

# %%
shown = [int(torch.nonzero(scenes.label == c)[0]) for c in (0, 1, 5)]
explanation = cefam.explain(scenes.image[shown], target=scenes.label[shown])
panel(
    explanation,
    scenes.image[shown],
    top_k=4,
    class_names=data.classes,
    title="What, where and how much",
    map_label="evidence for the word",
)

# %% [markdown]
# The printed form holds the same, contributions in brackets:

# %%
print(explanation)

# %% [markdown]
# ## Change the words
#
# Nothing is trained again. A word that the encoder does not know is an error that names it, not a random vector.

# %%
objects = translator.with_concepts(data.concept_groups["shape"] + data.concept_groups["texture"], clip)
print(objects.explain(scenes.image[:2], top_k=3))
try:
    translator.with_concepts(["striped", "tartan"], clip)
except InputError as error:
    print("refused:", error)

# %% [markdown]
# ## Two classifiers, one question
#
# The same question to two networks of one architecture: this one, and one that learnt from scenes in which the ground
# gave the class away. How much does the ground *under the object* move the true class? The translator is trained for
# each: it reads the classifier's own layers.

# %%
biased = demo.load("classifier-spurious")
grounds = data.concept_groups["ground"]
other = ConceptFusionMap(biased, layers, map_layer=-1, batch_size=100).fit(images, clip, data.concepts)
ours = translator.with_concepts(data.concepts, clip).with_options(map_layer=-1)
rows = torch.arange(len(data))
own = torch.tensor([grounds.index(data.concepts[k]) for k in scenes.ground.tolist()])
moved = {
    name: one.contributions(scenes.image, target=scenes.label, concepts=grounds)[rows, own]
    for name, one in (("independent grounds", ours), ("planted grounds", other))
}
for name, values in moved.items():
    print(f"trained on {name}: mean |contribution| of the scene's ground {values.abs().mean():.2f}")

# %%
figure, axes = plt.subplots(figsize=(6.4, 2.4), layout="constrained")
for height, (name, values) in enumerate(moved.items()):
    axes.scatter(values, torch.full_like(values, height), alpha=0.5, label=name)
    axes.plot([values.median()] * 2, [height - 0.25, height + 0.25], color="black", lw=2)
axes.axvline(0, color="0.6", lw=0.8)
axes.set_yticks([0, 1], [f"trained on\n{name}" for name in moved])
axes.set(xlabel="contribution of the scene's ground to the true class (black: median)", ylim=(-0.5, 1.5))
axes.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# `layer=-1` reads the last layer only: in narrow early layers, taking 20 channels away takes nearly everything away.
#
# ## Keep it, and explain a new image

# %%
cefam.save("words.safetensors")
again = ConceptFusionMap.load("words.safetensors", classifier)
new = CaptionedScenes(1, seed=2026, size=64).stack()
print("caption:", new.caption[0])
print(again.explain(new.image, top_k=4))

# %% [markdown]
# ## Remember
#
# - The translator can only carry over what the classifier's layers hold. A low held-out cosine means that the words may
#   be read in vain; check scores on images where you know the answer, as above.
# - Scores under a softmax depend on which other words are in the list.
# - A contribution says what happens when those channels are gone. It is about the network, not about the world.
