# %% [markdown]
# # Show and tell: a classifier that explains itself
#
# The other methods explain an existing model. `SALFCBM` (Show and Tell) *is* the model. The backbone's features become
# one map per concept, and a sparse linear layer predicts the class from the means of these maps alone. An explanation
# is therefore exact: it is the model's own arithmetic. You can read its rules, ask what it saw in a region, and change
# what it saw to find out what it would have predicted.
#
# Concept labels are not needed. A vision-language model (VLM) provides them. It looks at each image many times, with a
# red circle around a different cell each time.

# %%
# %matplotlib inline
import matplotlib.pyplot as plt
import torch

from captum_concepts import SALFCBM, demo, fit_salf_cbm
from captum_concepts.datasets import CaptionedScenes
from captum_concepts.metrics import CenterGaussian, RandomMaps, concept_specificity, evaluate
from captum_concepts.models.salf_cbm.fit import refit_head
from captum_concepts.visualization import overlay, panel
from captum_concepts.vlm import DenseRegions, RegionPrompt

_ = torch.manual_seed(0)
backbone = demo.load("classifier")
clip = demo.load("clip")
data = CaptionedScenes(240, seed=51, size=64)
train = data.stack()
test = CaptionedScenes(120, seed=52, size=64).stack()

# %% [markdown]
# **Your own** model is `backbone = torchvision.models.resnet50(weights="DEFAULT")` with `layer="layer4"` and
# `clip = OpenCLIPEncoder.from_pretrained("ViT-B-16", "openai")`, and the data are an `ImageFolder`. On real data, the
# step with the circles takes longest. It resumes after it is killed and runs on several machines, and
# `python -m captum_concepts fit-salf --help` explains how to plan it.
#
# ## Look where the circle is
#
# A 7 x 7 grid of circles makes 49 visual prompts from each image. The VLM describes what is circled. This is how the
# model learns *where* a concept is, without any mask.

# %%
prompt = RegionPrompt("circle", (7, 7), 32, reference_size=224)  # the paper's circle, for images of any size
circled = prompt.draw(test.image[1:2])[0]
shown = [9, 24, 31, 39]
with torch.no_grad():
    similarity = clip.encode_image(circled[shown]) @ clip.encode_text(data.concepts).T
figure, axes = plt.subplots(1, 4, figsize=(9, 2.7), layout="constrained")
for each, image, row in zip(axes, circled[shown], similarity, strict=True):
    each.imshow(image.permute(1, 2, 0))
    each.set_title(", ".join(data.concepts[k] for k in row.topk(3).indices), fontsize=9)
    each.set_axis_off()
_ = figure.suptitle("The three words nearest to each circled picture", fontsize=11)

# %% [markdown]
# ## Train
#
# One call embeds the visual prompts into a store on disk, drops concepts that the data do not show, trains the
# bottleneck (a 1 x 1 convolution), drops concepts that it cannot follow, and fits the sparse head. Every step is saved
# in `store_path`, so the same call reuses the results.
#
# Which layer should you use? Late layers are close to the decision, and early layers still encode what is where. The
# visual prompts are embedded only once, so trying several layers costs seconds. With `nonzeros_per_class=6`, each class
# uses six concepts on average.


# %%
def fit(layer: str) -> SALFCBM:
    return fit_salf_cbm(
        backbone,
        layer,
        (train.image, train.label),
        clip,
        data.concepts,
        len(data.classes),
        store_path="salf",
        prompt=prompt,
        class_names=data.classes,
        nonzeros_per_class=6,
        batch_size=60,
        prompt_batch_size=98,
    )


@torch.no_grad()
def accuracy(network: torch.nn.Module, scenes=test) -> float:
    return float((network(scenes.image).argmax(1) == scenes.label).float().mean())


