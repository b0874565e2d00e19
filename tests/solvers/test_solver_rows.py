"""However the rows are stored and chunked, the solver sees the same problem."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from solver_reference import problem
from torch.utils.data import DataLoader, TensorDataset

from captum_concepts.errors import InputError
from captum_concepts.solvers import elastic_net_certificate, fit_elastic_net, lambda_max

LAM = 0.02


@pytest.fixture(scope="module")
def arrays():
    return problem(n=230, d=7, k=3, seed=50, dtype=np.float32)


@pytest.fixture(scope="module")
def expected(arrays):
    x, y = arrays
    return fit_elastic_net(torch.as_tensor(x.astype(np.float64)), torch.as_tensor(y), LAM, tol=1e-6)


def same(result, expected):
    assert result.converged
    assert result.objective == pytest.approx(expected.objective, abs=2e-6)
    torch.testing.assert_close(result.weight.double(), expected.weight, atol=2e-3, rtol=0)


class Chunks:
    """Re-iterable, without a length, as a reader of many files would be."""

    def __init__(self, x, y=None, size=50):
        self.x, self.y, self.size = x, y, size

    def __iter__(self):
        for i in range(0, len(self.x), self.size):
            x = self.x[i : i + self.size]
            yield x if self.y is None else (x, self.y[i : i + self.size])


@pytest.mark.parametrize("chunk_size", [1, 17, 230, 1000, None])
def test_the_answer_does_not_depend_on_the_chunk_size(arrays, expected, chunk_size):
    x, y = arrays
    same(fit_elastic_net(torch.as_tensor(x), torch.as_tensor(y), LAM, tol=1e-5, chunk_size=chunk_size), expected)


@pytest.mark.parametrize(
    "kind", ["array", "list", "read-only", "fortran", "strided", "chunks", "tensor chunks", "empty chunk"]
)
def test_arrays_and_chunks_of_every_kind_give_the_same_answer(arrays, expected, kind):
    x, y = arrays
    read_only = x.copy()
    read_only.flags.writeable = False
    wide = np.zeros((len(x), 14), np.float32)
    wide[:, ::2] = x
    given = {
        "array": x,
        "list": [x[:100], x[100:]],
        "read-only": read_only,
        "fortran": np.asfortranarray(x),
        "strided": wide[:, ::2],
        "chunks": Chunks(x),
        "tensor chunks": Chunks(torch.as_tensor(x)),
        "empty chunk": [x[:100], x[:0], x[100:]],
    }[kind]
    same(fit_elastic_net(given, y, LAM, tol=1e-5), expected)


def test_memory_map_is_read_in_chunks(arrays, expected, tmp_path):
    x, y = arrays
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    same(fit_elastic_net(mapped, y, LAM, tol=1e-5, chunk_size=32), expected)


@pytest.mark.parametrize("shuffle", [False, True])
def test_pairs_bring_their_labels_so_their_order_is_free(arrays, expected, shuffle):
    x, y = arrays
    data = TensorDataset(torch.as_tensor(x), torch.as_tensor(y))
    loader = DataLoader(data, batch_size=64, shuffle=shuffle, generator=torch.Generator().manual_seed(0))
    same(fit_elastic_net(loader, None, LAM, tol=1e-5), expected)
    same(fit_elastic_net(Chunks(x, y), None, LAM, tol=1e-5), expected)


def test_weights_follow_their_rows_through_the_chunks(arrays):
    x, y = arrays
    s = np.random.default_rng(0).uniform(0, 2, len(y))
    whole = fit_elastic_net(torch.as_tensor(x), torch.as_tensor(y), LAM, sample_weight=s, tol=1e-6)
    parts = fit_elastic_net(Chunks(x, size=13), y, LAM, sample_weight=torch.as_tensor(s), tol=1e-6)
    torch.testing.assert_close(whole.weight, parts.weight, atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_other_dtypes_are_computed_in_float32(arrays, dtype):
    x, y = arrays
    x = (torch.as_tensor(x) * 4).to(dtype)
    result = fit_elastic_net(x, torch.as_tensor(y), LAM)
    reference = fit_elastic_net(x.double(), torch.as_tensor(y), LAM)
    assert result.weight.dtype == torch.float32
    assert result.objective == pytest.approx(reference.objective, abs=1e-4)


@pytest.mark.parametrize("loss", ["multinomial", "logistic"])
@pytest.mark.parametrize("offset", [0.0, 3.0, 1e3])
def test_standardize_equals_standardizing_by_hand(arrays, loss, offset):
    x, y = arrays
    y = y if loss == "multinomial" else (y > 0).astype(int)
    s = np.random.default_rng(1).uniform(0.5, 2, len(y))
    x = x.astype(np.float64) * np.array([0.01, 1, 100, 1, 1, 1, 1]) + offset
    mean = (s @ x) / s.sum()
    std = np.sqrt(s @ (x - mean) ** 2 / s.sum())
    kind = {"loss": loss, "sample_weight": s}
    by_hand = fit_elastic_net((x - mean) / std, y, LAM, tol=1e-7, **kind)
    folded = fit_elastic_net(x, y, LAM, tol=1e-7, standardize=True, chunk_size=31, **kind)
    torch.testing.assert_close(folded.weight, by_hand.weight, atol=1e-5, rtol=0)
    torch.testing.assert_close(folded.feature_mean.numpy(), mean)
    torch.testing.assert_close(folded.feature_std.numpy(), std)
    assert lambda_max(x, y, standardize=True, **kind) == pytest.approx(lambda_max((x - mean) / std, y, **kind))
    weight, bias = folded.raw()
    x = torch.as_tensor(x)
    logits = ((x - torch.as_tensor(mean)) / torch.as_tensor(std)) @ folded.weight.T + folded.bias
    torch.testing.assert_close(x @ weight.T + bias, logits)
    torch.testing.assert_close(folded.decision_function(x), logits)
    certificate = elastic_net_certificate(x, y, folded.weight, folded.bias, LAM, standardize=True, **kind)
    assert certificate.gap == pytest.approx(folded.gap, abs=1e-9)


def test_raw_is_the_weight_itself_without_standardization(expected):
    assert expected.raw()[0] is expected.weight


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.zeros(4), torch.tensor([0, 1, 0, 1]), "shape"),
        (torch.zeros(0, 3), torch.zeros(0), "at least 1"),
        (torch.zeros(4, 0), torch.zeros(4), "at least 1"),
        (torch.zeros(4, 2), torch.zeros(3), "4 rows but y has 3"),
        (torch.zeros(4, 2), None, "y is None"),
        ([], torch.zeros(0), "no rows"),
        ([torch.zeros(2, 3), torch.zeros(2, 4)], torch.tensor([0, 1, 0, 1]), r"\(rows, 3\).*\(2, 4\) after 2 rows"),
        ([torch.zeros(2, 3)], torch.tensor([0, 1, 0]), "X has 2 rows but y has 3"),
        ([torch.zeros(5, 3)], torch.tensor([0, 1, 0]), "X has more rows than y"),
        ([torch.zeros(2, 3)], None, "must yield .* pairs"),
        ([(torch.zeros(2, 3), torch.tensor([0]))], None, "2 rows, but 1 labels"),
        (iter([torch.zeros(2, 3)]), torch.tensor([0, 1]), "one-shot"),
        (3.0, torch.tensor([0, 1]), "iterable of chunks"),
        (torch.zeros(2, 3).to_sparse(), torch.tensor([0, 1]), "sparse"),
        (torch.zeros(2, 3, dtype=torch.complex64), torch.tensor([0, 1]), "real"),
    ],
)
def test_rows_that_cannot_be_read_are_refused(x, y, message):
    with pytest.raises(InputError, match=message):
        fit_elastic_net(x, y, 0.1)


def test_scipy_sparse_rows_are_refused():
    sparse = pytest.importorskip("scipy.sparse").eye(4).tocsr()
    with pytest.raises(InputError, match="toarray"):
        fit_elastic_net(sparse, torch.tensor([0, 1, 0, 1]), 0.1)


def test_the_rows_are_left_as_they_were(arrays):
    x, y = arrays
    x = torch.as_tensor(x.copy()).requires_grad_()
    before = x.detach().clone()
    result = fit_elastic_net(x, torch.as_tensor(y), LAM, standardize=True)
    assert torch.equal(x.detach(), before)
    assert x.grad is None
    assert not result.weight.requires_grad


def test_rows_of_an_iterable_are_not_kept():
    # The source yields rows of one shared buffer, as a reader would: keeping a chunk would see it overwritten.
    x, y = problem(n=200, d=5, k=3, seed=51)
    buffer = np.empty((50, 5))

    class Reused:
        def __iter__(self):
            for i in range(0, 200, 50):
                buffer[:] = x[i : i + 50]
                yield buffer

    result = fit_elastic_net(Reused(), y, LAM, tol=1e-8)
    assert result.objective == pytest.approx(fit_elastic_net(x, y, LAM, tol=1e-8).objective, abs=1e-9)
