# %% [markdown]
# # Five minutes from a model to what, where and how much
#
# A classifier that was right on 96 % of its validation images is wrong in the field. You know Captum, so you would look
# at a saliency map. A saliency map says *where* the network looked. It does not say *what* it saw there, nor which of
# the things it saw moved the prediction.
#
# Here we ask for all three, in words that the classifier never had as labels. Everything runs offline: the classifier,
# an image-text model and the images are bundled.

# %%
# %matplotlib inline
import matplotlib.pyplot as plt
import torch

from captum_concepts import ConceptExplanation, ConceptFusionMap, demo
from captum_concepts.datasets import CaptionedScenes
from captum_concepts.visualization import panel

torch.manual_seed(0)
classifier = demo.load("classifier-spurious")  # a small ResNet: 64 px RGB in [0, 1] -> 6 logits

# %% [markdown]
# **Your own model instead?** One line: `classifier = torchvision.models.resnet50(weights="DEFAULT").eval()`, or any
# other `torch.nn.Module` from torchvision, timm or your own code. Layers are named as in `model.named_modules()`.
#
# ## It is wrong, and the saliency map does not say why
#
# The scenes show one to three objects; the class names two properties of one of them, as "red square". In training
# every class had its usual ground: red circles lay on grass nine times in ten, and so on. In the field the grounds are
# mixed.

# %%
familiar = CaptionedScenes(200, seed=101, size=64, spurious=0.9).stack()
data = CaptionedScenes(200, seed=102, size=64)
field = data.stack()
for name, scenes in (("usual grounds", familiar), ("mixed grounds", field)):
    accuracy = (classifier(scenes.image).argmax(1) == scenes.label).float().mean()
    print(f"{name}: {accuracy:.0%} right")

# %% [markdown]
# ## What, where and how much
#
# `ConceptFusionMap` (CE-FAM) learns to translate the classifier's layers into the embedding space of an image-text
# model. It needs images, but no labels and no masks. This is the only thing that is trained, and it takes seconds.

# %%
clip = demo.load("clip")  # yours: OpenCLIPEncoder.from_pretrained("ViT-B-32", "openai")
images = CaptionedScenes(400, seed=7, size=64).stack().image
layers = ["layer1", "layer2", "layer3", "layer4"]
cefam = ConceptFusionMap(classifier, layers, map_layer="fused", batch_size=100).fit(images, clip, data.concepts)

# %% [markdown]
# Now explain some of the errors. `target` is the class whose probability is in question: the *true* one, which the
# classifier missed. Red bars speak for it, blue ones against it.

# %%
predicted = classifier(field.image).argmax(1)
wrong = torch.nonzero(predicted != field.label).flatten()[:40]
against = cefam.contributions(field.image[wrong], target=field.label[wrong], concepts=data.concept_groups["ground"])
chosen = wrong[against.amin(1).argsort()[:3]]
titles = [f"{data.classes[field.label[i]]}, called {data.classes[predicted[i]]}" for i in chosen]
explanation = cefam.explain(field.image[chosen], target=field.label[chosen], top_k=len(data.concepts))

# %% picture="ce_fam" alt="Three misclassified scenes; for each, four words with their regions and contributions; the ground speaks against the true class"
panel(
    explanation,
    field.image[chosen],
    top_k=4,
    rank_by="contributions",
    class_names=data.classes,
    image_names=titles,
    title="What speaks for (red) and against (blue) the true class",
    map_label="evidence for the word",
)

# %% [markdown]
# The word is *what*, the map is *where*, the bar is *how much*. The ground is among the strongest words against the
# true class, although no label and no mask ever named it.
#
# ## Believe it only after you tried it
#
# An explanation is a prediction: if the ground did it, another ground should repair it. These scenes can be drawn again
# with the same objects on the ground that the true class was trained with.

# %%
usual = [data.concepts[data.planted_grounds[field.label[i]]] for i in wrong]
moved = torch.stack([data.draw(int(i), ground=ground).image for i, ground in zip(wrong, usual, strict=True)])
repaired = (classifier(moved).argmax(1) == field.label[wrong]).float().mean()
print(f"{len(wrong)} errors; on the usual ground of their class {repaired:.0%} of them are right")

# %% [markdown]
# And over many images, not three: the share of errors in which a ground is the word that speaks most strongly against
# the true class. By chance it would be the share of grounds among the words.

# %%
every = cefam.contributions(field.image[wrong], target=field.label[wrong])
grounds = [data.concepts.index(word) for word in data.concept_groups["ground"]]
leads = torch.isin(every.argmin(1), torch.tensor(grounds)).float().mean()
print(f"a ground leads in {leads:.0%} of the errors (by chance {len(grounds) / len(data.concepts):.0%})")

# %% alt="Contributions to the true class of misclassified scenes, by kind of word: the scene's own ground is far below the others"
there = field.presence[wrong]
is_ground = torch.zeros_like(there)
is_ground[:, grounds] = True
kinds = {
    "the scene's ground": there & is_ground,
    "words of its objects": there & ~is_ground,
    "other grounds": ~there & is_ground,
    "words of other objects": ~there & ~is_ground,
}
figure, axes = plt.subplots(figsize=(7, 2.6), layout="constrained")
for height, where in enumerate(reversed(kinds.values())):
    values = every[where]
    axes.scatter(values, height + 0.3 * (torch.rand(len(values)) - 0.5), s=9, alpha=0.4)
    axes.plot([values.mean()] * 2, [height - 0.35, height + 0.35], color="black", lw=2)
axes.axvline(0, color="0.6", lw=0.8)
axes.set_yticks(range(4), list(reversed(kinds)))
axes.set_xscale("symlog", linthresh=0.1)
axes.set_xlim(1.5 * float(every.min()), 1.5)
axes.set(xlabel="contribution to the true class (a dot a word and scene; black: mean)")
axes.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# ## Keep it, and explain a new image
#
# The explainer is one safetensors file; nothing is pickled. It refuses to load for another classifier.

# %%
cefam.save("words.safetensors")
again = ConceptFusionMap.load("words.safetensors", classifier)
new = CaptionedScenes(1, seed=2026, size=64).stack().image
explanation = again.explain(new, top_k=4)
print(explanation)

# %%
explanation.save("explanation.safetensors")
assert ConceptExplanation.load("explanation.safetensors").concepts == explanation.concepts

# %% [markdown]
# ## Where to go from here
#
# - No image-text model at hand, but example images of the concept: [is it the stripes?](03_is_it_the_stripes.ipynb)
# - A model without a classifier head: [few-shot and retrieval](02_few_shot_and_retrieval.ipynb).
# - Your own words, more about maps and contributions: [own words](04_own_words.ipynb).
# - How far to trust a map: [evaluating explanations](07_evaluating_explanations.ipynb).
