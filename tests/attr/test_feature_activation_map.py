"""FeatureActivationMap against the paper's formula written out, on every pooling, head and similarity."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from captum_concepts import FeatureActivationMap, published
from captum_concepts.errors import ArtifactError, InputError, InputWarning, LayerError, NotFittedError, TargetError


class GeM(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clamp_min(1e-6).pow(3).mean((2, 3)).pow(1 / 3)


class Pool(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) if self.kind == "gap" else x.amax((2, 3))


class AttentionPool(nn.Module):
    """CLIP's: the mean as a query over all positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(channels, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return self.attention(tokens.mean(1, keepdim=True), tokens, tokens, need_weights=False)[0][:, 0]


CHANNELS, WIDTH, N, K = 6, 5, 3, 4
POOLS = {
    "gap": lambda: Pool("gap"),
    "gmp": lambda: Pool("gmp"),
    "gem": GeM,
    "attention": lambda: AttentionPool(CHANNELS),
}
HEADS = {
    "identity": nn.Identity,
    "linear": lambda: nn.Linear(CHANNELS, WIDTH, bias=False),
    "mlp": lambda: nn.Sequential(nn.Linear(CHANNELS, 8), nn.Tanh(), nn.Linear(8, WIDTH)),
}


def make(pool: str, head: str) -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, CHANNELS, 3, stride=2), nn.ReLU())
    net = nn.Sequential(body, POOLS[pool](), HEADS[head]()).eval().double()
    images = torch.randn(N, 3, 11, 15, dtype=torch.double)
    references = torch.randn(K, CHANNELS if head == "identity" else WIDTH, dtype=torch.double)
    return net, images, references


def paper_map(
    net: nn.Sequential, image: Tensor, reference: Tensor, similarity: str, normalize: str, weights: str
) -> Tensor:
    """One image, one reference, channel by channel: sections 3.1 and 3.2 of the paper and DESIGN section 3.

    The pooled z is made a free input of the head; for pools that are not the mean its derivative with respect to the
    maps is taken position by position.
    """
    body, pool, head = net
    activations = body(image[None]).detach()
    embedding = head(pool(activations))[0].detach()

    def score(maps: Tensor) -> Tensor:
        f = head(pool(maps))[0]
        if similarity == "cosine":
            return (f * reference).sum() / (embedding.norm() * reference.norm())  # norms held constant
        if similarity == "dot":
            return (f * reference).sum()
        if similarity == "euclidean":
            return -(f - reference).square().sum()
        return torch.exp(-(f - reference).abs().sum())

    slope = torch.autograd.functional.jacobian(score, activations)[0]
    contributions, slopes = [], []
    for k in range(activations.shape[1]):
        total, summed = 0.0, 0.0
        for i in range(activations.shape[2]):
            for j in range(activations.shape[3]):
                total += activations[0, k, i, j].item() * slope[k, i, j].item()
                summed += slope[k, i, j].item()
        contributions.append(total)
        slopes.append(summed)
    if similarity == "euclidean" and isinstance(head, nn.Identity) and not isinstance(pool, AttentionPool):
        contributions = [-((embedding[k] - reference[k]).item() ** 2) for k in range(len(embedding))]
    if weights == "gradient":
        chosen = slopes
    elif normalize == "minmax":
        low, high = min(contributions), max(contributions)
        chosen = [(c - low) / (high - low) for c in contributions]
    elif normalize == "l1":
        chosen = [c / sum(abs(d) for d in contributions) for c in contributions]
    else:
        chosen = contributions
    return sum(w * activations[0, k] for k, w in enumerate(chosen))


def l1_kernel(f: Tensor, r: Tensor) -> Tensor:
    return torch.exp(-(f - r).abs().sum(1))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean", l1_kernel])
@pytest.mark.parametrize(
    ("normalize", "weights"),
    [("minmax", "contribution"), ("l1", "contribution"), ("none", "contribution"), ("minmax", "gradient")],
)
def test_equals_the_papers_formula(pool, head, similarity, normalize, weights):
    net, images, references = make(pool, head)
    fam = FeatureActivationMap(net, net[0], references, similarity=similarity, normalize=normalize, weights=weights)
    target = [2, 0, 3]
    result = fam.attribute(images, target=target)
    assert result.shape == (N, 1, 5, 7)
    assert not result.requires_grad
    assert result.is_contiguous()
    name = similarity if isinstance(similarity, str) else "callable"
    for n in range(N):
        expected = paper_map(net, images[n], references[target[n]], name, normalize, weights)
        torch.testing.assert_close(result[n, 0], expected, rtol=1e-5, atol=1e-7)


