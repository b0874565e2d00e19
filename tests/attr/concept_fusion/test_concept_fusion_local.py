"""What the translator reads at each position alone, and how it enters the fused regions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from comparisons import within
from torch import nn

from captum_concepts.attr.concept_fusion import local as local
from captum_concepts.attr.concept_fusion.local import read_locally
from captum_concepts.attr.concept_fusion.regions import FAINT, TEMPERATURE, coarser_grid, fused_maps
from captum_concepts.attr.concept_fusion.words import TextBank
from captum_concepts.attr.concept_fusion_map import ConceptFusionMap
from captum_concepts.models import ConceptTranslator


def bank(text: torch.Tensor, scale: float, bias: float) -> TextBank:
    names = tuple(f"word {i}" for i in range(len(text)))
    return TextBank(names, text, torch.full((len(text),), bias), scale, "softmax")


def made(words: int, seed: int = 0) -> tuple[ConceptTranslator, TextBank]:
    torch.manual_seed(seed)
    translator = ConceptTranslator([6, 4], 5, hidden=(8, 7))
    for parameter in translator.parameters():
        parameter.data.mul_(3)
    return translator, bank(F.normalize(torch.randn(words, 5), dim=1), 20.0, -2.0)


def loops(translator, space, maps, index, grid):
    """The excess of one example and one concept, cell by cell."""
    cells = []
    for i in range(grid[0]):
        for j in range(grid[1]):
            pooled = []
            for layer in maps:
                if layer.shape[-2] >= grid[0]:
                    a, b = layer.shape[-2] // grid[0], layer.shape[-1] // grid[1]
                    pooled.append(layer[:, i * a : (i + 1) * a, j * b : (j + 1) * b].mean((1, 2)))
                else:
                    pooled.append(F.interpolate(layer[None], grid, mode="bilinear")[0, :, i, j])
            logits = space.logits(translator([z[None] for z in pooled]))[0] / TEMPERATURE
            cells.append(logits[index] if len(logits) == 1 else logits.log_softmax(0)[index])
    q = torch.stack(cells).exp()
    q = q / q.max()
    return (q - q.mean()).clamp(min=0).reshape(grid)


@pytest.mark.parametrize("words", [1, 2, 9])
def test_excess_equals_plain_loops(words, monkeypatch):
    monkeypatch.setattr(local, "_ROWS", 7)
    monkeypatch.setattr(local, "_ENTRIES", 11)
    translator, space = made(words)
    maps = [torch.randn(2, 6, 8, 12), torch.randn(2, 4, 2, 3)]
    grid = (4, 6)
    index = torch.tensor([[0, words - 1], [words - 1, 0]])
    reading = read_locally(translator, maps, grid, space)
    fast = reading.excess(index)
    assert fast.shape == (2, 2, *grid)
    for n in range(2):
        for j in range(2):
            slow = loops(translator, space, [m[n] for m in maps], int(index[n, j]), grid)
            torch.testing.assert_close(fast[n, j], slow, atol=2e-4, rtol=0)
    assert fast.max() < 1


def test_a_cell_that_is_the_whole_image_reads_as_the_image():
    translator, space = made(4)
    maps = [torch.randn(3, 6, 5, 5), torch.randn(3, 4, 2, 2)]
    whole = translator([m.mean((2, 3)) for m in maps])
    reading = read_locally(translator, maps, (1, 1), space)
    torch.testing.assert_close(reading.unit[:, 0], F.normalize(whole, dim=1), atol=1e-6, rtol=1e-5)


def test_the_same_everywhere_says_nothing():
    translator, space = made(4)
    maps = [torch.randn(1, 6, 1, 1).expand(-1, -1, 6, 6), torch.randn(1, 4, 1, 1).expand(-1, -1, 3, 3)]
    assert torch.equal(
        read_locally(translator, maps, (6, 6), space).excess(torch.tensor([[0, 3]])), torch.zeros(1, 2, 6, 6)
    )


def test_it_finds_the_part_that_another_concept_does_not_explain():
    # Channel k says concept k. The left half holds concept 0, the right half concept 1.
    class Copy(nn.Module):
        def forward(self, pooled):
            return pooled[0]

    maps = torch.zeros(1, 3, 4, 4)
    maps[:, 0, :, :2], maps[:, 1, :, 2:] = 1.0, 1.0
    space = bank(torch.eye(3), 10.0, 0.0)
    both = read_locally(Copy(), [maps], (4, 4), space).excess(torch.tensor([[0, 1, 2]]))[0]
    assert (both[0, :, :2] > 0.4).all()
    assert (both[0, :, 2:] == 0).all()
    assert (both[1, :, 2:] > 0.4).all()
    assert (both[1, :, :2] == 0).all()
    assert (both[2] == 0).all()  # equally unlikely everywhere


def test_probabilities_far_below_one_keep_their_shape():
    translator, _ = made(4)
    text = F.normalize(torch.randn(4, 5), dim=1)
    maps = [torch.randn(1, 6, 4, 4), torch.randn(1, 4, 4, 4)]
    sharp = read_locally(translator, maps, (4, 4), bank(text, 2000.0, 0.0)).excess(torch.tensor([[0, 1, 2, 3]]))
    assert sharp.isfinite().all()
    assert (sharp.amax((2, 3)) > 0).all()  # the strongest cell of each concept, however unlikely it is


def test_the_number_of_cells_is_bounded():
    assert coarser_grid((28, 28), 256) == (14, 14)
    translator, space = made(3)
    maps = [torch.randn(1, 6, 40, 40), torch.randn(1, 4, 5, 5)]
    assert read_locally(translator, maps, (28, 28), space).grid == (14, 14)


def test_it_counts_as_one_more_layer():
    evidence = torch.rand(1, 2, 4, 4)
    still = torch.eye(16)[None]  # nothing spreads
    torch.testing.assert_close(
        fused_maps([evidence], still, (4, 4), evidence / 3), fused_maps([evidence, evidence], still, (4, 4))
    )


def test_a_reading_that_is_nearly_the_same_everywhere_hardly_counts():
    evidence = torch.rand(1, 1, 4, 4)
    evidence = evidence / evidence.square().mean().sqrt()
    still = torch.eye(16)[None]
    faint = fused_maps([evidence], still, (4, 4), FAINT / 10 * evidence)
    torch.testing.assert_close(faint, 1.1 * evidence, atol=1e-5, rtol=1e-4)


def test_evidence_far_below_one_counts_as_any_other():
    evidence = torch.rand(1, 1, 4, 4)
    still = torch.eye(16)[None]
    torch.testing.assert_close(fused_maps([evidence * 1e-10], still, (4, 4)), fused_maps([evidence], still, (4, 4)))


@pytest.mark.parametrize("scale", [20.0, 100.0])
@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
@pytest.mark.parametrize("gradient", ["total", "branch"])
def test_fused_maps_do_not_depend_on_batches(link, gradient, scale):
    """Within the bound that ConceptFusionMap states, for networks in which layers, relevances or maps nearly vanish."""
    bound = 40 * scale * torch.finfo(torch.float32).eps
    for seed in range(8):
        translator, space = made(5)
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(3, 6, 3, 1, 1), nn.ReLU(), nn.Conv2d(6, 4, 3, 2, 1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
        )  # fmt: skip
        options = {"map_layer": "fused", "link": link, "gradient": gradient, "logit_scale": scale}
        whole = ConceptFusionMap(net, ["1", "3"], translator, list("abcde"), space.direction, **options)
        small = ConceptFusionMap(net, ["1", "3"], translator, list("abcde"), space.direction, batch_size=2, **options)
        x = torch.rand(3, 3, 20, 16)
        all_maps = whole.attribute(x)
        within(small.attribute(x), all_maps, bound)
        within(whole.attribute(x[1:2], target="d"), all_maps[1:2, 3:4], bound)
        net.double(), translator.double()
        within(whole.attribute(x.double()), all_maps, bound)


def test_a_word_alone_is_still_read_locally():
    torch.manual_seed(0)
    translator, space = made(1)
    maps = [torch.randn(1, 6, 4, 4), torch.randn(1, 4, 4, 4)]
    assert read_locally(translator, maps, (4, 4), space).excess(torch.tensor([[0]])).max() > 0