models = {layer: fit(layer) for layer in ("layer2", "layer3", "layer4")}
print(f"the backbone's own head: held-out accuracy {accuracy(backbone):.2f}")
for layer, one in models.items():
    columns = [data.concepts.index(concept) for concept in one.concepts]
    present = test.presence[:, columns]
    special = concept_specificity(one.concept_maps(test.image), test.masks[:, columns])[present].nanmean()
    print(f"{layer}: accuracy {accuracy(one):.2f}, {len(columns)} concepts kept, specificity of the maps {special:.2f}")
for drop in models["layer4"].metadata["vocabulary"]["report"]["drops"]:
    print(f"dropped at layer4: {drop['concept']} ({drop['reason']})")

# %% [markdown]
# There is a trade-off between accuracy and localization. The last layer no longer encodes the backgrounds, which do not
# matter for the class, so those concepts are dropped because the bottleneck cannot follow them. We choose the middle
# layer.

# %%
model = models["layer3"]

# %% [markdown]
# ## Read: the rules of a class
#
# The head's weights are the rules. They apply to every image.

# %%
for name in data.classes:
    rules = ", ".join(f"{concept} {weight:+.2f}" for concept, weight in model.decision_rules(name, top_k=5))
    print(f"{name:15s} {rules}")

# %% [markdown]
# ## One decision: what, where and how much
#
# The contributions and the head's bias add up to the logit. Nothing else enters it.

# %% picture="salf_cbm" alt="Three scenes with the maps of the decisive concepts, and bars of their contributions"
right = model(test.image).argmax(1) == test.label
chosen = [int(torch.nonzero((test.label == c) & right)[0]) for c in (0, 3, 4)]
explanation = model.explain(test.image[chosen], top_k=None)
panel(
    explanation,
    test.image[chosen],
    rank_by="contributions",
    top_k=3,
    class_names=data.classes,
    image_names=[f"truth: {data.classes[test.label[i]]}" for i in chosen],
    title="What decided, where it was seen, and how much it counted",
    map_label="concept map",
)

# %%
with torch.no_grad():
    logits = model(test.image[chosen])
parts = model.contributions(test.image[chosen]).sum(1) + model.head.bias[logits.argmax(1)]
print("largest difference of logit and sum:", f"{(parts - logits.amax(1)).abs().max():.1e}")

# %% [markdown]
# ## Do the maps show where the objects are?
#
# The model was never trained on a mask. The scenes have exact ones, so we can measure it.

# %%
columns = [data.concepts.index(concept) for concept in model.concepts]
evaluate(
    {
        "SALF-CBM": model.concept_maps,
        "centre Gaussian": CenterGaussian(n_maps=len(columns)),
        "random": RandomMaps(n_maps=len(columns)),
    },
    [(test.image, test.masks[:, columns])],
    metrics=["nra", "concept_specificity"],
    n_bootstrap=300,
)

# %% [markdown]
# ## Ask about a region
#
# This is "Explain anything": you pass a point, a box or a mask, and the model returns what it saw *there*, strongest
# first, in standard deviations. It takes one forward pass and no click model.

# %%
i = int(torch.nonzero((test.objects[:, 1, 0] >= 0) & (test.objects[:, 2, 0] < 0))[2])
figure, axes = plt.subplots(1, 2, figsize=(7, 3.6), layout="constrained")
for each, k in zip(axes, (0, 1), strict=True):
    box = test.boxes[i, k]
    seen = model.explain_region(test.image[i : i + 1], boxes=box, top_k=3)
    x0, y0, x1, y1 = box.tolist()
    each.imshow(test.image[i].permute(1, 2, 0), extent=(0, 64, 64, 0))
    each.add_patch(plt.Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color="white", lw=2))
    words = ", ".join(f"{c} {s:+.1f}" for c, s in zip(seen.concepts, seen.scores[0], strict=True))
    each.set_title(f"seen in the box:\n{words}", fontsize=9)
    each.set_axis_off()
_ = figure.suptitle(f"in truth: {test.caption[i]}", fontsize=10)