def test_published_settings_are_equations_one_to_five_of_the_paper():
    """Written out in numpy for a network that ends in global average pooling."""
    net, images, references = make("gap", "identity")
    fam = FeatureActivationMap(net, net[0], references, **published.FEATURE_ACTIVATION_MAP)
    result, maps = fam.attribute(images, target=1)[:, 0].numpy(), net[0](images).detach().numpy()
    r = references[1].numpy()
    for n in range(N):
        z = np.array([a.sum() / a.size for a in maps[n]])
        share = np.array([z[k] * r[k] / (math.sqrt((z**2).sum()) * math.sqrt((r**2).sum())) for k in range(CHANNELS)])
        weight = (share - share.min()) / (share.max() - share.min())
        expected = sum(weight[k] * maps[n, k] for k in range(CHANNELS))
        assert result[n] == pytest.approx(expected, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("head", ["identity", "linear"])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_gradient_weights_are_complete(head, similarity):
    """Mean pooling and a linear head: the mean of the map is the similarity itself."""
    net, images, references = make("gap", head)
    fam = FeatureActivationMap(net, net[0], references, similarity=similarity, weights="gradient")
    scores = fam.scores(images)
    for k in range(K):
        means = fam.attribute(images, target=k).mean((1, 2, 3))
        torch.testing.assert_close(means, scores[:, k], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("pool", ["gap", "gmp", "gem"])
@pytest.mark.parametrize("head", ["identity", "linear"])
def test_contributions_sum_to_the_cosine_for_homogeneous_pools(pool, head):
    net, images, references = make(pool, head)
    fam = FeatureActivationMap(net, net[0], references, normalize="none")
    # With one-hot maps in the place of A_k the map would be c_k; here: solve the map for its weights.
    maps = net[0](images).detach().flatten(2)
    result = fam.attribute(images, target=1).flatten(1)
    weights = torch.stack([torch.linalg.lstsq(maps[n].T, result[n]).solution for n in range(N)])
    torch.testing.assert_close(weights.sum(1), fam.scores(images)[:, 1], rtol=1e-6, atol=1e-8)


NORMS = {
    "F.normalize": lambda f: F.normalize(f, dim=1),
    "f / f.norm()": lambda f: f / f.norm(dim=1, keepdim=True),
    "100 * F.normalize": lambda f: 100 * F.normalize(f, dim=1),
    "F.normalize * 1.0": lambda f: F.normalize(f, dim=1) * 1.0,
    "twice": lambda f: F.normalize(F.normalize(f, dim=1), dim=1),
    "rsqrt": lambda f: f * torch.rsqrt((f * f).sum(1, keepdim=True)),
    "f * (1 / f.norm())": lambda f: f * (1 / f.norm(dim=1, keepdim=True)),
    "torch.linalg": lambda f: torch.div(f, torch.linalg.vector_norm(f, dim=1, keepdim=True)),
    "einsum": lambda f: torch.einsum("nd,n->nd", f, f.pow(2).sum(1).pow(-0.5)),
    "in place": lambda f: f.clone().div_(f.norm(dim=1, keepdim=True)),
    "transposed": lambda f: (f.T / f.T.norm(dim=0)).T,
    "norm detached": lambda f: f / f.detach().norm(dim=1, keepdim=True),
}


class Normalized(nn.Module):
    def __init__(self, net: nn.Module, norm) -> None:
        super().__init__()
        self.net, self.norm = net, norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.net(x))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("head", HEADS)
def test_the_cosine_does_not_depend_on_how_the_model_divides_by_its_norm(norm, pool, head):
    """The length is constant wherever it is divided out; the reference is the formula on the embedding before."""
    net, images, references = make(pool, head)
    inside = Normalized(net, NORMS[norm])
    for options in ({"normalize": "none"}, {"weights": "gradient"}):
        fam = FeatureActivationMap(inside, net[0], references, **options)
        result = fam.attribute(images, target=2)
        for n in range(N):
            one = {"normalize": "minmax", "weights": "contribution", **options}
            expected = paper_map(net, images[n], references[2], "cosine", one["normalize"], one["weights"])
            torch.testing.assert_close(result[n, 0], expected, rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(fam.attribute(images[n : n + 1], target=2), result[n : n + 1])


@pytest.mark.parametrize("similarity", ["dot", "euclidean"])
@pytest.mark.parametrize("norm", [name for name in NORMS if name != "100 * F.normalize"])
def test_a_norm_that_the_model_makes_constant_is_held_for_other_similarities(similarity, norm):
    net, images, references = make("gem", "linear")
    options = {"similarity": similarity, "normalize": "none"}
    result = FeatureActivationMap(Normalized(net, NORMS[norm]), net[0], references, **options).attribute(images, 1)
    held = Normalized(net, NORMS["norm detached"])
    torch.testing.assert_close(result, FeatureActivationMap(held, net[0], references, **options).attribute(images, 1))


def test_a_length_that_the_model_computes_counts_for_the_dot_product():
    net, images, references = make("gem", "linear")
    squared = Normalized(net, lambda f: f * f.norm(dim=1, keepdim=True))
    result = FeatureActivationMap(squared, net[0], references, similarity="dot", normalize="none").attribute(images, 1)
    maps = net[0](images).detach().requires_grad_()
    f = net[2](net[1](maps))
    slope = torch.autograd.grad((f * f.norm(dim=1, keepdim=True) @ references[1]).sum(), maps)[0]
    expected = torch.einsum("nk,nkhw->nhw", (slope * maps).sum((2, 3)), maps).detach()
    torch.testing.assert_close(result[:, 0], expected)


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="needs torch 2.6")
@pytest.mark.parametrize("norm", ["F.normalize", "rsqrt", "100 * F.normalize"])
def test_compiled_models_give_the_same_map(norm):
    net, images, references = make("gap", "mlp")
    compiled = torch.compile(Normalized(net, NORMS[norm]), backend="eager")
    compiled(images)
    plain = FeatureActivationMap(net, net[0], references, normalize="none").attribute(images, target=2)
    result = FeatureActivationMap(compiled, net[0], references, normalize="none").attribute(images, target=2)
    torch.testing.assert_close(result, plain, rtol=1e-6, atol=1e-9)


def test_a_norm_that_cannot_be_observed_is_said_so():
    class Opaque(torch.autograd.Function):
        """Linear layer and norm in one piece of foreign code."""

        @staticmethod
        def forward(ctx, z, weight):
            f = z @ weight.T
            ctx.save_for_backward(f, weight)
            return F.normalize(f, dim=1)

        @staticmethod
        def backward(ctx, grad):
            f, weight = ctx.saved_tensors
            unit, length = F.normalize(f, dim=1), f.norm(dim=1, keepdim=True)
            return (grad - (grad * unit).sum(1, keepdim=True) * unit) / length @ weight, None

    net, images, references = make("gap", "linear")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return Opaque.apply(self.net[1](self.net[0](x)), self.net[2].weight)

    with pytest.warns(InputWarning, match="before normalization"):
        FeatureActivationMap(Model(), net[0], references).attribute(images, target=2)


def test_no_backward_pass_where_the_embedding_is_the_pooled_map(monkeypatch):
    net, images, references = make("gap", "identity")
    fam = FeatureActivationMap(net, net[0], references)

    def forbidden(*_args, **_kwargs):
        raise RuntimeError("a backward pass was made")

    monkeypatch.setattr(torch.autograd, "grad", forbidden)
    fam.attribute(images)
    with pytest.raises(RuntimeError, match="backward pass"):
        FeatureActivationMap(make("gmp", "identity")[0], "0", references).attribute(images)


def test_backward_never_enters_the_backbone_below_the_layer():
    class Wall(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("entered the backbone")

    class Front(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Wall.apply(x)

    net, images, references = make("gmp", "mlp")
    whole = nn.Sequential(nn.Conv2d(3, 3, 1).double(), Front(), net)
    fam = FeatureActivationMap(whole, net[0], references)
    assert fam.attribute(images.requires_grad_(), target=0).abs().sum() > 0


def test_target_none_explains_the_best_match_and_pairs_are_possible():
    net, images, references = make("gap", "mlp")
    fam = FeatureActivationMap(net, "0", references, reference_names=["a", "b", "c", "d"])
    best = fam.scores(images).argmax(1)
    assert torch.equal(fam.attribute(images), fam.attribute(images, target=best))
    pairs = fam.attribute(images, target=torch.arange(N))
    for n in range(N):
        torch.testing.assert_close(pairs[n : n + 1], fam.attribute(images[n : n + 1], target=n))
    assert torch.equal(fam.attribute(images, target="c"), fam.attribute(images, target=2))


def test_scores_equal_torch_functions():
    net, images, references = make("gap", "linear")
    f = net(images).detach()
    cosine = F.cosine_similarity(f[:, None], references[None], dim=2)
    torch.testing.assert_close(FeatureActivationMap(net, "0", references).scores(images), cosine)
    euclidean = FeatureActivationMap(net, "0", references, similarity="euclidean").scores(images)
    torch.testing.assert_close(euclidean, -torch.cdist(f, references).square())
    called = FeatureActivationMap(net, "0", references, similarity=l1_kernel).scores(images)
    torch.testing.assert_close(called[:, 1], l1_kernel(f, references[1].expand_as(f)))


@pytest.mark.parametrize("head", HEADS)
def test_results_do_not_depend_on_the_batch(head):
    net, images, references = make("gap", head)
    fam = FeatureActivationMap(net, "0", references)
    whole = fam.attribute(images)
    for n in range(N):
        torch.testing.assert_close(fam.attribute(images[n : n + 1])[0], whole[n], rtol=1e-9, atol=1e-12)


def test_explain_selects_for_each_image():
    net, images, references = make("gap", "linear")
    names = ["ant", "bee", "cat", "dog"]
    fam = FeatureActivationMap(net, "0", references, reference_names=names)
    assert fam.concepts == names
    everything = fam.explain(images, top_k=None)
    order = [names.index(name) for name in everything.concepts]
    torch.testing.assert_close(everything.scores, fam.scores(images)[:, order])
    torch.testing.assert_close(everything.maps, fam.concept_maps(images, everything.concepts))
    torch.testing.assert_close(everything["cat"].maps, fam.attribute(images, target="cat"))
    assert torch.equal(everything.target, fam.scores(images).argmax(1))
    assert (everything.layer, everything.method, everything.score_unit) == ("0", "Feature Activation Map", "cosine")
    two = fam.explain(images, target="bee", top_k=2)
    assert two.target.tolist() == [1, 1, 1]
    for n, one in enumerate(two):
        alone = fam.explain(images[n : n + 1], target="bee", top_k=2)
        assert one.concepts == alone.concepts == [names[k] for k in fam.scores(images)[n].argsort(descending=True)[:2]]
        torch.testing.assert_close(one.maps, alone.maps)
    assert fam.explain(images, concepts=["dog", 0]).concepts == ["dog", "ant"]
    assert FeatureActivationMap(net, "0", references).explain(images[:1], concepts=[3]).concepts == ["3"]


def test_explain_over_many_references_computes_the_maps_of_those_shown(monkeypatch):
    net, images, _ = make("gem", "linear")
    fam = FeatureActivationMap(net, "0", torch.randn(1000, WIDTH, dtype=torch.double))
    calls = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **more: calls.append(1) or grad(*args, **more))
    explanation = fam.explain(images, top_k=2)
    assert len(calls) == 2
    assert explanation.selected.sum(1).tolist() == [2, 2, 2]


def test_results_do_not_depend_on_the_batch_size():
    net, images, references = make("gem", "mlp")
    many = torch.cat([images, images + 1, images - 1])
    sizes = []
    handle = net.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    whole, small = (FeatureActivationMap(net, "0", references, batch_size=size) for size in (32, 2))
    torch.testing.assert_close(small.attribute(many), whole.attribute(many))
    torch.testing.assert_close(small.scores(many), whole.scores(many))
    target = [0, 1, 2, 3, 0, 1, 2, 3, 0]
    torch.testing.assert_close(small.attribute(many, target=target), whole.attribute(many, target=target))
    one, other = small.explain(many, top_k=1), whole.explain(many, top_k=1)
    assert one.concepts == other.concepts
    torch.testing.assert_close(one.maps, other.maps, equal_nan=True)
    sizes.clear()
    small.explain(many)
    assert max(sizes) == 2
    handle.remove()


def test_fit_takes_class_means_in_sorted_order():
    net, images, _ = make("gap", "linear")
    many = torch.cat([images, images + 1, images - 1])
    labels = ["dog", "ant", "dog", "bee", "ant", "dog", "bee", "ant", "ant"]
    embeddings = net(many).detach()
    expected = torch.stack(
        [embeddings[[i for i, name in enumerate(labels) if name == c]].mean(0) for c in ("ant", "bee", "dog")]
    )
    fam = FeatureActivationMap(net, "0", batch_size=4)
    assert fam.fit(many, labels) is fam
    assert fam.concepts == ["ant", "bee", "dog"]
    torch.testing.assert_close(fam.references, expected)
    assert not fam.references.requires_grad
    numbers = torch.tensor([{"ant": 0, "bee": 1, "dog": 2}[name] for name in labels])
    hot = F.one_hot(numbers)
    dataset = TensorDataset(many, numbers)
    shuffled = DataLoader(dataset, batch_size=5, shuffle=True, drop_last=True)
    sources = [(many, numbers), (many, list(numbers)), (many, numbers[:, None]), (many, hot), (dataset, None)]
    sources += [(DataLoader(dataset, batch_size=5), None), (shuffled, None), ((many, numbers), None)]
    for data, given in sources:
        torch.testing.assert_close(fam.fit(data, given).references, expected)
        assert fam.concepts == ["0", "1", "2"]


def test_labels_that_are_other_numbers_are_no_targets():
    """Labels 1 to 3: as a target, 1 is the second of them."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), Pool("gap"))
    images, labels = torch.rand(6, 3, 8, 8), torch.tensor([1, 2, 3, 1, 2, 3])
    fam = FeatureActivationMap(net, "0")
    with pytest.warns(InputWarning, match="but not 0 to 2: 1, 2, 3.*target=0 is label 1; pass names"):
        fam.fit(images, labels)
    assert fam.reference_names == ["1", "2", "3"]
    for counted in (labels - 1, ["a", "b", "c"] * 2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fam.fit(images, counted)


def test_further_arguments_are_cut_with_the_images():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool = nn.Conv2d(3, 4, 3), Pool("gap")

        def forward(self, x: Tensor, extra: dict[str, Any], pair: list[Tensor]) -> Tensor:
            return self.pool(self.conv(x) * extra["scale"][:, None, None, None] * pair[0][:, None, None, None])

    images, scale = torch.rand(5, 3, 8, 8), torch.rand(5) + 0.5
    extra = ({"scale": scale, "size": 8}, [scale, torch.rand(2)])
    fam = FeatureActivationMap(Scaled(), "conv", torch.eye(4), similarity="dot")
    expected = fam.attribute(images, 1, additional_forward_args=extra)
    fam.batch_size = 2
    torch.testing.assert_close(fam.attribute(images, 1, additional_forward_args=extra), expected)


def test_inputs_that_belong_to_all_images_are_not_cut():
    """A table of other than N rows, or of one number, beside the images."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool = nn.Conv2d(3, 4, 3), Pool("gap")

        def forward(self, table: Tensor, x: Tensor, scale: Tensor) -> Tensor:
            return self.pool(self.conv(x) + table.sum(0)[:, None, None]) * scale

    inputs = torch.rand(6, 4), torch.rand(5, 3, 8, 8), torch.tensor(2.0)
    fam = FeatureActivationMap(Shifted(), "conv", torch.eye(4), similarity="dot")
    expected = fam.scores(inputs), fam.attribute(inputs, 1)
    fam.batch_size = 3
    torch.testing.assert_close((fam.scores(inputs), fam.attribute(inputs, 1)), expected)


def test_statistics_of_the_batch_are_warned_of():
    for norm, warns in (
        (nn.BatchNorm2d(4, track_running_stats=False), True), (nn.BatchNorm2d(4), False), (nn.InstanceNorm2d(4), False)
    ):  # fmt: skip
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            net = nn.Sequential(nn.Conv2d(3, 4, 3), norm, Pool("gap")).eval()
            FeatureActivationMap(net, "0", torch.eye(4)).attribute(torch.rand(2, 3, 8, 8), 1)
        assert any("'1' is a batch norm without running statistics" in str(w.message) for w in seen) == warns


def test_a_model_of_inference_mode_is_named():
    with torch.inference_mode():
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))
    x = torch.rand(2, 3, 8, 8)
    with pytest.raises(InputError, match=r"created under torch\.inference_mode\(\).*copy\.deepcopy\(model\)"):
        FeatureActivationMap(net, "1", torch.eye(4)).attribute(x, 1)
    assert FeatureActivationMap(copy.deepcopy(net), "1", torch.eye(4)).attribute(x, 1).shape == (2, 1, 6, 6)


