"""ConceptFusionMap against the published procedure written as plain loops."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from captum.attr import NoiseTunnel
from test_concept_fusion_fit import fit
from torch import nn

from captum_concepts import published
from captum_concepts.attr.concept_fusion_map import ConceptFusionMap
from captum_concepts.errors import InputError, InputWarning, LayerError, NotFittedError, TargetError
from captum_concepts.images import inputs_for
from captum_concepts.models import ConceptTranslator

CONCEPTS = ["stripes", "grass", "red", "dog", "sky"]
K = 6


class Residual(nn.Module):
    """A small residual classifier, with in-place ReLU, whose ``conv2`` lies beside a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, 2, 1), nn.BatchNorm2d(12), nn.ReLU(inplace=True))
        self.conv1 = nn.Conv2d(12, 16, 3, 2, 1)
        self.conv2 = nn.Conv2d(16, 16, 3, 1, 1)
        self.relu = nn.ReLU(inplace=True)
        self.last = nn.Sequential(nn.Conv2d(16, 24, 3, 1, 1), nn.ReLU(inplace=True))
        self.fc = nn.Linear(24, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(self.stem(x))
        return self.fc(self.last(self.relu(x + self.conv2(x))).mean((2, 3)) * 3)


class Dense(nn.Module):
    """Concatenates the input of a layer to its output, so that a batch cannot grow inside the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.grow = nn.Conv2d(8, 8, 3, 1, 1)
        self.fc = nn.Linear(16, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        return self.fc(torch.cat([x, self.grow(x).relu()], 1).mean((2, 3)) * 3)


def make_vit() -> nn.Module:
    return timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2, num_classes=7)


CASES = {
    "cnn": (Residual, ["stem", "conv2", "last"], [12, 16, 24]),
    "dense": (Dense, ["stem", "grow"], [8, 8]),
    "vit": (make_vit, ["blocks.0", "norm"], [24, 24]),
}


def build(case: str, **options) -> ConceptFusionMap:
    torch.manual_seed(0)
    make, layers, channels = CASES[case]
    model = make().eval()
    translator = ConceptTranslator(channels, 10, hidden=(20, 16))
    for p in translator.parameters():
        p.data.mul_(3)
    text = torch.randn(len(CONCEPTS), 10)
    options = {"n_channels": K, "logit_scale": 5.0, **options}
    return ConceptFusionMap(model, layers, translator, CONCEPTS, text, **options)


def images(n: int = 3) -> torch.Tensor:
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def colorful(n: int = 6) -> torch.Tensor:
    """Images whose leading concepts differ."""
    return images(n) * 6 * torch.rand(n, 3, 1, 1, generator=torch.Generator().manual_seed(2)) ** 2


class Reference:
    """The published procedure for ONE image, as plain loops: nothing is batched, expanded or updated."""

    def __init__(self, cefam: ConceptFusionMap, x: torch.Tensor, fill: str = "layer_mean") -> None:
        self.c, self.x, self.fill = cefam, x, fill
        self.model, self.names = cefam.forward_func, list(cefam.layers)
        self.modules = [self.model.get_submodule(n) for n in self.names]
        self.text = F.normalize(cefam.text_embeddings, dim=1)

    def run(self, ablate: tuple[int, list[int], torch.Tensor] | None = None):
        kept = {}

        def hook(index):
            def change(module, args, out):
                if ablate is not None and ablate[0] == index:
                    out = out.clone()
                    for k in ablate[1]:
                        if out.ndim == 4:
                            out[:, k] = ablate[2][k]
                        else:
                            out[:, :, k] = ablate[2][k]
                kept[index] = out
                return out.clone()

            return change

        handles = [m.register_forward_hook(hook(i)) for i, m in enumerate(self.modules)]
        try:
            logits = self.model(self.x)
        finally:
            for h in handles:
                h.remove()
        return logits, [kept[i] for i in range(len(self.modules))]

    @staticmethod
    def as_maps(raw: torch.Tensor) -> torch.Tensor:
        return raw if raw.ndim == 4 else raw[:, 1:].transpose(1, 2).reshape(len(raw), -1, 4, 4)

    def similarity(self, z: list[torch.Tensor]) -> torch.Tensor:
        h = self.c.translator(z)
        return self.c.logit_scale * F.normalize(h, dim=1) @ self.text.T + (self.c.logit_bias or 0)

    def probability(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.sigmoid() if self.c.link == "sigmoid" else logits.softmax(1)

    def beta(self, t: int) -> list[torch.Tensor]:
        _, raws = self.run()
        if self.c.gradient == "branch":
            z = [self.as_maps(r).mean((2, 3)).detach().requires_grad_() for r in raws]
            grads = torch.autograd.grad(self.similarity(z)[0, t], z)
            return [g[0] / self.as_maps(r)[0, 0].numel() for g, r in zip(grads, raws, strict=True)]
        z = [self.as_maps(r).mean((2, 3)) for r in raws]
        grads = torch.autograd.grad(self.similarity(z)[0, t], raws)
        return [self.as_maps(g).mean((2, 3))[0] for g in grads]

    def pooled(self) -> list[torch.Tensor]:
        return [self.as_maps(r).mean((2, 3)).detach() for r in self.run()[1]]

    def ranking(self, t: int, layer: int) -> list[int]:
        values = self.beta(t)[layer] * self.pooled()[layer][0]
        return values.argsort(descending=True, stable=True)[:K].tolist()

    def relevance(self, t: int) -> list[float]:
        z = self.pooled()
        s0 = self.probability(self.similarity(z))[0, t]
        out = []
        for layer in range(len(z)):
            drops = []
            order = self.ranking(t, layer)
            for i in range(1, len(order) + 1):
                masked = [v.clone() for v in z]
                masked[layer][0, order[:i]] = z[layer].mean()
                drops.append((s0 - self.probability(self.similarity(masked))[0, t]) / s0)
            out.append(torch.stack(drops).mean().item())
        return out

    def map(self, t: int, layer: int) -> torch.Tensor:
        activation = self.as_maps(self.run()[1][layer])[0].detach()
        total = torch.zeros_like(activation[0])
        for k, weight in enumerate(self.beta(t)[layer]):
            total = total + weight * activation[k]
        return total.relu()

    def curve(self, t: int, layer: int, target: int) -> list[float]:
        z = self.pooled()[layer][0]
        value = {"layer_mean": z.mean().expand(len(z)), "channel_mean": z, "zero": z * 0}[self.fill]
        p0 = self.run()[0].softmax(1)[0, target]
        order = self.ranking(t, layer)
        curve = [0.0]
        for i in range(1, len(order) + 1):
            p = self.run((layer, order[:i], value))[0].softmax(1)[0, target]
            curve.append(((p0 - p) / p0).item())
        return curve


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("gradient", ["total", "branch"])
@pytest.mark.parametrize("probability", ["softmax", "sigmoid"])
def test_fast_equals_reference(case, gradient, probability):
    bias = -1.0 if probability == "sigmoid" else 0.0
    cefam = build(case, gradient=gradient, link=probability, logit_bias=bias)
    x = images()
    relevance, scores = cefam.layer_relevance(x), cefam.scores(x)
    value, curve = cefam.contributions(x, target=[1, 2, 3], return_curve=True)
    by_layer = [build(case, gradient=gradient, map_layer=i).attribute(x) for i in range(len(cefam.layers))]
    auto = cefam.attribute(x)
    for n in range(len(x)):
        ref = Reference(cefam, x[n : n + 1])
        torch.testing.assert_close(scores[n], ref.probability(ref.similarity(ref.pooled()))[0].detach())
        for t in range(len(CONCEPTS)):
            expected = torch.tensor(ref.relevance(t))
            torch.testing.assert_close(relevance[n, t], expected, atol=1e-4, rtol=1e-4)
            for layer, maps in enumerate(by_layer):
                torch.testing.assert_close(maps[n, t], ref.map(t, layer), atol=1e-4, rtol=1e-4)
            best = int(expected.argmax())
            chosen = F.interpolate(ref.map(t, best)[None, None], auto.shape[2:], mode="bilinear")[0, 0]
            torch.testing.assert_close(auto[n, t], chosen, atol=1e-4, rtol=1e-4)
            expected_curve = torch.tensor(ref.curve(t, best, n + 1))
            torch.testing.assert_close(curve[n, t], expected_curve, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(value[n, t], expected_curve[1:].mean(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_the_published_settings_are_the_published_loop(case):
    cefam, x = build(case, **{**published.CONCEPT_FUSION_MAP, "n_channels": K}), images(2)
    close = {"atol": 1e-5, "rtol": 1e-5}
    scores, relevance, maps = cefam.scores(x), cefam.layer_relevance(x), cefam.attribute(x)
    value = cefam.contributions(x, target=[1, 2])
    for n in range(2):
        ref = Reference(cefam, x[n : n + 1])
        torch.testing.assert_close(scores[n], ref.probability(ref.similarity(ref.pooled()))[0].detach(), **close)
        for t in range(len(CONCEPTS)):
            expected = torch.tensor(ref.relevance(t))
            torch.testing.assert_close(relevance[n, t], expected, **close)
            best = int(expected.argmax())
            chosen = F.interpolate(ref.map(t, best)[None, None], maps.shape[2:], mode="bilinear")[0, 0]
            torch.testing.assert_close(maps[n, t], chosen, **close)
            torch.testing.assert_close(value[n, t], torch.tensor(ref.curve(t, best, n + 1))[1:].mean(), **close)


@pytest.mark.parametrize("fill", ["layer_mean", "channel_mean", "zero"])
@pytest.mark.parametrize(("case", "layer"), [("cnn", 1), ("cnn", 0), ("dense", 1), ("vit", 0), ("vit", 1)])
def test_every_fill_at_every_kind_of_layer(case, layer, fill):
    cefam = build(case, map_layer=layer, fill=fill)
    x = images(2)
    _, curve = cefam.contributions(x, target=4, return_curve=True)
    for n in range(2):
        ref = Reference(cefam, x[n : n + 1], fill)
        for t in range(len(CONCEPTS)):
            torch.testing.assert_close(curve[n, t], torch.tensor(ref.curve(t, layer, 4)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layer", ["auto", "fused"])
def test_results_do_not_depend_on_batch_or_chunk(case, layer):
    x = images(4)
    whole = build(case, map_layer=layer)
    e = whole.explain(x, target=2, concepts=CONCEPTS)
    for other, parts in ((build(case, map_layer=layer, batch_size=1), [x]), (whole, x.split(1))):
        part = [other.explain(p, target=2, concepts=CONCEPTS) for p in parts]
        for name in ("scores", "maps", "contributions"):
            got = torch.cat([getattr(q, name) for q in part])
            torch.testing.assert_close(got, getattr(e, name), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layer", ["auto", "fused", 0])
@pytest.mark.parametrize("gradient", ["total", "branch"])
def test_more_concepts_than_dimensions(case, layer, gradient):
    many = build(case, map_layer=layer, gradient=gradient)
    names = [f"c{i}" for i in range(25)]
    text = torch.randn(25, 10, generator=torch.Generator().manual_seed(3))
    made = ConceptFusionMap(many.forward_func, many.layers, many.translator, names, text, map_layer=layer,
                            gradient=gradient, n_channels=K)  # fmt: skip
    x = images(2)
    alone = torch.cat([made.attribute(x, target=t) for t in range(25)], 1)
    torch.testing.assert_close(made.attribute(x), alone, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_total_equals_branch_at_the_last_layer(case):
    x = images(2)
    # Dense: its last layer is not behind the first, but nothing read by the translator is behind it.
    torch.testing.assert_close(
        build(case, map_layer=-1).attribute(x),
        build(case, map_layer=-1, gradient="branch").attribute(x),
        atol=1e-6,
        rtol=1e-4,
    )


def test_total_differs_from_branch_before():
    x = images(2)
    assert not torch.allclose(
        build("cnn", map_layer=0).attribute(x), build("cnn", map_layer=0, gradient="branch").attribute(x)
    )


def test_targets_by_name_index_list_and_tensor():
    cefam, x = build("cnn"), images(2)
    all_maps = cefam.attribute(x)
    assert all_maps.shape == (2, 5, 16, 16)
    for target in (2, "red", torch.tensor(2), [2, "red"], torch.tensor([2, 2]), (2,)):
        torch.testing.assert_close(cefam.attribute(x, target=target), all_maps[:, 2:3], atol=1e-6, rtol=1e-4)
    mixed = cefam.attribute(x, target=["dog", 0])
    torch.testing.assert_close(mixed[0], all_maps[0, 3:4], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(mixed[1], all_maps[1, 0:1], atol=1e-6, rtol=1e-4)
    for bad in (9, "rd", 1.5, [0], torch.tensor([[0, 1]])):
        with pytest.raises(TargetError):
            cefam.attribute(x, target=bad)
        with pytest.raises(AssertionError):
            cefam.attribute(x, target=bad)


def test_works_inside_noise_tunnel():
    cefam, x = build("cnn"), images(2)
    torch.manual_seed(0)
    out = NoiseTunnel(cefam).attribute(x, nt_samples=3, stdevs=1e-6, target=1)
    torch.testing.assert_close(out, cefam.attribute(x, target=1), atol=1e-3, rtol=1e-2)
    assert cefam.get_name()


@pytest.mark.parametrize("case", CASES)
def test_leaves_no_trace_and_runs_in_any_mode(case):
    cefam, x = build(case), images(2)
    model = cefam.forward_func
    expected = cefam.explain(x, target=1)
    model.requires_grad_(False)
    model.train()
    cefam.translator.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    with torch.no_grad():
        first = cefam.explain(x, target=1)
    with torch.inference_mode():
        second = cefam.explain(x, target=1)
    for e in (first, second):
        torch.testing.assert_close(e.maps, expected.maps, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(e.contributions, expected.contributions, atol=1e-5, rtol=1e-4)
    assert model.training
    assert all(m.training for m in model.modules())
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert torch.equal(state, torch.get_rng_state())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    out = cefam.attribute(x)
    assert not out.requires_grad
    assert out.is_contiguous()
    with pytest.raises(TargetError):
        cefam.contributions(x, target=99)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_any_translator_gives_the_same_relevance():
    cefam, x = build("cnn"), images(2)
    inner = cefam.translator

    class Wrapped(nn.Module):
        def forward(self, pooled):
            return inner(pooled)

    other = ConceptFusionMap(cefam.forward_func, cefam.layers, Wrapped(), CONCEPTS, cefam.text_embeddings,
                             logit_scale=5.0, n_channels=K)  # fmt: skip
    torch.testing.assert_close(other.layer_relevance(x), cefam.layer_relevance(x), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(other.attribute(x), cefam.attribute(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("layer", ["auto", "fused", 1])
@pytest.mark.parametrize("rank_by", ["scores", "contributions"])
def test_explain_gives_each_image_its_own_concepts(layer, rank_by):
    cefam, x = build("cnn", map_layer=layer), colorful()
    e = cefam.explain(x, top_k=2, rank_by=rank_by)
    scores, maps, contributions = cefam.scores(x), cefam.concept_maps(x), cefam.contributions(x)
    torch.testing.assert_close(e.target, cefam.forward_func(x).argmax(1))
    torch.testing.assert_close(e.target_probability, cefam.forward_func(x).softmax(1).amax(1))
    columns = [CONCEPTS.index(c) for c in e.concepts]
    torch.testing.assert_close(e.scores, scores[:, columns])
    assert (e.selected.sum(1) == 2).all()
    ranking = scores if rank_by == "scores" else contributions.abs()
    best = cefam.layer_relevance(x).argmax(-1)
    for n in range(6):
        wanted = [CONCEPTS[t] for t in ranking[n].topk(2).indices.tolist()]
        one = e[n]
        assert one.concepts == wanted
        own = [CONCEPTS.index(c) for c in wanted]
        torch.testing.assert_close(one.maps[0], maps[n, own])
        torch.testing.assert_close(one.contributions[0], contributions[n, own])
        alone = cefam.explain(x[n : n + 1], top_k=2, rank_by=rank_by)
        assert alone.concepts == wanted
        torch.testing.assert_close(alone.maps, one.maps, atol=1e-4, rtol=1e-4)
        if layer == "auto":
            assert one.layer == (tuple(cefam.layers[best[n, t]] for t in own),)
    assert e.maps[~e.selected].isnan().all()
    assert e.contributions[~e.selected].isnan().all()
    assert (e.score_unit, e.contribution_unit != "") == ("probability", True)


def test_explain_costs_the_concepts_of_each_image(monkeypatch):
    """Not the union of those of the batch."""
    from captum_concepts.attr.concept_fusion import gradients

    asked = []
    derive = gradients.ConceptPass._derive

    def counted(self, cotangents, *more):
        asked.append(tuple(cotangents.shape[:2]))
        return derive(self, cotangents, *more)

    monkeypatch.setattr(gradients.ConceptPass, "_derive", counted)
    cefam = fit(map_layer="fused")
    colors = torch.eye(3).repeat(2, 1)[:, :, None, None] * 0.8 + 0.1 * torch.rand(6, 3, 16, 16)
    e = cefam.explain(colors, top_k=1, contributions=False)
    assert len(e.concepts) == 3
    assert asked == [(6, 1)]
    assert e.contributions is None


def test_named_concepts_are_the_same_for_every_image():
    cefam, x = build("cnn"), images(3)
    e = cefam.explain(x, concepts=["sky", 1])
    assert e.concepts == ["sky", "grass"]
    assert e.selected.all()
    torch.testing.assert_close(e.maps, cefam.concept_maps(x, ["sky", "grass"]))
    torch.testing.assert_close(e.contributions, cefam.contributions(x, concepts=[4, "grass"]))
    assert len(cefam.explain(x, top_k=None).concepts) == len(CONCEPTS)
    for bad in ({"top_k": -1}, {"top_k": 0}, {"rank_by": "score"}, {"concepts": ["sea"]}, {"concepts": []},
                {"rank_by": "contributions", "contributions": False}):  # fmt: skip
        with pytest.raises(InputError):
            cefam.explain(x, **bad)


def test_additional_arguments_are_cut_with_the_examples():
    torch.manual_seed(0)
    inner = build("cnn")

    def model(x, gain):
        return inner.forward_func(x * gain[:, None, None, None])

    x, gain = images(3), torch.tensor([1.0, 0.5, 2.0])
    layers = [inner.forward_func.get_submodule(n) for n in inner.layers]
    cefam = ConceptFusionMap(model, layers, inner.translator, CONCEPTS, inner.text_embeddings, logit_scale=5.0,
                             n_channels=K, batch_size=2)  # fmt: skip
    direct = inner.explain(x * gain[:, None, None, None], target=1, concepts=CONCEPTS)
    e = cefam.explain(x, target=1, concepts=CONCEPTS, additional_forward_args=gain)
    torch.testing.assert_close(e.maps, direct.maps, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(e.contributions, direct.contributions, atol=1e-5, rtol=1e-4)


def test_contribution_of_a_single_output_uses_its_sigmoid():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 1))
    cefam = ConceptFusionMap(net, ["1"], ConceptTranslator([6], 4, hidden=(8, 8)), ["a", "b"], torch.eye(4)[:2])
    value, curve = cefam.contributions(images(2), return_curve=True)
    assert value.abs().max() > 0
    assert curve.shape == (2, 2, 21)
    # Six channels: the curve stays where it is behind them, and the mean runs over six.
    torch.testing.assert_close(curve[..., 6:], curve[..., 6:7].expand(-1, -1, 15))
    torch.testing.assert_close(value, curve[..., 1:7].mean(-1))


def test_a_planted_negative_contribution():
    # The class is lowered by exactly the channel that carries the concept.
    net = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    net[0].weight.data = torch.eye(3)[:, :, None, None]
    net[3].weight.data, net[3].bias.data = torch.tensor([[-4.0, 0, 0], [0, 0, 0]]), torch.zeros(2)

    class Copy(nn.Module):
        def forward(self, pooled):
            return pooled[0]

    x = torch.rand(2, 3, 8, 8) * torch.tensor([1.0, 0.2, 0.3])[None, :, None, None]
    cefam = ConceptFusionMap(net, ["0"], Copy(), ["red", "green"], torch.eye(3)[:2], n_channels=1)
    red, green = cefam.contributions(x, target=0).T
    assert (red < -0.1).all()
    torch.testing.assert_close(green, torch.zeros_like(green), atol=1e-5, rtol=0)
    assert (cefam.contributions(x, target=1)[:, 0] > 0.05).all()


def test_a_layer_the_output_does_not_depend_on_is_refused():
    class Side(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.side, self.fc = nn.Conv2d(3, 5, 3), nn.Conv2d(3, 4, 3), nn.Linear(5, 2)

        def forward(self, x):
            self.side(x)
            return self.fc(self.a(x).mean((2, 3)))

    translator = ConceptTranslator([5, 4], 6, hidden=(8, 8))
    cefam = ConceptFusionMap(Side(), ["a", "side"], translator, ["x", "y"], torch.eye(6)[:2], map_layer=1)
    assert cefam.attribute(images(1)).shape == (1, 2, 30, 30)  # parallel paths are fine for regions
    with pytest.raises(LayerError, match="side"):
        cefam.contributions(images(1))


def test_single_concept_under_a_softmax():
    cefam = build("cnn")
    with pytest.warns(InputWarning, match="always 1"):
        one = ConceptFusionMap(cefam.forward_func, cefam.layers, cefam.translator, ["red"], torch.randn(1, 10))
    x = images(2)
    assert torch.equal(one.scores(x), torch.ones(2, 1))
    assert torch.equal(one.layer_relevance(x), torch.zeros(2, 1, 3))
    last = ConceptFusionMap(
        cefam.forward_func, cefam.layers, cefam.translator, ["red"], one.text_embeddings, map_layer=2, link="sigmoid"
    )
    assert one.explain(x).layer == (("last",), ("last",))
    expected = F.interpolate(last.attribute(x), (16, 16), mode="bilinear")
    torch.testing.assert_close(one.attribute(x), expected)


def test_bad_arguments_are_refused():
    cefam = build("cnn")
    model, layers, translator, text = cefam.forward_func, cefam.layers, cefam.translator, cefam.text_embeddings

    def make(**changes):
        given = {"layers": layers, "concepts": CONCEPTS, "text_embeddings": text, **changes}
        return ConceptFusionMap(model, given.pop("layers"), translator, given.pop("concepts"),
                                given.pop("text_embeddings"), **given)  # fmt: skip

    for changes, words in (
        ({"concepts": []}, "empty"),
        ({"concepts": [*CONCEPTS[:4], "stripes"]}, "once"),
        ({"concepts": "stripes"}, "list"),
        ({"concepts": CONCEPTS[:3]}, "3"),
        ({"concepts": None}, "without concepts"),
        ({"text_embeddings": None}, "NoneType"),
        ({"text_embeddings": text[:, :7]}, "width 7"),
        ({"text_embeddings": text * torch.tensor([[0.0]] + [[1.0]] * 4)}, "zero"),
        ({"layers": []}, "non-empty"),
        ({"layers": "stem"}, r"\['stem'\]"),
        ({"layers": ["stem", "stem", "last"]}, "twice"),
        ({"map_layer": 3}, "map_layer"),
        ({"map_layer": "fc"}, "'auto', 'fused', or an index"),
        ({"link": "relu"}, "link"),
        ({"gradient": "brnach"}, "branch"),
        ({"fill": "noise"}, "fill"),
        ({"class_probability": "logits"}, "class_probability"),
        ({"n_channels": 0}, "n_channels"),
        ({"channel_share": 0.0}, "channel_share"),
        ({"channel_share": 1.5}, "channel_share"),
        ({"batch_size": 0}, "batch_size"),
        ({"logit_scale": 0.0}, "logit_scale"),
        ({"logit_scale": 1e300}, "logit_scale must be in"),
        ({"logit_bias": 1e308}, "logit_bias must be from"),
    ):
        with pytest.raises(InputError, match=words):
            make(**changes)
    with pytest.raises(LayerError, match="no layer"):
        make(layers=["stem", "conv9", "last"])
    with pytest.raises(LayerError, match="did not run"):
        make(layers=["stem", nn.Conv2d(3, 16, 3), "last"]).attribute(images(1))
    with pytest.raises(InputError, match="channels"):
        make(layers=["stem", "last"]).attribute(images(1))
    empty = ConceptFusionMap(model, layers, translator)
    with pytest.raises(NotFittedError, match="with_concepts"):
        empty.attribute(images(1))
    with pytest.raises(NotFittedError, match="fit"):
        ConceptFusionMap(model, layers, concepts=CONCEPTS).scores(images(1))
    cefam.gradient = "brnach"
    with pytest.raises(InputError, match="gradient"):
        cefam.attribute(images(1))


def test_old_spellings_raise_with_the_new_ones():
    cefam = build("cnn")
    model, layers, translator, text = cefam.forward_func, cefam.layers, cefam.translator, cefam.text_embeddings
    for old, value, new in (("layer", "fused", "map_layer"), ("probability", "sigmoid", "link"),
                            ("chunk_size", 4, "batch_size")):  # fmt: skip
        with pytest.raises(InputError, match=f"{new}="):
            ConceptFusionMap(model, layers, translator, CONCEPTS, text, **{old: value})
        with pytest.raises(InputError, match=f"{new}="):
            cefam.with_options(**{old: value})
    with pytest.raises(InputError, match="Did you mean 'gradient'"):
        cefam.with_options(gradiant="branch")
    with pytest.raises(AttributeError, match=r"layer_relevance\(inputs, concepts\)"):
        cefam.relevance(images(1))
    with pytest.raises(AttributeError, match=r"contributions\(inputs, target, concepts\)"):
        cefam.contribution(images(1))
    assert not hasattr(cefam, "relevance")
    with pytest.raises(InputError, match="map_layer='fused'"):
        cefam.layer = "fused"
    with pytest.raises(InputError, match="is now an instance method"):
        ConceptFusionMap.fit(model, layers, None, images(2), CONCEPTS)
    with pytest.raises(InputError, match="is now an instance method"):
        ConceptFusionMap.fit(model, layers, None)


def test_copies_with_other_options():
    cefam, x = build("cnn"), images(2)
    branch = cefam.with_options(gradient="branch", map_layer=0)
    assert (branch.gradient, branch.map_layer, cefam.gradient, cefam.map_layer) == ("branch", 0, "total", "auto")
    assert branch.translator is cefam.translator
    assert torch.equal(branch.attribute(x), build("cnn", gradient="branch", map_layer=0).attribute(x))


def test_a_narrow_layer_keeps_most_of_its_channels():
    x = images(2)
    taken = {}
    for name, options in {
        "published": {"n_channels": 20},
        "own": {"n_channels": 19},
        "half": {"n_channels": 20, "channel_share": 0.5},
        "three": {"n_channels": 3, "channel_share": 1.0},
    }.items():
        cefam = build("cnn", map_layer=0, **options)  # 12 channels
        value, curve = cefam.contributions(x, target=1, return_curve=True)
        assert curve.shape == (2, len(CONCEPTS), cefam.n_channels + 1)
        # Constant from the last channel taken on.
        changes = (curve[..., 1:] != curve[..., :-1]).flatten(0, 1).any(0)
        taken[name] = int(changes.nonzero().max()) + 1
        torch.testing.assert_close(value, curve[..., 1 : taken[name] + 1].mean(-1), atol=1e-6, rtol=1e-5)
    assert taken == {"published": 3, "own": 12, "half": 6, "three": 3}
    same = [build("cnn", **options) for options in ({"n_channels": 20}, {"n_channels": 20, "channel_share": 0.25})]
    assert torch.equal(same[0].layer_relevance(x), same[1].layer_relevance(x))
    assert torch.equal(
        build("cnn", map_layer=0, n_channels=20).contributions(x, target=1),
        build("cnn", map_layer=0, n_channels=3).contributions(x, target=1),
    )


def test_constructor_arguments_are_attributes():
    cefam = build("cnn", map_layer=1, batch_size=7, fill="zero", gradient="branch", link="sigmoid")
    expected = {"map_layer": 1, "batch_size": 7, "fill": "zero", "gradient": "branch", "n_channels": K,
                "logit_scale": 5.0, "logit_bias": None, "link": "sigmoid", "concepts": CONCEPTS, "layout": "auto",
                "channel_share": None, "prefix_tokens": None, "class_probability": "auto"}  # fmt: skip
    assert {name: getattr(cefam, name) for name in expected} == expected
    assert cefam.layers == CASES["cnn"][1]
    assert cefam.translator.embedding_dim == 10


def test_half_precision_matches_full():
    cefam, x = build("cnn"), images(2)
    full = cefam.attribute(x, target=1)
    cefam.forward_func.to(torch.bfloat16)
    half = cefam.attribute(x.to(torch.bfloat16), target=1)
    assert half.dtype == torch.float32
    assert F.cosine_similarity(half.flatten(1), full.flatten(1)).min() > 0.95
    assert cefam.contributions(x.to(torch.bfloat16), target=1).isfinite().all()


class Multilabel(nn.Module):
    """Two labels, each read off one channel; the head may end in a sigmoid or softmax."""

    def __init__(self, end: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1, bias=False)
        self.conv.weight.data = torch.eye(3)[:, :, None, None]
        self.end = end or nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.conv(x).mean((2, 3))
        return self.end(torch.stack([8 * z[:, 0] - 3, 6 * z[:, 1] - 2], 1))


class Pass(nn.Module):
    def forward(self, pooled):
        return pooled[0]


def colors(end: nn.Module | None = None, **options) -> ConceptFusionMap:
    return ConceptFusionMap(Multilabel(end), ["conv"], Pass(), ["red", "green", "blue"], torch.eye(3), n_channels=1,
                            **options)  # fmt: skip


def test_a_concept_without_influence_on_an_independent_label_contributes_nothing():
    x = torch.rand(2, 3, 8, 8) * torch.tensor([1.0, 1.0, 0.2])[:, None, None]
    value = colors(class_probability="sigmoid").contributions(x, target=0)
    assert (value[:, 0] > 0.01).all()
    assert torch.equal(value[:, 1:], torch.zeros(2, 2))
    without = x.clone()
    without[:, 0] = x.mean((1, 2, 3))[:, None, None]  # the mean of the layer's pooled vector
    p, q = (Multilabel(nn.Sigmoid())(batch)[:, 0] for batch in (x, without))
    torch.testing.assert_close(value[:, 0], (p - q) / p, atol=1e-5, rtol=1e-4)
    assert (
        colors(class_probability="softmax").contributions(x, target=0)[:, 1].abs() > 0.01
    ).all()  # a softmax lets labels compete


@pytest.mark.parametrize("end", [nn.Sigmoid(), nn.Softmax(1)])
def test_heads_that_end_in_probabilities_are_taken_as_they_are(end):
    x = torch.rand(3, 3, 8, 8)
    link = "sigmoid" if isinstance(end, nn.Sigmoid) else "softmax"
    for cefam in (colors(end), colors(end, gradient="branch")):
        expected = colors(class_probability=link, gradient=cefam.gradient).explain(x, target=1)
        found = cefam.explain(x, target=1)
        torch.testing.assert_close(found.contributions, expected.contributions, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.target_probability, expected.target_probability)


@pytest.mark.parametrize("end", [nn.Sigmoid(), nn.Softmax(1)])
@pytest.mark.parametrize("gradient", ["total", "branch"])
def test_a_saturated_head_is_explained_before_its_last_activation(end, gradient):
    """In single precision the probability is exactly 1, and stays 1 without the concept; its logit does not."""
    x = torch.rand(2, 3, 8, 8) * torch.tensor([9.0, 0.1, 0.1])[:, None, None] + torch.tensor([4.0, 0, 0])[:, None, None]
    assert (Multilabel(end)(x)[:, 0] == 1).all()
    link = "sigmoid" if isinstance(end, nn.Sigmoid) else "softmax"
    found = colors(end, gradient=gradient).contributions(x, target=0)
    expected = colors(class_probability=link, gradient=gradient).contributions(x, target=0)
    torch.testing.assert_close(found, expected, atol=0, rtol=1e-4)
    assert (found[:, 0] != 0).all()
    half = colors(nn.Sequential(nn.Identity(), end), gradient=gradient).contributions(x, target=0)
    torch.testing.assert_close(half, expected, atol=0, rtol=1e-4)


def test_outputs_that_look_like_independent_labels_warn():
    class Own(nn.Module):
        def forward(self, logits):
            return 1 / (1 + torch.exp(-logits))

    with pytest.warns(InputWarning, match="independent labels"):
        colors(Own()).contributions(torch.rand(2, 3, 8, 8), target=0)
    colors(Own(), class_probability="softmax").contributions(torch.rand(2, 3, 8, 8), target=0)


def test_a_probability_of_zero_has_no_relative_change():
    class Never(nn.Module):
        def forward(self, logits):
            return logits.softmax(1) * 0 + torch.tensor([0.0, 1.0])

    with pytest.warns(InputWarning, match="exactly 0"):
        value = colors(Never(), class_probability="auto").contributions(torch.rand(1, 3, 8, 8), target=0)
    assert value.isnan().all()


def test_an_output_that_is_nan_is_not_called_a_probability_of_zero():
    class Broken(nn.Module):
        def forward(self, logits):
            return logits * torch.nan

    with (
        pytest.warns(InputWarning, match="outputs for class 0 are NaN"),
        pytest.warns(InputWarning, match="NaN or inf"),
    ):
        value = colors(Broken(), class_probability="softmax").contributions(torch.rand(1, 3, 8, 8), target=0)
    assert value.isnan().all()


@pytest.mark.parametrize("layer", ["auto", -1])
def test_channel_mean_at_a_pooled_layer_is_zero_with_a_warning(layer):
    cefam = build("cnn", fill="channel_mean", map_layer=layer)
    x = images(3)
    best = cefam.layer_relevance(x).argmax(-1) if layer == "auto" else torch.full((3, len(CONCEPTS)), 2)
    if (best == 2).any():
        with pytest.warns(InputWarning, match="keeps the pooled values"):
            value = cefam.contributions(x, target=1)
    else:
        value = cefam.contributions(x, target=1)
    assert (value[best == 2].abs() < 1e-4).all()
    assert value.isfinite().all()


def test_images_from_anywhere(tmp_path):
    from PIL import Image

    cefam = build("cnn")
    files = []
    for i, image in enumerate((images(3) * 255).to(torch.uint8)):
        files.append(tmp_path / f"{i}.png")
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(files[-1])
    source = inputs_for(cefam.forward_func, files, size=32)
    expected = cefam.explain(torch.stack(list(source)), top_k=2)
    found = cefam.explain(source, top_k=2)
    assert found.image_names == ["0.png", "1.png", "2.png"]
    torch.testing.assert_close(found.maps, expected.maps, equal_nan=True)
    torch.testing.assert_close(cefam.scores(source), cefam.scores(torch.stack(list(source))))


class Probabilities(nn.Module):
    """A softmax written out, which is not recognized as one."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Residual()

    def forward(self, x):
        e = self.net(x).exp()
        return e / e.sum(1, keepdim=True)


def explained(model: nn.Module, layer: str = "net.last", channels: int = 24, **options) -> ConceptFusionMap:
    translator = ConceptTranslator([channels], 6, hidden=(8, 8))
    return ConceptFusionMap(model, [layer], translator, ["a", "b"], torch.randn(2, 6), link="softmax", **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_images_do_not_decide_how_the_output_is_read(dtype):
    """One sum of probabilities that half precision rounds, or a NaN image, once made a softmax of all of them."""
    torch.manual_seed(0)
    model, x = Probabilities().to(dtype).eval(), torch.rand(12, 3, 24, 24).to(dtype)
    cefam = explained(model)
    together = cefam.explain(x)
    torch.testing.assert_close(together.target_probability.float(), model(x).amax(1).float(), rtol=0.02, atol=0)
    if dtype == torch.float32:
        x[3] = torch.nan
        with pytest.warns(InputWarning):
            beside = cefam.explain(x)
        rest = [i for i in range(12) if i != 3]
        assert torch.equal(beside.target_probability[rest], together.target_probability[rest])


def test_an_image_without_influence_has_contributions_of_zero():
    """All units of a black image are inactive; its contributions are 0 and the others' as before."""

    class Dead(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Conv2d(3, 6, 3, bias=False), nn.Linear(6, 4)
            self.head.weight.data.abs_()

        def forward(self, x):
            z = self.body(x).relu().mean((2, 3))
            return self.head((z - 0.001).relu())

    torch.manual_seed(0)
    cefam, x = explained(Dead(), "body", 6), torch.rand(3, 3, 12, 12)
    x[2] *= 1e-6
    with pytest.warns(InputWarning, match="does not change the model's output for an image"):
        found = cefam.contributions(x)
    assert found[2].tolist() == [0, 0]
    assert bool(found[:2].abs().amin() > 0)
    torch.testing.assert_close(found[:2], cefam.contributions(x[:2]))


@pytest.mark.parametrize("target", [99, "nonsense", [0]])
def test_a_target_is_checked_without_contributions(target):
    cefam, x = explained(Probabilities()), torch.rand(2, 3, 24, 24)
    with pytest.raises(TargetError):
        cefam.explain(x, target=target, contributions=False)
    assert cefam.explain(x, target=3, contributions=False).contributions is None
