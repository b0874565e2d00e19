# %% [markdown]
# # Bring your own model
#
# Class activation maps used to need a recipe per architecture: which layer, `reshape_transform` for transformers, a
# permutation for Swin. Here a layer is a name, and the rest is inferred. This works for torchvision, timm, open_clip
# and Hugging Face networks, for convolutions (`NCHW`, `NHWC`) and tokens, square or not.
#
# **No weights can be downloaded here, so the networks of the first part have random ones.** They show how a model is
# read, and their maps mean nothing. One argument loads trained weights: `weights="DEFAULT"` (torchvision) or
# `pretrained=True` (timm). The second part trains two small models of its own within seconds, a segmentation network
# and a one-channel detector.

# %%
# %matplotlib inline
import matplotlib.pyplot as plt
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from captum_concepts import FeatureActivationMap, SpatialACV, demo, fit_salf_cbm
from captum_concepts.activations.survey import suggest_layer, suggest_stages, survey_layers
from captum_concepts.datasets import CaptionedScenes
from captum_concepts.errors import LayerError
from captum_concepts.metrics import center_gaussian, nra
from captum_concepts.visualization import heatmap_figure, overlay
from captum_concepts.vlm import DenseRegions

_ = torch.manual_seed(0)

# %% [markdown]
# ## Which layers are there?
#
# `survey_layers` runs one image and lists every layer with a grid. `suggest_layer` returns the last one whose positions
# reach the output, and `suggest_stages` returns up to four from fine to coarse. The command line offers the same:
# `python -m captum_concepts models --help`.

# %%
photo = torch.rand(1, 3, 224, 224)
networks = {
    "torchvision resnet18": torchvision.models.resnet18(weights=None),
    "torchvision mobilenet_v3_small": torchvision.models.mobilenet_v3_small(weights=None),
    "timm vit_tiny_patch16_224": timm.create_model("vit_tiny_patch16_224", pretrained=False),
    "timm swin_tiny_patch4_window7_224": timm.create_model("swin_tiny_patch4_window7_224", pretrained=False),
    "timm convnext_atto": timm.create_model("convnext_atto", pretrained=False),
}
suggested = {}
for name, model in networks.items():
    model.eval()
    suggested[name] = suggest_layer(model, photo)
    found = {layer.name: layer for layer in survey_layers(model, photo)}[suggested[name]]
    print(f"{name:34s} {found.name:12s} {found.channels:4d} channels, {found.layout}")

# %% [markdown]
# ## Explain them, all with one line
#
# Without references of your own, the outputs are the references. With unit vectors, the dot product and gradient
# weights, FAM is Grad-CAM without its ReLU, up to a constant factor.

# %%
for name, model in networks.items():
    fam = FeatureActivationMap(model, suggested[name], torch.eye(1000), similarity="dot", weights="gradient")
    print(f"{name:34s} {tuple(fam.attribute(photo, target=3).shape)}")

# %% [markdown]
# ## A layer that cannot be explained raises an error
#
# This vision transformer reads its class token only, so the patches of the last block do not reach the output. A map of
# that layer would be all zeros. Other tools draw it; here an error names the layer to use.

# %%
vit = networks["timm vit_tiny_patch16_224"]
try:
    FeatureActivationMap(vit, "blocks.11", torch.eye(1000), similarity="dot").attribute(photo, target=3)
except LayerError as error:
    print(error)

# %% [markdown]
# Images need not be square, and the model need not be a `torch.nn.Module`. Any callable works, with the layer passed as
# a module.

# %%
resnet = networks["torchvision resnet18"]
wide = torch.rand(2, 3, 160, 288)
double = FeatureActivationMap(lambda x: 2 * resnet(x), resnet.layer4, torch.eye(1000), similarity="dot")
print(tuple(double.attribute(wide, target=[1, 7]).shape), suggest_stages(resnet, wide))

# %% [markdown]
# ## A segmentation network
#
# A segmentation network returns an image of scores, not a vector. An explanation needs one number per image, which you
# define by your question. Here a small network segments striped objects, and the question is what increases the *area*
# that it labels striped.

# %%
data = CaptionedScenes(300, seed=61, size=64)
scenes = data.stack()
striped = scenes.masks[:, data.concepts.index("striped")].float()


