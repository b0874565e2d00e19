# %% [markdown]
# # Five minutes from a model to what, where and how much
#
# A classifier that was right on 96% of its validation images is wrong in the field. With Captum, you would look at a
# saliency map. A saliency map shows *where* the network looked. It does not show *what* the network detected there, or
# which of these concepts changed the prediction.
#
# This tutorial answers all three questions with concepts that the classifier never had as labels. Everything runs
# offline: the classifier, a vision-language model (VLM) and the images are bundled.

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
# **Your own model** takes one line: `classifier = torchvision.models.resnet50(weights="DEFAULT").eval()`, or any other
# `torch.nn.Module` from torchvision, timm or your own code. Layer names are those of `model.named_modules()`.
#
# ## It is wrong, and a saliency map does not show why
#
# Each scene contains one to three objects, and the class names two properties of one of them, for example "red square".
# In the training data, every class had its usual background (the data set calls it "ground"). Red circles, for example,
# were on grass nine times out of ten. In the field, the backgrounds are mixed.

# %%
familiar = CaptionedScenes(200, seed=101, size=64, spurious=0.9).stack()
data = CaptionedScenes(200, seed=102, size=64)
field = data.stack()
for name, scenes in (("usual backgrounds", familiar), ("mixed backgrounds", field)):
    accuracy = (classifier(scenes.image).argmax(1) == scenes.label).float().mean()
    print(f"{name}: accuracy {accuracy:.0%}")

# %% [markdown]
# ## What, where and how much
#
# `ConceptFusionMap` (CE-FAM) learns to translate the classifier's layers into the embedding space of a VLM. It needs
# images, but no labels and no masks. Only this translator is trained, which takes seconds.

# %%
clip = demo.load("clip")  # yours: OpenCLIPEncoder.from_pretrained("ViT-B-32", "openai")
images = CaptionedScenes(400, seed=7, size=64).stack().image
layers = ["layer1", "layer2", "layer3", "layer4"]
cefam = ConceptFusionMap(classifier, layers, map_layer="fused", batch_size=100).fit(images, clip, data.concepts)

# %% [markdown]
# Now explain three of the errors, those in which a background opposes the true class most strongly. `target` is the
# class whose probability is explained, here the *true* one, which the classifier missed. Red bars support it, and blue
# bars oppose it.

# %%
predicted = classifier(field.image).argmax(1)
wrong = torch.nonzero(predicted != field.label).flatten()[:40]
against = cefam.contributions(field.image[wrong], target=field.label[wrong], concepts=data.concept_groups["ground"])
chosen = wrong[against.amin(1).argsort()[:3]]
titles = [f"{data.classes[field.label[i]]}, called {data.classes[predicted[i]]}" for i in chosen]
explanation = cefam.explain(field.image[chosen], target=field.label[chosen], top_k=len(data.concepts))

# %% picture="ce_fam" alt="Three misclassified scenes; for each, four concepts with their maps and contributions; the background opposes the true class"
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
# The concept is *what*, the map is *where*, and the bar is *how much*. In these three scenes, the background opposes
# the true class more strongly than any other concept, although no label and no mask ever named it.
#
# ## Test the explanation
#
# An explanation makes a prediction. If the background caused the error, another background should correct it. These
# scenes can be rendered again with the same objects, on the background that was usual for the true class during
# training.

# %%
usual = [data.concepts[data.planted_grounds[field.label[i]]] for i in wrong]
moved = torch.stack([data.draw(int(i), ground=ground).image for i, ground in zip(wrong, usual, strict=True)])
repaired = (classifier(moved).argmax(1) == field.label[wrong]).float().mean()
print(f"{len(wrong)} errors; on the usual background of their class {repaired:.0%} of them are correct")

# %% [markdown]
# The next number covers all of these errors instead of three. It is the fraction of errors in which the concept that
# opposes the true class most strongly is a background. By chance, it would be the fraction of backgrounds among the
# concepts.

# %%
every = cefam.contributions(field.image[wrong], target=field.label[wrong])
grounds = [data.concepts.index(word) for word in data.concept_groups["ground"]]
leads = torch.isin(every.argmin(1), torch.tensor(grounds)).float().mean()
print(f"a background ranks first in {leads:.0%} of the errors (chance {len(grounds) / len(data.concepts):.0%})")

# %% alt="Contributions to the true class of misclassified scenes, by kind of concept: the scene's own background is far below the others"
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
# ## Save it, and explain a new image
#
# The explainer is saved as one safetensors file; nothing is pickled. Loading it for another classifier raises an error.

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
# - If you have no VLM but example images of the concept, read [is it the stripes?](03_is_it_the_stripes.ipynb).
# - If your model has no classifier head, read [few-shot and retrieval](02_few_shot_and_retrieval.ipynb).
# - For your own list of concepts, and for more about maps and contributions, read [own words](04_own_words.ipynb).
# - To find out how far to trust a map, read [evaluating explanations](07_evaluating_explanations.ipynb).
