"""Slow, plain references for the solver tests: proximal gradient and the dual, written from the definitions."""

from __future__ import annotations

import numpy as np


def problem(n=120, d=8, k=3, *, seed=0, condition=None, dtype=np.float64):
    """Random features (optionally with correlated columns) and labels drawn from a planted sparse softmax model."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    if condition:
        q, _ = np.linalg.qr(rng.normal(size=(d, d)))
        x = (x * np.logspace(0, -np.log10(condition) / 2, d)) @ q
        x = x / x.std(0)
    w = rng.normal(size=(k, d)) * (rng.random((k, d)) < 0.5) * 2
    logits = x @ w.T
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    y = np.array([rng.choice(k, p=row) for row in p])
    y[:k] = np.arange(k)
    return x.astype(dtype), y


def loss_and_gradient(x, y, w, b, s=None, logistic=False):
    """Weighted mean loss and its gradient by (w, b) in float64; one row at a time where it matters not."""
    x = np.asarray(x, dtype=np.float64)
    s = np.ones(len(y)) if s is None else np.asarray(s, dtype=np.float64)
    z = x @ w.T + b
    if logistic:
        z = z[:, 0]
        value = np.logaddexp(0, z) - y * z
        r = (1 / (1 + np.exp(-z)) - y)[:, None]
    else:
        top = z.max(1, keepdims=True)
        lse = top[:, 0] + np.log(np.exp(z - top).sum(1))
        value = lse - z[np.arange(len(y)), y]
        r = np.exp(z - lse[:, None])
        r[np.arange(len(y)), y] -= 1
    r = r * s[:, None] / s.sum()
    return (s * value).sum() / s.sum(), r.T @ x, r.sum(0)


def penalty_value(w, lam, alpha):
    return lam * (alpha * np.abs(w).sum() + (1 - alpha) / 2 * (w**2).sum())


def objective(x, y, w, b, lam, alpha, s=None, logistic=False):
    w, b = np.asarray(w, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return loss_and_gradient(x, y, w, b, s, logistic)[0] + penalty_value(w, lam, alpha)


def proximal_gradient(x, y, k, lam, alpha, *, s=None, logistic=False, n_iter=20_000, tol=1e-13):
    """Accelerated proximal gradient with the global Lipschitz constant and function restarts; slow and plain."""
    x = np.asarray(x, dtype=np.float64)
    s1 = np.ones(len(y)) if s is None else np.asarray(s, dtype=np.float64)
    xa = np.concatenate([x, np.ones((len(x), 1))], 1)
    lipschitz = 0.5 * np.linalg.eigvalsh((xa * (s1 / s1.sum())[:, None]).T @ xa)[-1]
    rows = 1 if logistic else k
    w, b = np.zeros((rows, x.shape[1])), np.zeros(rows)
    v, c, t = w, b, 1.0
    last = objective(x, y, w, b, lam, alpha, s, logistic)
    for _ in range(n_iter):
        _, gw, gb = loss_and_gradient(x, y, v, c, s, logistic)
        step = v - gw / lipschitz
        w_new = np.sign(step) * np.maximum(np.abs(step) - lam * alpha / lipschitz, 0)
        w_new /= 1 + lam * (1 - alpha) / lipschitz
        b_new = c - gb / lipschitz
        t_new = (1 + np.sqrt(1 + 4 * t * t)) / 2
        value = objective(x, y, w_new, b_new, lam, alpha, s, logistic)
        if value > last:
            v, c, t = w, b, 1.0
            if t_new == (1 + np.sqrt(5)) / 2:
                break
            continue
        v, c = w_new + (t - 1) / t_new * (w_new - w), b_new + (t - 1) / t_new * (b_new - b)
        change = max(np.abs(w_new - w).max(), np.abs(b_new - b).max())
        w, b, t, last = w_new, b_new, t_new, value
        if change < tol:
            break
    return w, b, objective(x, y, w, b, lam, alpha, s, logistic)


def best_dual_bound(x, y, k, w, b, lam, alpha, s=None):
    """Largest D(q) over explicit q = (1 - tau) onehot + tau ((1 - e) p + e u), tau on a grid; multinomial.

    Returns the bound and the worst violation of the dual constraints of that q (mean of q equals the label mean, rows
    are probabilities, and, for alpha = 1, |.| <= lam).
    """
    x = np.asarray(x, dtype=np.float64)
    s = np.ones(len(y)) if s is None else np.asarray(s, dtype=np.float64)
    s = s / s.sum()
    hot = np.eye(k)[y]
    z = x @ np.asarray(w, np.float64).T + np.asarray(b, np.float64)
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    mean = s @ hot
    r = s @ p - mean
    rho = max((r / mean).max(), 0.0)
    u = mean - r / rho if rho > 0 else mean
    e = rho / (1 + rho)
    repaired = (1 - e) * p + e * u
    best, worst = -np.inf, np.inf
    for tau in np.concatenate([1 - np.logspace(-9, 0, 400), [1.0]]):
        q = (1 - tau) * hot + tau * repaired
        v = -((q - hot) * s[:, None]).T @ x
        excess = np.maximum(np.abs(v) - lam * alpha, 0)
        if alpha < 1:
            conjugate = (excess**2).sum() / (2 * lam * (1 - alpha))
        elif excess.max() > 1e-12:
            continue
        else:
            conjugate = 0.0
        with np.errstate(divide="ignore", invalid="ignore"):
            entropy = -(s[:, None] * np.where(q > 0, q * np.log(q), 0)).sum()
        if entropy - conjugate > best:
            best = entropy - conjugate
            worst = max(np.abs(s @ q - mean).max(), np.abs(q.sum(1) - 1).max(), -q.min())
    return best, worst
