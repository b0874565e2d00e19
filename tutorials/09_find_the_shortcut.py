# %% [markdown]
# # Find the shortcut
#
# Somebody hands over a classifier and a folder of validation images, one subfolder per class. It is right on about half
# of them. Explanations of single images do not say why: what is *systematically* wrong shows over all images only. This
# notebook goes from nothing but the folder and the model to the shortcuts, in words, with a test, a causal check, and
# the images that show it; then it guards the next checkpoint.

# %%
# %matplotlib inline
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from PIL import Image

from captum_concepts import ConceptFusionMap, audit_dataset, compare_audits, demo, discover_concepts
from captum_concepts.audit import ConceptAudit
from captum_concepts.datasets import CaptionedScenes
from captum_concepts.images import open_images
from captum_concepts.visualization import overlay

torch.manual_seed(0)
data = CaptionedScenes(480, seed=91, size=64)
for i, scene in enumerate(data):  # yours: a folder that is there already
    path = Path("val") / data.classes[scene.label] / f"{i:03}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((scene.image * 255).round().byte().permute(1, 2, 0).numpy()).save(path)

model = demo.load("classifier-spurious")  # yours: torchvision.models.resnet50(...).eval(), or any torch.nn.Module
names = data.classes  # of the outputs

# %% [markdown]
# ## Words for what it sees
#
# `ConceptFusionMap` carries the network's own features into the space of an image-text model, so that any word can be
# asked. It needs images without labels; those of the folder do. Which words? All that could matter: what the classes
# are called, and what else is in such pictures.

# %%
clip = demo.load("clip")  # yours: captum_concepts.vlm.OpenCLIPEncoder.from_pretrained("ViT-B-32", pretrained="openai")
words = data.concepts
layers = ["layer2", "layer3", "layer4"]
cefam = ConceptFusionMap(model, layers, map_layer=-1, batch_size=100).fit("val", clip, words)
print(cefam)

# %% [markdown]
# ## The audit
#
# One pass over the folder. With `store_path=` a killed audit goes on where it was, and processes under `torchrun` share
# the work.

# %%
audit = audit_dataset(cefam, "val", class_names=names, top_k=3, store_path="parts")
print(audit)

# %% [markdown]
# A *suspect* is a word that raises a class in images of other classes, and whose absence lowers it in the class's own.
# Both are measured among images of the same true class, so a word that merely is frequent in a class is none; the p
# value is by permutation, adjusted for all pairs that were tested. Words in the name of the class are left out: stripes
# rightly make a striped circle. The audit also says which words it did *not* test, because this network's features do
# not clearly tell which images show them. A shortcut that a network goes by, it encodes clearly.

# %%
for suspect in audit.suspects():
    print(
        f"{suspect.class_name:15s} <- {suspect.concept:6s} effect {suspect.effect.value:.2f} "
        f"[{suspect.effect.low:.2f}, {suspect.effect.high:.2f}]  p {suspect.p:.1g}  confirmed {suspect.confirmed}"
    )

# %% [markdown]
# *Confirmed* is the causal check: in images of other classes that show the word, the channels that carry it are taken
# out of the network, and the class falls.
#
# ## See it
#
# For the strongest suspect: images of other classes that are taken for it, and where the network sees the word.

# %% picture="find_the_shortcut"
strongest = audit.suspects()[0]
images = open_images("val")
figure, axes = plt.subplots(1, 6, figsize=(10, 2.1), layout="constrained")
for axis, index, where in zip(axes, strongest.images, audit.maps[0], strict=False):
    axis.imshow(overlay(images[index], where).permute(1, 2, 0))
    true, predicted = (names[int(k[index])] for k in (audit.labels, audit.predicted))
    axis.set_title(f"a {true}\ncalled {predicted}", fontsize=8)
    axis.axis("off")
figure.suptitle(f"{strongest.concept} makes it a {strongest.class_name}", fontsize=10)

# %% [markdown]
# The whole of it as one page, for people without Python, and as tables:

# %%
page = audit.report("audit.html", "val", title="What drives the classifier")
print(f"{page.name}: {page.stat().st_size / 1000:.0f} kB")
drivers = [row for row in audit.to_records("drivers") if row["where"] == "wrong" and row["n"] >= 10]
for row in sorted(drivers, key=lambda row: -row["contribution"])[:5]:
    print(
        f"wrongly {row['class']:15s} {row['concept']:8s} {row['contribution']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]"
    )

# %% [markdown]
# ## Is it true?
#
# These scenes can be drawn again with another ground and the same objects, which a folder cannot. So here, and only
# here, the answer is known: how often does a scene's class change to the suspected one if nothing but the ground is
# exchanged for the suspected word?

# %%
grounds = data.concept_groups["ground"]
for suspect in audit.suspects():
    if suspect.concept not in grounds:
        continue
    goal = names.index(suspect.class_name)
    others = [i for i in range(len(data)) if int(data.labels[i]) != goal][:60]
    with torch.no_grad():
        there = model(torch.stack([data.draw(i, ground=suspect.concept).image for i in others])).argmax(1)
        as_it_was = model(torch.stack([data[i].image for i in others])).argmax(1)
    rates = [(said == goal).double().mean() for said in (as_it_was, there)]
    print(f"called {suspect.class_name:15s} {rates[0]:4.0%} of other scenes, on {suspect.concept} {rates[1]:4.0%}")

# %% [markdown]
# ## Without any words
#
# If no image-text model knows the domain, `discover_concepts` finds what the layer distinguishes by itself. What it
# finds can be audited like words; the page's pictures say what a number means.

# %%
found = discover_concepts(model, "layer4", "val", n_concepts=12)
print(found)
unnamed = audit_dataset(found, "val", class_names=names, top_k=3)
for suspect in unnamed.suspects()[:4]:
    index = list(suspect.images)
    shown = {data.concepts[data[int(Path(unnamed.image_names[i]).stem)].ground] for i in index}
    print(
        f"{suspect.class_name:15s} <- {suspect.concept:12s} effect {suspect.effect.value:.2f}; its images show {shown}"
    )

# %% [markdown]
# ## The next checkpoint
#
# Somebody retrains the network on scenes whose grounds are independent of the class. Is it better, and for the right
# reason? The audits are compared image by image.

# %%
repaired = demo.load("classifier")
again = ConceptFusionMap(repaired, layers, map_layer=-1, batch_size=100).fit("val", clip, words)
after = audit_dataset(again, "val", class_names=names, top_k=3)
print(compare_audits(audit, after))

# %% [markdown]
# ## Keep it, and explain a new image
#
# The words are a file, and so is the audit.

# %%
cefam.save("words.safetensors")
audit.save("audit.safetensors")
new = CaptionedScenes(1, seed=2026, size=64).stack()
print("caption:", new.caption[0])
print(ConceptFusionMap.load("words.safetensors", model).explain(new.image, top_k=3))
print(f"{len(ConceptAudit.load('audit.safetensors').suspects())} suspects in the file")

# %% [markdown]
# In a pipeline the same is one command, whose exit code stops a checkpoint that brings a new shortcut:
#
# ```bash
# python -m captum_concepts audit val/ --model my_model.py:build --explainer words.safetensors \
#     --output audit.html --save audit.safetensors
# python -m captum_concepts audit val/ --model my_model.py:build --explainer new_words.safetensors \
#     --output audit.html --against audit.safetensors --fail-on "gained>0"
# ```
#
# ## Remember
#
# - An audit tests the words it is given, or finds its own. It cannot find what nobody named and the layer does not tell.
# - A concept must vary *within* classes: if every wolf of the validation set stands in snow, no statistics can part them.
# - "Not tested" is not "innocent". Another layer, or `explainer.calibrate(images, labels)` with a few labeled images,
#   makes more words readable.
# - To repair instead of retrain: `SALFCBM.without(concepts)` and `refit_head`.