class Segmenter(nn.Module):
    """Four convolutions; scores (N, h, w) at half the resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 24, 5, stride=2, padding=2), nn.BatchNorm2d(24), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(24, 32, 5, padding=2), nn.BatchNorm2d(32), nn.ReLU())
        self.last = nn.Sequential(nn.Conv2d(32, 32, 5, padding=2), nn.BatchNorm2d(32), nn.ReLU())
        self.head = nn.Conv2d(32, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.last(self.body(self.stem(x))))[:, 0]


segmenter = Segmenter()
optimizer = torch.optim.AdamW(segmenter.parameters(), lr=5e-3)
small = F.interpolate(striped[:, None], (32, 32), mode="area")[:, 0]
for _step in range(200):
    rows = torch.randint(0, 240, (16,))
    loss = F.binary_cross_entropy_with_logits(segmenter(scenes.image[rows]), small[rows], pos_weight=torch.tensor(4.0))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
segmenter.eval()
with torch.no_grad():
    said = segmenter(scenes.image[240:]) > 0
truth = small[240:] > 0.5
print(f"held-out IoU {(said & truth).sum() / (said | truth).sum():.2f}")


# %%
def area(images: torch.Tensor) -> torch.Tensor:
    """(N,): fraction of each image classified as striped (soft, so that it has a gradient)."""
    return segmenter(images).sigmoid().mean((1, 2))


def inside(word: str, most: int = 24) -> torch.Tensor:
    """Images of this texture alone: patches from inside objects, mirrored until they fill 64 pixels."""
    found = []
    parts = scenes.image, scenes.objects, scenes.boxes, scenes.object_masks
    for image, things, boxes, masks in zip(*parts, strict=True):
        for words, (x0, y0, x1, y1), mask in zip(things.tolist(), boxes.tolist(), masks, strict=True):
            dx, dy = (x1 - x0) / 4, (y1 - y0) / 4
            inner = slice(round(y0 + dy), round(y1 - dy) + 1), slice(round(x0 + dx), round(x1 - dx) + 1)
            if data.concepts.index(word) in words and mask[inner].all():
                patch = image[(slice(None), *inner)]
                while min(patch.shape[1:]) < 64:
                    patch = torch.cat([patch, patch.flip(1)], 1)
                    patch = torch.cat([patch, patch.flip(2)], 2)
                found.append(patch[:, :64, :64])
    return torch.stack(found[:most])


textures = {word: inside(word) for word in data.concept_groups["texture"]}
acv = SpatialACV(area, segmenter.body).fit(textures, n_random=20)
scores = acv.tcav(scenes.image[240:])
for word, sign, p in zip(acv.concepts, scores["sign_count"], acv.p_values_, strict=True):
    print(f"{word:10s} p {p:.0e}   increasing it enlarges the striped area in {sign:.0%} of the images")

# %% [markdown]
# Save the fitted vectors and use them on a new image, as in the other tutorials. A plain function has no fingerprint of
# its own, so the layer is passed again on loading.

# %%
acv.save("segmenter_textures.safetensors")
again = SpatialACV.load("segmenter_textures.safetensors", area, segmenter.body)
new = CaptionedScenes(1, seed=2027, size=64).stack()
k = again.concepts.index("striped")
contribution = again.attribute(new.image)[0, k]
print("caption:", new.caption[0])
heatmap_figure(
    new.image[0], contribution, width=2.6, title="more stripes here would enlarge the area", label="contribution"
)

# %% [markdown]
# ## A medical-like model: one channel, not square, one logit
#
# The images are grayscale "scans" of 96 x 64 pixels, half of them with a small bright spot among bright bars. The
# network has one output. FAM explains it with a single reference, the number 1.


# %%
def scans(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images (n, 1, 96, 64), whether there is a spot (n,), and its mask (n, 96, 64)."""
    rng = torch.Generator().manual_seed(seed)
    noise = F.interpolate(torch.rand(n, 1, 12, 8, generator=rng), (96, 64), mode="bicubic").clamp(0, 1)
    y, x = torch.meshgrid(torch.arange(96.0), torch.arange(64.0), indexing="ij")
    bars = ((y[None] + 20 * torch.rand(n, 1, 1, generator=rng)) % 20 < 4).float()
    cy, cx = 10 + 76 * torch.rand(n, 1, 1, generator=rng), 10 + 44 * torch.rand(n, 1, 1, generator=rng)
    spot = ((y - cy) ** 2 + (x - cx) ** 2 < 36) & (torch.arange(n) % 2 == 1)[:, None, None]
    image = 0.4 * noise[:, 0] + 0.3 * bars + 0.35 * spot.float() + 0.05 * torch.randn(n, 96, 64, generator=rng)
    return image[:, None], (torch.arange(n) % 2).float(), spot