# %% [markdown]
# ## Intervene
#
# What would the model have predicted if it had seen less of one concept in that region, and more of another? Take the
# first correctly classified "striped square", remove the stripes inside the object's box, and add red. The logits
# before and after come from one forward pass.

# %%
j = int(torch.nonzero((test.label == 3) & (model(test.image).argmax(1) == 3))[0])
image, box = test.image[j : j + 1], test.boxes[j, 0]
edits = [
    {"concept": "striped", "beta": -12.0, "boxes": box},
    {"concept": "red", "beta": 12.0, "boxes": box},
]
before, after = model.intervene(image, edits, units="std")
for name, logits in (("before", before), ("after", after)):
    probability = logits.softmax(1)[0]
    ranked = probability.argsort(descending=True)[:3].tolist()
    print(f"{name:7s}", ", ".join(f"{data.classes[k]} {probability[k]:.2f}" for k in ranked))

# %%
strengths = torch.linspace(0, 12, 13)
curves = []
for beta in strengths.tolist():
    edits = [
        {"concept": "striped", "beta": -beta, "boxes": box},
        {"concept": "red", "beta": beta, "boxes": box},
    ]
    curves.append(model.intervene(image, edits, units="std")[1].softmax(1)[0])
curves = torch.stack(curves)
figure, axes = plt.subplots(figsize=(6.4, 3), layout="constrained")
for k in curves.amax(0).argsort(descending=True)[:3].tolist():
    axes.plot(strengths, curves[:, k], label=data.classes[k])
axes.set(xlabel="stripes taken from the box, red added (standard deviations)", ylabel="probability", ylim=(-0.02, 1.02))
axes.legend(frameon=False)
axes.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# ## Repair: a wrong decision, its reason, an edit that stays
#
# `classifier-spurious` is the same network, trained on scenes in which the background predicts the class: nearly every
# dotted star is on wood. A bottleneck trained on such scenes inherits the shortcut. With `DenseRegions`, the VLM reads
# all cells from one pass per image, instead of one visual prompt per cell.

# %%
shortcut = CaptionedScenes(240, seed=61, size=64, spurious=0.95).stack()
spurious_backbone = demo.load("classifier-spurious")
leaning = fit_salf_cbm(
    spurious_backbone,
    "layer3",
    (shortcut.image, shortcut.label),
    clip,
    data.concepts,
    len(data.classes),
    store_path="salf-shortcut",
    prompt=DenseRegions((7, 7)),
    class_names=data.classes,
    nonzeros_per_class=6,
    batch_size=60,
)
alike = CaptionedScenes(300, seed=62, size=64, spurious=0.95).stack()
elsewhere = CaptionedScenes(300, seed=63, size=64).stack()
print(f"accuracy where the background reveals the class {accuracy(leaning, alike):.2f}", end=", ")
print(f"on any background {accuracy(leaning, elsewhere):.2f}")

# %% [markdown]
# **A wrong decision.** This dotted star is classified as something else because of its background (the code calls it
# "ground").

# %%
grounds = [name for name in data.concept_groups["ground"] if name in leaning.concepts]
star = data.classes.index("dotted star")
with torch.no_grad():
    called = leaning(elsewhere.image).argmax(1)
blamed = leaning.explain(elsewhere.image, top_k=1)
wrong = [
    i
    for i, one in enumerate(blamed)
    if elsewhere.label[i] == star and called[i] != star and one.concepts[0] in grounds and one.contributions > 0
]
i = wrong[0]
image, box = elsewhere.image[[i]], elsewhere.boxes[i, 0]
print("true caption:", elsewhere.caption[i])
print(leaning.explain(image, top_k=2))
print("in the star's box:", leaning.explain_region(image, boxes=box, top_k=4))
print("rule of dotted star:", [(concept, round(w, 1)) for concept, w in leaning.decision_rules("dotted star", top_k=3)])

