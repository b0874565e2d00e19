# %% [markdown]
# # Find the shortcut
#
# You get a classifier and a folder of validation images with one subfolder per class. Almost half of its predictions
# are wrong. Explanations of single images do not show why, because a *systematic* error shows only over many images.
# This notebook starts from nothing but the folder and the model. It ends with a list of named shortcuts, each with a
# test, a causal check and the images that show it, and then checks the next checkpoint.

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
for i, scene in enumerate(data):
    path = Path("val") / data.classes[scene.label] / f"{i:03}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((scene.image * 255).round().byte().permute(1, 2, 0).numpy()).save(path)

model = demo.load("classifier-spurious")
names = data.classes  # of the outputs, in the model's order
images = open_images("val", size=64)
print(f"{len(images)} images in {len(images.class_names)} folders")

# %% [markdown]
# **Your own** model is `model = torchvision.models.resnet50(weights="DEFAULT").eval()` with
# `images = captum_concepts.images.inputs_for(model, "val")`, which reads the folder at the model's size and normalized
# as the model expects.
#
# ## Names for what the model encodes
#
# `ConceptFusionMap` translates the network's own features into the embedding space of a vision-language model, so that
# you can ask about any concept. It needs images without labels, and those of the folder are sufficient. Ask about all
# concepts that could matter: the parts of the class names and whatever else is in such images.

# %%
clip = demo.load("clip")  # yours: captum_concepts.vlm.OpenCLIPEncoder.from_pretrained("ViT-B-32", pretrained="openai")
words = data.concepts
layers = ["layer2", "layer3", "layer4"]
cefam = ConceptFusionMap(model, layers, map_layer=-1, batch_size=100)
cefam.fit(images, clip, words, crops=2)  # two crops per image instead of four save time
print(cefam)

# %% [markdown]
# ## The audit
#
# The audit takes one pass over the folder. With `store_path=`, a killed audit resumes where it stopped, and processes
# under `torchrun` share the work.

# %%
audit = audit_dataset(cefam, images, class_names=names, top_k=3, store_path="parts")
print(audit)

# %% [markdown]
# A *suspect* is a concept whose presence raises the probability of a class in images of other classes, and whose
# absence lowers it in the class's own images. Both are measured among images of the same true class, so a concept that
# is merely frequent in a class is not suspected. The p-value comes from permutations and is adjusted for all pairs that
# were tested. Concepts in the name of a class are not tested for that class: stripes rightly support a striped circle.
#
# The last line lists the concepts that were *not* tested, because the explainer does not tell clearly which images show
# them. That does not clear them.

# %%
for suspect in audit.suspects():
    print(
        f"{suspect.class_name:15s} <- {suspect.concept:6s} effect {suspect.effect.value:.2f} "
        f"[{suspect.effect.low:.2f}, {suspect.effect.high:.2f}]  p {suspect.p:.1g}  confirmed {suspect.confirmed}"
    )

# %% [markdown]
# *Confirmed* is the causal check. In images of other classes that show the concept, the channels that carry it are
# ablated, and the probability of the class drops on average (the interval is above 0). A suspect that is not confirmed
# remains a suspect, because other channels may carry the concept as well.
#
# ## The images behind it
#
# These images of other classes show the strongest suspect, those with the highest probability of the class first. The
# concept map over each image comes from all three layers, by a copy of the explainer with `map_layer="fused"`, which
# finds whole regions. The audit uses `map_layer=-1`, which belongs to the one layer whose channels are ablated and
# costs less.

# %% alt="Six scenes on brick that are not striped squares, with the map of brick over each"
strongest = audit.suspects()[0]
shown = torch.stack([images[i] for i in strongest.images])
maps = cefam.with_options(map_layer="fused").concept_maps(shown, concepts=[strongest.concept])[:, 0]
figure, axes = plt.subplots(1, 6, figsize=(10, 2.1), layout="constrained")
for axis, index, image, where in zip(axes, strongest.images, shown, maps, strict=True):
    axis.imshow(overlay(image, where).permute(1, 2, 0))
    true, predicted = (names[int(k[index])] for k in (audit.labels, audit.predicted))
    axis.set_title(f"true: {true}\npredicted: {predicted}", fontsize=7)
    axis.axis("off")