def test_fit_reads_class_folders(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), Pool("gap")).eval()
    pixels = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    for name, one in zip(("cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png"), pixels, strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(one.permute(1, 2, 0).numpy()).save(tmp_path / name)
    fam = FeatureActivationMap(net, "0").fit(tmp_path, image_size=8)
    assert fam.concepts == ["cat", "dog"]
    torch.testing.assert_close(fam.references, net(pixels / 255).detach().unflatten(0, (2, 2)).mean(1))


def test_calibrated_presence_is_the_rate_of_the_class(tmp_path):
    net, images, _ = make("gap", "linear")
    torch.manual_seed(0)
    centers = torch.randn(3, 3, 11, 15, dtype=torch.double)
    labels = torch.arange(60) % 3
    many = centers[labels] + 0.8 * torch.randn(60, 3, 11, 15, dtype=torch.double)
    fam = FeatureActivationMap(net, "0").fit(many[:30], labels[:30])
    assert fam.explain(images).presence is None
    assert "not calibrated" in repr(fam)
    fam.calibrate(many[:30], labels[:30])
    assert "calibrated" in repr(fam)
    presence = fam.explain(many[30:], concepts=[0, 1, 2]).presence
    truth = F.one_hot(labels[30:], 3)
    brier = (presence - truth).square().mean()
    assert brier < 0.8 * (torch.full_like(presence, 1 / 3) - truth).square().mean()
    again = FeatureActivationMap.load(fam.save(tmp_path / "fam.safetensors"), net)
    torch.testing.assert_close(again.explain(many[30:], concepts=[0, 1, 2]).presence, presence)


def test_saved_and_loaded_maps_are_bit_identical(tmp_path):
    net, images, references = make("gap", "mlp")
    options = {"similarity": "euclidean", "normalize": "l1", "batch_size": 2}
    fam = FeatureActivationMap(net, net[0], references, reference_names=["a", "b", "c", "d"], **options)
    path = fam.save(tmp_path / "fam.safetensors")
    for layer in (None, "0", net[0]):
        again = FeatureActivationMap.load(path, net, layer)
        assert torch.equal(again.attribute(images), fam.attribute(images))
        assert (again.concepts, again.batch_size, again.similarity) == (fam.concepts, 2, "euclidean")
    with pytest.raises(ArtifactError, match=r"layer .0., not .0\.0."):
        FeatureActivationMap.load(path, net, "0.0")
    with pytest.raises(ArtifactError, match="another model"):
        FeatureActivationMap.load(path, make("gap", "linear")[0])
    with pytest.raises(NotFittedError, match="no references to save"):
        FeatureActivationMap(net, "0").save(path)
    with pytest.raises(InputError, match="function cannot be saved"):
        FeatureActivationMap(net, "0", references, similarity=l1_kernel).save(path)


def test_vit_patches_and_prefix_tokens():
    """Contributions of a ViT's patches: gradient times activation through the rest of the network."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=48, num_classes=0, depth=3, reg_tokens=2).eval()
    images, references = torch.rand(2, 3, 48, 48), torch.randn(2, 192)
    fam = FeatureActivationMap(vit, "blocks.1", references, normalize="none")
    result = fam.attribute(images, target=1)
    assert result.shape == (2, 1, 3, 3)
    kept = {}
    handle = vit.blocks[1].register_forward_hook(lambda m, i, o: kept.update(a=o))
    f = vit(images)
    handle.remove()
    value = (f * references[1]).sum(1) / (f.detach().norm(dim=1) * references[1].norm())
    tokens = kept["a"]
    slope = torch.autograd.grad(value.sum(), tokens)[0][:, 3:]
    weights = (slope * tokens[:, 3:]).sum(1)
    expected = (tokens[:, 3:] * weights[:, None]).sum(2).reshape(2, 1, 3, 3)
    torch.testing.assert_close(result, expected.detach(), rtol=1e-4, atol=1e-5)
    with pytest.raises(LayerError, match=r"use layer 'blocks.1' instead"):
        FeatureActivationMap(vit, "blocks.2", references).attribute(images, target=1)


class Halved(nn.Module):
    """Poolings whose rules FAM tells apart by their values, which half precision rounds."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.Tanh())
        self.project, self.look = nn.Linear(8, 8), nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def head(self, a: Tensor, hold: bool = False) -> Tensor:
        """``hold``: with the norm held, as FAM's formula says."""
        z = a.mean((2, 3))  # of no use to some
        kind = self.kind.removesuffix(".float")
        if kind == "max":
            z = a.amax((2, 3))
        elif kind == "attention":  # nearly a mean
            z = (a.flatten(2) * self.look(a).flatten(2).softmax(-1)).sum(-1)
        elif kind == "normalized":
            z = self.project(z)
        z = z.float() if self.kind.endswith(".float") and z.dtype != torch.float64 else z
        if kind == "normalized":
            length = z.norm(dim=1, keepdim=True)
            z = z / (length.detach() if hold else length)
        return z


@pytest.mark.parametrize("similarity", ["dot", "euclidean"])
@pytest.mark.parametrize(
    "kind", ["mean", "mean.float", "max", "max.float", "attention", "normalized", "normalized.float"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "autocast"])
def test_half_precision_follows_the_same_rules(dtype, kind, similarity):
    """Against double precision with the same rounded weights, images and references."""
    torch.manual_seed(0)
    net = Halved(kind).eval()
    images, references = torch.rand(6, 3, 32, 32), F.normalize(torch.randn(3, 8))
    if dtype == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            found = FeatureActivationMap(net, "body", references, similarity=similarity, normalize="none").attribute(
                images, target=1
            )
    else:
        net, images, references = net.to(dtype), images.to(dtype), references.to(dtype)
        fam = FeatureActivationMap(net, "body", references, similarity=similarity, normalize="none")
        found = fam.attribute(images, target=1)
    net, r = copy.deepcopy(net).double(), references.double()[1]
    maps = net.body(images.double()).detach().requires_grad_()
    f = net.head(maps, hold=True)
    if similarity == "euclidean" and kind.startswith(("mean", "max")):
        weights = -(f - r).square()
    else:
        value = (f @ r).sum() if similarity == "dot" else -(f - r).square().sum()
        weights = (torch.autograd.grad(value, maps)[0] * maps).sum((2, 3))
    expected = torch.einsum("nc,nchw->nhw", weights, maps).detach()
    error = (found[:, 0].double() - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    # A few roundings of each number, whose weights partly cancel: a wrong rule is off by .5 and more.
    assert error.max() < 16 * torch.finfo(torch.bfloat16 if dtype == "autocast" else dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pair", [(0, 1), (1, 2), (2, 5), (6, 7)])
def test_two_dimensions_that_mix_are_not_channelwise(pair, dtype):
    """Whatever random signs they happen to have."""

    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Conv2d(3, 8, 3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            z = self.body(x).mean((2, 3))
            own = z.clone()
            own[:, pair[0]] = z[:, pair[1]] + 0.5 * z[:, pair[0]]
            return own

    torch.manual_seed(0)
    net = Mixing().eval().to(dtype)
    images, references = torch.rand(3, 3, 32, 32).to(dtype), torch.rand(2, 8).to(dtype)
    fam = FeatureActivationMap(net, "body", references, similarity="euclidean", normalize="none")
    found = fam.attribute(images, target=1).double()
    net, r = net.double(), references.double()[1]
    maps = net.body(images.double()).detach().requires_grad_()
    z = maps.mean((2, 3))
    f = z.clone()
    f[:, pair[0]] = z[:, pair[1]] + 0.5 * z[:, pair[0]]
    weights = (torch.autograd.grad(-(f - r).square().sum(), maps)[0] * maps).sum((2, 3))
    expected = torch.einsum("nc,nchw->nhw", weights, maps)[:, None].detach()
    assert (found - expected).norm() < 16 * torch.finfo(dtype).eps * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(dtype):
    net, images, references = make("gap", "linear")
    exact = FeatureActivationMap(net, "0", references).attribute(images, target=0).float()
    half = FeatureActivationMap(net.to(dtype), "0", references.to(dtype)).attribute(images.to(dtype), target=0)
    assert half.dtype == torch.float32
    assert (half - exact).abs().max() < 0.05 * exact.abs().max()


def test_a_saturated_model_gives_a_warned_zero_gradient_not_an_error():
    class Saturated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return (1e6 * self.conv(x).mean((2, 3))).softmax(1)

    torch.manual_seed(0)
    fam = FeatureActivationMap(Saturated(), "conv", torch.eye(4), weights="gradient")
    with pytest.warns(UserWarning, match="zero for every example"):
        assert not fam.attribute(torch.rand(1, 3, 4, 4)).any()


def test_equal_contributions_get_weight_one():
    net = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False), Pool("gap"))
    nn.init.ones_(net[0].weight)
    images = torch.rand(1, 3, 4, 4)
    fam = FeatureActivationMap(net, "0", torch.ones(1, 2))
    torch.testing.assert_close(fam.attribute(images)[0, 0], 2 * images[0].sum(0))


def test_constructor_arguments_are_attributes():
    references = torch.rand(2, 3)
    net = nn.Sequential(nn.Conv2d(3, 3, 1), Pool("gap"))
    fam = FeatureActivationMap(
        net,
        "0",
        references,
        reference_names=["a", "b"],
        similarity="dot",
        normalize="l1",
        weights="gradient",
        layout="NCHW",
        prefix_tokens=0,
        batch_size=7,
    )
    assert fam.forward_func is net
    assert fam.layer == "0"
    assert fam.references is references
    assert (fam.reference_names, fam.similarity, fam.normalize) == (["a", "b"], "dot", "l1")
    assert (fam.weights, fam.layout, fam.prefix_tokens) == ("gradient", "NCHW", 0)
    assert fam.batch_size == 7


class TestBadInput:
    net = make("gap", "linear")[0].float()
    images = torch.rand(2, 3, 11, 15)
    bank = torch.rand(4, WIDTH)

    def fam(self, **options) -> FeatureActivationMap:
        return FeatureActivationMap(
            self.net, options.pop("layer", "0"), options.pop("references", self.bank), **options
        )

    def test_no_references(self):
        with pytest.raises(NotFittedError, match="call fit"):
            self.fam(references=None).attribute(self.images)

    def test_wrong_width(self):
        with pytest.raises(InputError, match=r"width 7.*width 5"):
            self.fam(references=torch.rand(4, 7)).attribute(self.images)

    @pytest.mark.parametrize("bad", [torch.rand(5), torch.ones(2, 5, dtype=torch.long), [1.0]])
    def test_wrong_kind_of_references(self, bad):
        with pytest.raises(InputError, match=r"\(K, D\)"):
            self.fam(references=bad).attribute(self.images)

    def test_empty_nan_and_zero_references(self):
        with pytest.raises(InputError, match="references is empty"):
            self.fam(references=torch.rand(0, 5)).attribute(self.images)
        with pytest.raises(InputError, match=r"NaN.*rows \[1\]"):
            self.fam(references=torch.tensor([[1.0] * 5, [math.nan] * 5])).attribute(self.images)
        with pytest.raises(InputError, match=r"rows \[0\] are all zero"):
            self.fam(references=torch.zeros(1, 5)).attribute(self.images)
        assert self.fam(references=torch.zeros(1, 5), similarity="euclidean").attribute(self.images).isfinite().all()

    @pytest.mark.parametrize("target", [4, -5, [0], [0, 9], 1.5, "bee", torch.rand(2), (0, 1), [True, False]])
    def test_targets(self, target):
        with pytest.raises(TargetError, match="target"):
            self.fam(reference_names=["a", "b", "c", "d"]).attribute(self.images, target=target)

    def test_layers(self):
        with pytest.raises(LayerError, match=r"no layer .*Did you mean .*0\.0"):
            self.fam(layer="0.2").attribute(self.images)
        with pytest.raises(LayerError, match="did not run"):
            self.fam(layer=nn.ReLU()).attribute(self.images)
        with pytest.raises(LayerError, match="not a grid"):
            self.fam(layer="1").attribute(self.images)

    def test_images(self):
        with pytest.raises(InputError, match="contain no example"):
            self.fam().attribute(self.images[:0])
        with pytest.raises(InputError, match="/ 255"):
            self.fam().attribute((self.images * 255).to(torch.uint8))
        broken = self.images.clone()
        broken[0, 0, 0, 0] = math.nan
        with pytest.warns(UserWarning, match="NaN"):
            assert self.fam().attribute(broken, target=0)[1].isfinite().all()

    def test_an_embedding_that_is_none(self):
        with pytest.raises(InputError, match="one embedding per image"):
            FeatureActivationMap(self.net[0], "0", self.bank).attribute(self.images)

    @pytest.mark.parametrize(
        "options",
        [
            {"similarity": "cos"}, {"normalize": "max"}, {"weights": "grad"}, {"batch_size": 0},
        ],
    )  # fmt: skip
    def test_options(self, options):
        with pytest.raises(InputError, match=next(iter(options))):
            self.fam(**options)

    @pytest.mark.parametrize("names", [["a"], ["a", "a", "b", "c"], "abcd"])
    def test_names(self, names):
        with pytest.raises(InputError, match="reference"):
            self.fam(reference_names=names)

    def test_similarity_functions(self):
        with pytest.raises(InputError, match="one value per pair"):
            self.fam(similarity=lambda f, r: f * r).attribute(self.images)
        with pytest.raises(InputError, match="differentiable"):
            self.fam(similarity=lambda f, r: r.sum(1)).attribute(self.images, target=0)

    def test_fit(self):
        with pytest.raises(InputError, match="labels are missing"):
            self.fam().fit(self.images)
        with pytest.raises(InputError, match="3 labels for 2 images"):
            self.fam().fit(self.images, [0, 1, 2])
        with pytest.raises(InputError, match="no image"):
            self.fam().fit([], [])
        with pytest.raises(InputError, match="nan"):
            self.fam().fit(self.images, [0.0, math.nan])
        with pytest.raises(InputError, match="multi-hot"):
            self.fam().fit(self.images, torch.ones(2, 3))
        loader = DataLoader(self.images, shuffle=True)
        with pytest.raises(InputError, match="shuffle=True"):
            self.fam().fit(loader, [0, 1])

    def test_no_batch_dimension(self):
        fam = self.fam()
        for call in (fam.attribute, fam.scores, fam.explain, fam.concept_maps):
            with pytest.raises(InputError, match=r"no batch dimension.*image\[None\]"):
                call(self.images[0])
        with pytest.raises(InputError, match=r"no batch dimension.*image\[None\]"):
            fam.fit(self.images[0], [0])

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"top_k": -1}, "top_k"), ({"top_k": 0}, "top_k"), ({"top_k": True}, "top_k"), ({"concepts": ["x"]}, "'x'"),
            ({"concepts": []}, "no concept"), ({"rank_by": "contributions"}, "rank_by"),
        ],
    )  # fmt: skip
    def test_explain(self, options, message):
        with pytest.raises(InputError, match=message):
            self.fam().explain(self.images, **options)


def test_without_a_gradient_the_map_is_zero_as_the_warning_says():
    """Not the mean activation, which equal contributions stand for."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3), nn.Threshold(99, 0))
    with pytest.warns(InputWarning, match="the maps are zero too"):
        maps = FeatureActivationMap(net, "0", torch.eye(3), similarity="dot").attribute(
            torch.rand(2, 3, 8, 8), target=0
        )
    assert maps.count_nonzero() == 0


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
def test_an_embedding_that_is_nan_leaves_other_maps_alone(similarity):
    """A black image of a network without biases: its length of 0 is divided by."""

    class Normalized(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Conv2d(3, 6, 3, bias=False), nn.Linear(6, 5, bias=False)

        def forward(self, x):
            z = self.head(self.body(x).relu().mean((2, 3)))
            return z / z.norm(dim=1, keepdim=True)

    torch.manual_seed(0)
    fam = FeatureActivationMap(Normalized(), "body", torch.randn(4, 5), similarity=similarity)
    x = torch.rand(4, 3, 12, 12)
    x[3] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InputWarning)  # of the black image
        together = fam.attribute(x, target=1)
    torch.testing.assert_close(together[:3], fam.attribute(x[:3], target=1))