# %% [markdown]
# **The region, and what is missing in it.** The model does see the star. But the star is not among the three strongest
# weights of its rule, which asks mainly for wood, and there is no wood around this star. We therefore add some
# everywhere except on the star itself, and the prediction becomes correct, for the wrong reason. This shows that the
# decision depends on the background.

# %%
around = 1 - elsewhere.object_masks[i, :1].float()
for beta in (0.0, 2.0, 4.0, 6.0):
    _, after = leaning.intervene(image, "wood", beta=beta, units="std", mask=around)
    probability = after.softmax(1)[0]
    print(f"wood {beta:+.0f} around the star: {data.classes[int(probability.argmax())]} {float(probability.max()):.2f}")

# %% [markdown]
# **An edit that stays.** `with_edits` returns a model with other rules: here the backgrounds have weight 0 for every
# class. Evaluate the edit on *other* images. Accuracy falls on the scenes in which the shortcut works, and rises on
# those in which it does not. Edits can remove a rule, but new rules must be learned from images. `refit_head` fits the
# rules again, without the backgrounds, to 120 scenes in which background and class are independent. Neither model can
# use more than the backbone's features contain.

# %%
edits = [{"target": name, "concept": ground, "weight": 0.0} for name in data.classes for ground in grounds]
repaired = leaning.with_edits(edits)
independent = CaptionedScenes(120, seed=64, size=64).stack()
taught = refit_head(leaning.without(grounds), independent.image, independent.label, nonzeros_per_class=6)
for name, one in {
    "as trained": leaning,
    "backgrounds removed": repaired,
    "rules refitted": taught,
    "the backbone itself": spurious_backbone,
}.items():
    print(f"{name:25s} shortcut holds: {accuracy(one, alike):.2f}   any background: {accuracy(one, elsewhere):.2f}")
print("saved with the model:", repaired.metadata["edits"][0])

# %% [markdown]
# You can also edit by hand instead of in code: `explore(leaning, elsewhere.image, labels=elsewhere.label.tolist())`
# shows the wrong predictions first, and writes the Python code of each edit.

# %% [markdown]
# ## What does a concept really stand for?
#
# The images with the highest activation show whether a concept's map follows its name.

# %%
top = model.most_activating(test.image, ["striped", "red"], k=4)
figure, axes = plt.subplots(2, 4, figsize=(6.4, 3.5), layout="constrained")
for row, (concept, found) in zip(axes, top.items(), strict=True):
    heat = model.explain(test.image[[k for k, _ in found]], concepts=concept).maps[:, 0]
    for each, (k, value), one in zip(row, found, heat, strict=True):
        each.imshow(overlay(test.image[k], one, signed=True).permute(1, 2, 0))
        each.set(xticks=[], yticks=[])
        each.set_title(f"{value:.1f}", fontsize=8)
    row[0].set_ylabel(concept)
_ = figure.suptitle("Highest activations (standard deviations), each map on its own scale", fontsize=10)

# %% [markdown]
# ## Save it, and explain a new image
#
# The model is saved as a folder with weights, a JSON file of settings and a model card, ready for the Hugging Face Hub.
# The backbone's weights are not stored, only a fingerprint of them. Loading with another backbone raises an error.

# %%
model.save_pretrained("show-and-tell")
again = SALFCBM.from_pretrained("show-and-tell", backbone=demo.load("classifier"))
new = CaptionedScenes(1, seed=2026, size=64).stack()
print("caption:", new.caption[0])
print(again.explain(new.image, top_k=4))

# %% [markdown]
# ## Remember
#
# - The model can only explain with the concepts in its list. To clean a list, see [own words](04_own_words.ipynb).
# - `nonzeros_per_class` trades accuracy for rules that fit on one line, and `head="dense"` shows what the bottleneck
#   itself costs.
# - An intervention edits maps, not the world. It shows what the decision depends on.
# - An edited rule (`with_edits`) stays. Test it on images that you did not look at while editing.