_ = figure.suptitle(f"“{strongest.concept}” drives “{strongest.class_name}”", fontsize=10)

# %% [markdown]
# You can write the whole audit as one HTML page for readers without Python, and as a set of tables. The next cell
# prints the concepts that contribute most to wrong predictions.

# %%
page = audit.report("audit.html", images, title="What drives the classifier")
print(f"{page.name}: {page.stat().st_size / 1000:.0f} kB")
wrong = [row for row in audit.to_records("drivers") if row["where"] == "wrong" and row["n"] >= 10]
for row in sorted(wrong, key=lambda row: -row["contribution"])[:5]:
    print(
        f"wrongly {row['class']:15s} {row['concept']:8s} {row['contribution']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]"
    )

# %% [markdown]
# ## Is it true?
#
# These scenes can be rendered again with the same objects on another background, so here, unlike in a folder of
# photographs, the answer is known. In the training images of this classifier, each class usually had its own
# background. How often is a scene of another class predicted as that class, unchanged and with only the background
# exchanged?

# %%
suspected = {(suspect.class_name, suspect.concept) for suspect in audit.suspects()}
for goal, background in enumerate(data.concepts[k] for k in data.planted_grounds):
    others = [i for i in range(len(data)) if int(data.labels[i]) != goal][:60]
    with torch.no_grad():
        before = model(torch.stack([data[i].image for i in others])).argmax(1)
        after = model(torch.stack([data.draw(i, ground=background).image for i in others])).argmax(1)
    rates = [float((predicted == goal).double().mean()) for predicted in (before, after)]
    verdict = "suspected" if (names[goal], background) in suspected else "not suspected"
    print(f"predicted {names[goal]:15s} {rates[0]:4.0%} of other scenes, on {background:6s} {rates[1]:4.0%}  {verdict}")

# %% [markdown]
# Five of the six planted pairs are suspected, and nothing else is. The sixth hardly matters: on snow, no more scenes
# are predicted as a blue triangle than before.
#
# ## Without any names
#
# If no vision-language model covers your domain, `discover_concepts` factorizes what the layer encodes. The result is
# audited in the same way. The images of a suspect then show what its number means.

# %%
found = discover_concepts(model, "layer4", images, n_concepts=24, max_rows=10_000)
print(found)
unnamed = audit_dataset(found, images, class_names=names, top_k=3)
for suspect in unnamed.suspects()[:6]:
    seen = {data.concepts[data[int(Path(unnamed.image_names[i]).stem)].ground] for i in suspect.images}
    print(
        f"{suspect.class_name:15s} <- {suspect.concept:10s} effect {suspect.effect.value:.2f}; its images show {seen}"
    )

# %% [markdown]
# ## The next checkpoint
#
# The network was trained again, on scenes whose backgrounds are independent of the class. Is it better, and for the
# right reason? `compare_audits` compares two audits of the same images, image by image.

# %%
repaired = demo.load("classifier")
again = ConceptFusionMap(repaired, layers, map_layer=-1, batch_size=100)
again.fit(images, clip, words, crops=2)
print(compare_audits(audit, audit_dataset(again, images, class_names=names, top_k=3)))

# %% [markdown]
# ## Save it, and explain a new image
#
# The fitted explainer is saved as one file, and so is the audit.

# %%
cefam.save("words.safetensors")
audit.save("audit.safetensors")
new = CaptionedScenes(1, seed=2026, size=64).stack()
print("caption:", new.caption[0])
print(ConceptFusionMap.load("words.safetensors", model).explain(new.image, top_k=3))
print(f"{len(ConceptAudit.load('audit.safetensors').suspects())} suspects in the file")

# %% [markdown]
# In a pipeline, the audit is one command. Its exit code rejects a checkpoint that gains a shortcut:
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
# - An audit tests the concepts it is given, or discovers its own. It cannot find what nobody named and the layer does
#   not separate.
# - A concept must vary *within* classes. If every wolf of the validation set stands in snow, no statistics can separate
#   the two.
# - "Not tested" does not mean "innocent". Another layer, or `explainer.calibrate(images, labels)` with some labeled
#   images, makes more concepts testable.
# - `SALFCBM.without(concepts)` and `refit_head` remove a suspect from a concept bottleneck without training it again.
