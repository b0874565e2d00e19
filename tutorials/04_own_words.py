# %% [markdown]
# # Your classifier, your words
#
# Which of *your* concepts did *your* classifier detect, where, and how much did each one change the prediction?
# `ConceptFusionMap` (CE-FAM) keeps the three answers in one-to-one correspondence: each concept has one score, one map
# and one contribution.
#
# It trains a small translator from the classifier's layers to the embedding of a vision-language model (VLM). The
# translator needs images from your domain, but no labels, no masks, and not even the concepts. You can choose those
# later, and change them.

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
# **Your own** models are `classifier = torchvision.models.resnet50(weights="DEFAULT").eval()` and
# `clip = OpenCLIPEncoder.from_pretrained("ViT-B-32", "openai")`. Pass images as a tensor, a `Dataset`, a `DataLoader`
# or the path of a folder. If the two models need different preprocessing, pass `model_transform` and
# `encoder_transform` to `fit`.
#
# ## A list of concepts
#
# A vocabulary cleans a list and records a reason for each word it drops. Here it drops duplicates, class names (they
# would explain "red circle" by "red circle"), and words that the VLM does not know.

# %%
words = ["Circle", "star", "stars", "red", "blue", "striped", "dotted", "plain", "grass", "sand", "brick"]
words = Vocabulary([*words, "red circle", "zebra"])
words = words.clean(lowercase=True).filter(data.classes).known_to(clip)
print(words.concepts)
for drop in words.report.drops:
    print(f"dropped {drop.concept!r}: {drop.reason}")

# %% [markdown]
# ## Train the translator once
#
# With `concepts=None`, the translator learns to predict the image embedding, independent of any concepts. It reads the
# activations of `layers`. Four stages are a good choice, and
# `captum_concepts.activations.survey.suggest_stages(model, images)` finds them.

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
# Scores are a softmax over the concepts, as in CLIP, so the concepts compete. Are the scores higher in images that show
# the concept?

# %%
scores = cefam.scores(scenes.image)
truth = scenes.presence[:, [data.concepts.index(word) for word in words.concepts]]
for k, word in enumerate(words.concepts):
    there, not_there = scores[truth[:, k], k].mean(), scores[~truth[:, k], k].mean()
    print(f"{word:8s} mean score if present {there:.2f}, if absent {not_there:.2f}")

# %% [markdown]
# ## Where: maps
#
# `map_layer="auto"` is the published map: for each concept it selects the most relevant layer, and weights each channel
# of it with one number. `map_layer="fused"` adds up the evidence of all layers and spreads it over the rest of the
# object. Measure before you choose; `explain` works with either.

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
# Channels are ablated from the classifier in the order in which they support the concept. The contribution is the mean
# relative drop of the class probability. If it is positive, the concept supports the class.

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
# The printed form contains the same information, with contributions in parentheses.

# %%
print(explanation)

# %% [markdown]
# ## Change the concepts
#
# Nothing is trained again. A word that the encoder does not know raises an error that names it, instead of becoming a
# random vector.

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
# We ask the same question of two networks with the same architecture: this one, and one trained on scenes in which the
# background predicts the class. How much does the background *of the scene* change the probability of the true class?
# Each network needs its own translator, because the translator reads the classifier's own layers.

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
    print(f"trained on {name}: mean |contribution| of the scene's background {values.abs().mean():.2f}")

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
# `map_layer=-1` ablates channels of the last layer only, so the two classifiers are compared at the same layer.
# Otherwise each concept would use its most relevant layer.
#
# ## Save it, and explain a new image

# %%
cefam.save("words.safetensors")
again = ConceptFusionMap.load("words.safetensors", classifier)
new = CaptionedScenes(1, seed=2026, size=64).stack()
print("caption:", new.caption[0])
print(again.explain(new.image, top_k=4))

# %% [markdown]
# ## Remember
#
# - The translator can only use what the classifier's layers encode. If the held-out cosine is low, the scores may mean
#   nothing. Check them on images for which you know the answer, as above.
# - Scores under a softmax depend on which other concepts are in the list.
# - A contribution describes what happens when those channels are ablated. It is a statement about the network, not
#   about the world.