detector = nn.Sequential(
    nn.Sequential(nn.Conv2d(1, 16, 5, stride=2, padding=2), nn.BatchNorm2d(16), nn.ReLU()),
    nn.Sequential(nn.Conv2d(16, 32, 5, stride=2, padding=2), nn.BatchNorm2d(32), nn.ReLU()),
    nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
    nn.AdaptiveMaxPool2d(1),
    nn.Flatten(),
    nn.Linear(32, 1),
)
images, sick, _ = scans(600, seed=0)
optimizer = torch.optim.AdamW(detector.parameters(), lr=3e-3)
for _step in range(120):
    rows = torch.randint(0, len(images), (32,))
    loss = F.binary_cross_entropy_with_logits(detector(images[rows])[:, 0], sick[rows])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
detector.eval()
test, label, spot = scans(100, seed=1)
with torch.no_grad():
    print(f"held out: {((detector(test)[:, 0] > 0) == (label == 1)).float().mean():.0%} correct")

# %%
fam = FeatureActivationMap(
    detector, "2", torch.ones(1, 1), reference_names=["spot"], similarity="dot", normalize="none"
)
positive = torch.nonzero(label == 1).flatten()
maps = fam.attribute(test[positive], target="spot")
found = nra(maps, spot[positive]).mean()
blind = nra(center_gaussian(len(positive), (96, 64)), spot[positive]).mean()
print(f"NRA {found:.2f}; centre Gaussian {blind:.2f}")

# %%
high = float(maps[:4].abs().max())
figure, axes = plt.subplots(1, 9, figsize=(10, 2.4), layout="constrained", width_ratios=[1] * 8 + [0.1])
for k in range(4):
    image = test[positive[k]]
    axes[2 * k].imshow(image[0], cmap="gray")
    axes[2 * k].set_title("scan", fontsize=9)
    axes[2 * k + 1].imshow(overlay(image.clamp(0, 1), maps[k, 0], signed=True, vmin=-high, vmax=high).permute(1, 2, 0))
    axes[2 * k + 1].set_title("spot?", fontsize=9)
for each in axes[:-1]:
    each.set_axis_off()
_ = figure.colorbar(plt.cm.ScalarMappable(plt.Normalize(-high, high), "RdBu_r"), cax=axes[-1], label="contribution")

# %% [markdown]
# ## One channel, four channels, and several labels at once
#
# A concept bottleneck needs two views of an image: the backbone's, with as many channels as your sensor has, and the
# encoder's, which is RGB. `encoder_transform` computes the second from the stored image; without it, a single channel
# is repeated. Labels `(N, L)` of 0 and 1 specify which classes an image has, so it may have none or several, and each
# class gets its own head. Here the backbone is the bundled classifier with a wider or narrower first layer, and the
# classes are shapes.


# %%
def backbone(channels: int) -> nn.Module:
    """The bundled classifier for another number of channels; yours was trained on them."""
    network = demo.load("classifier")
    first = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    weight = network.conv1.weight.detach()
    first.weight = nn.Parameter(weight.sum(1, keepdim=True) if channels == 1 else F.pad(weight, (0, 0, 0, 0, 0, 1)))
    network.conv1 = first
    return network.eval()


data = CaptionedScenes(300, seed=12, size=64)
scenes = data.stack()
shapes = ["circle", "square", "triangle", "star"]
labels = scenes.presence[:, [data.concepts.index(shape) for shape in shapes]].float()
infrared = scenes.image.mean(1, keepdim=True)  # stands for a fourth band
inputs = {1: infrared, 4: torch.cat([scenes.image, infrared], 1)}
for channels, images in inputs.items():
    model = fit_salf_cbm(
        backbone(channels),
        "layer4",
        (images[:240], labels[:240]),
        demo.load("clip"),
        data.concepts,
        len(shapes),
        store_path=f"salf-{channels}",
        val_data=(images[240:], labels[240:]),
        class_names=shapes,
        prompt=DenseRegions(7),
        encoder_transform=None if channels == 1 else lambda stored: stored[:, :3],
    )
    print(f"{channels} channels, {model.metadata['accuracy']['validation']:.0%} of all decisions correct on new scenes")
    print("  star:", ", ".join(f"{concept} {weight:+.2f}" for concept, weight in model.decision_rules("star", 3)))
    print(" ", model.trust)

# %% [markdown]
# ## Remember
#
# - `layer` is a module or a dotted name. `layout=` and `prefix_tokens=` are for the rare layer that can be read in two
#   ways, and the error that reports it shows both.
# - The model is unchanged afterwards: mode, hooks, `requires_grad`, gradients.
# - Anything that returns one number, or a row of numbers, per image can be explained.
