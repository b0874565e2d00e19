"""The cubic cosine similarity against plain loops from the paper's formula, and its gradient."""

from __future__ import annotations

import math

import pytest
import torch

from captum_concepts.errors import InputError
from captum_concepts.models.cubic_similarity import CubicSums, cubic_similarity, similarity_and_gradient


def by_the_book(q, p):
    """Equation 1 of the paper for one concept and one place, number by number."""
    n = len(q)
    q_mean, p_mean = sum(q) / n, sum(p) / n
    q_bar = [(v - q_mean) ** 3 for v in q]
    p_bar = [(v - p_mean) ** 3 for v in p]
    dot = sum(a * b for a, b in zip(q_bar, p_bar, strict=True))
    length = math.sqrt(sum(a * a for a in q_bar)) * math.sqrt(sum(b * b for b in p_bar))
    return dot / length if length else 0.0


def reference_loss(C, P):
    """Minus the sum over concepts and places of tensors (N, M, h, w)."""
    _, m, h, w = C.shape
    places = [(k, i, j) for k in range(m) for i in range(h) for j in range(w)]
    return -sum(by_the_book(C[:, k, i, j].tolist(), P[:, k, i, j].tolist()) for k, i, j in places)


def values(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("n", [2, 3, 17])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_equals_the_loops(n, dtype, tolerance):
    C, P = values(n, 3, 2, 4, dtype=dtype), values(n, 3, 2, 4, seed=1, dtype=dtype)
    found = cubic_similarity(C, P)
    assert found.shape == (3, 2, 4)
    assert -found.sum().item() == pytest.approx(reference_loss(C.double(), P.double()), abs=24 * tolerance)


def test_neither_scale_nor_offset_matters():
    q, p = values(20, 5), values(20, 5, seed=1)
    for scale in (1e-15, 1e-4, 1.0, 1e9):
        torch.testing.assert_close(cubic_similarity(q * scale, p * 0.01), cubic_similarity(q, p), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(cubic_similarity(q + 3, p - 2), cubic_similarity(q, p), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(cubic_similarity(3 * q, q), torch.ones(5))
    torch.testing.assert_close(cubic_similarity(-q, q), -torch.ones(5))


def test_strong_matches_count_most():
    p = torch.tensor([0.0, 0.1, 0.2, 0.3, 1.0])
    right_where_strong = torch.tensor([0.3, 0.0, 0.3, 0.0, 1.0])
    right_where_weak = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.2])
    strong, weak = (cubic_similarity(q[:, None], p[:, None]).item() for q in (right_where_strong, right_where_weak))
    cosine = torch.corrcoef(torch.stack([p, right_where_strong]))[0, 1].item()
    assert strong > cosine > 0.8
    assert weak < cosine


def test_a_constant_is_like_nothing_and_has_no_gradient():
    q = torch.full((6, 2), 0.1)
    q[:, 1] = values(6)
    q.requires_grad_()
    found = cubic_similarity(q, values(6, 2, seed=2))
    assert found[0] == 0
    assert found[1] != 0
    found.sum().backward()
    assert torch.equal(q.grad[:, 0], torch.zeros(6))
    assert q.grad[:, 1].abs().max() > 0


@pytest.mark.parametrize("n", [2, 3, 7, 60, 512])
def test_constants_that_do_not_average_exactly_are_still_constants(n):
    constant = values(40).mul(3).expand(n, 40)
    p = values(n, 40, seed=1)
    for one, other in ((constant, p), (p, constant), (constant, constant)):
        leaf = one.clone().requires_grad_()
        found = cubic_similarity(leaf, other)
        assert torch.equal(found, torch.zeros(40))
        found.sum().backward()
        assert torch.equal(leaf.grad, torch.zeros(n, 40))


def test_half_precision_is_computed_in_float32():
    q, p = values(9, 4).half(), values(9, 4, seed=1).half()
    found = cubic_similarity(q, p)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, cubic_similarity(q.float(), p.float()))


def test_gradient_by_finite_differences():
    q, p = values(7, 3, dtype=torch.float64).requires_grad_(), values(7, 3, seed=1, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: cubic_similarity(x, p), (q,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_written_out_gradient(dtype):
    q, p = values(4, 11, 6, dtype=dtype), values(4, 11, 6, seed=1, dtype=dtype) * 0.02
    q[2, :, 3] = 0  # a dead concept
    q, p = q - q.mean(1, keepdim=True), p - p.mean(1, keepdim=True)
    leaf = q.clone().requires_grad_()
    expected = cubic_similarity(leaf.transpose(0, 1), p.transpose(0, 1))
    expected.sum().backward()
    found, gradient = similarity_and_gradient(q.clone(), p.clone())
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(found, expected.detach(), atol=tolerance, rtol=tolerance)
    # Autograd's gradient has mean zero over the samples because it goes through the centring.
    torch.testing.assert_close(gradient - gradient.mean(1, keepdim=True), leaf.grad, atol=10 * tolerance, rtol=1e-4)
    assert found[2, 3] == 0
    assert torch.equal(gradient[2, :, 3], torch.zeros(11, dtype=dtype))


def test_two_halves_with_reduced_sums_equal_the_whole():
    q, p = (v - v.mean(1, keepdim=True) for v in (values(3, 10, 5), values(3, 10, 5, seed=1)))
    whole, gradient = similarity_and_gradient(q.clone(), p.clone())
    parts = []

    def keep(sums):
        parts.append(sums.clone())
        return sums

    for half in (slice(0, 4), slice(4, 10)):
        similarity_and_gradient(q[:, half].clone(), p[:, half].clone(), keep)
    total = parts[0] + parts[1]
    for half in (slice(0, 4), slice(4, 10)):
        found, part = similarity_and_gradient(q[:, half].clone(), p[:, half].clone(), lambda _: total)
        torch.testing.assert_close(found, whole)
        torch.testing.assert_close(part, gradient[:, half])


def test_sums_over_parts():
    q, p = values(23, 4, 6), values(23, 4, 6, seed=1)
    q, p = q - q.mean(0), p - p.mean(0)
    sums = CubicSums((4, 6))
    for part in torch.arange(23).split(5):
        for where in (slice(0, 3), slice(3, 4)):
            sums.add(q[part][:, where], p[part][:, where], dim=0, where=where)
    torch.testing.assert_close(sums.similarity(), cubic_similarity(q, p), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("q", "p"), [((3, 2), (3, 1)), ((1, 2), (1, 2)), ((0, 2), (0, 2))])
def test_refused(q, p):
    with pytest.raises(InputError, match="one shape"):
        cubic_similarity(torch.zeros(q), torch.zeros(p))
