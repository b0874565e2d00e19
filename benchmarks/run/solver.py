"""The elastic-net solver against glm_saga, scikit-learn's saga and a plain FISTA, all in one run.

    python -m benchmarks.run.solver                      # everything; glm_saga only where it is installed
    python -m benchmarks.run.solver --only peers correlated
    pip install --no-deps --target /tmp/peer glm_saga && python -m benchmarks.run.solver --glm-saga-path /tmp/peer

Every peer gets the same float32 rows. Times are taken in turn (ours, peer, peer, ours, ...) and the reported factor is
the median over rounds of the ratio within a round, once of wall clock and once of CPU time, so that a busy machine
does not decide it. Objectives are computed by one function in float64.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.record import RESULTS, environment, table, write
from captum_concepts.solvers import elastic_net_path, fit_elastic_net

ALPHA = 0.99


def problem(
    n: int, d: int, k: int, *, condition: float | None = None, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Standardised features, labels drawn from a sparse softmax model; ``condition``: of the features' covariance."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g)
    if condition:
        q = torch.linalg.qr(torch.randn(d, d, generator=g))[0]
        x = (x * torch.logspace(0, -math.log10(condition) / 2, d)) @ q
    x = (x - x.mean(0)) / x.std(0)
    w = torch.randn(k, d, generator=g) * (torch.rand(k, d, generator=g) < 0.06)
    w[torch.arange(k), torch.randint(d, (k,), generator=g)] = 1.0
    logits = x @ w.T
    y = torch.multinomial(torch.softmax(2 * logits / logits.std(), 1), 1, generator=g).squeeze(1)
    return x, y


def objective(x: torch.Tensor, y: torch.Tensor, w: Any, b: Any, lam: float, alpha: float = ALPHA) -> float:
    """Mean cross-entropy plus penalty in float64."""
    w, b = torch.as_tensor(w).double(), torch.as_tensor(b).double()
    total = sum(
        torch.nn.functional.cross_entropy(a.double() @ w.T + b, c, reduction="sum")
        for a, c in zip(x.split(20_000), y.split(20_000), strict=True)
    )
    return float(total) / len(y) + lam * float(alpha * w.abs().sum() + (1 - alpha) / 2 * w.square().sum())


def fista(
    x: torch.Tensor,
    y: torch.Tensor,
    k: int,
    lam: float,
    *,
    stop_at: float,
    max_iter: int,
    alpha: float = ALPHA,
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Plain accelerated proximal gradient, adaptive restart, one global Lipschitz constant.

    It is told the objective to reach and so pays for no certificate of its own.
    """
    n, d = x.shape
    v = torch.ones(d + 1)
    lipschitz = 1.0
    for _ in range(50):
        z = x @ v[:-1] + v[-1]
        v = torch.cat([z @ x, z.sum()[None]]) / n
        lipschitz = float(v.norm())
        v = v / lipschitz
    step = 1 / (0.5 * lipschitz * 1.02)
    w = u = torch.zeros(k, d)
    b = c = torch.zeros(k)
    t = 1.0
    for iteration in range(1, max_iter + 1):
        z = torch.addmm(c, x, u.T)
        lse = torch.logsumexp(z, 1)
        value = (lse.double().mean() - z.gather(1, y[:, None]).double().mean()).item()
        if value + lam * float(alpha * u.abs().sum() + (1 - alpha) / 2 * u.square().sum()) <= stop_at:
            return u, c, iteration
        r = torch.exp(z - lse[:, None])
        r.scatter_add_(1, y[:, None], torch.full((n, 1), -1.0))
        moved = u - step * (r.T @ x) / n
        w_new = (moved - moved.clamp(-step * lam * alpha, step * lam * alpha)) / (1 + step * lam * (1 - alpha))
        b_new = c - step * r.mean(0)
        uphill = float(((u - w_new) * (w_new - w)).sum() + ((c - b_new) * (b_new - b)).sum()) > 0
        t_new = 1.0 if uphill else (1 + math.sqrt(1 + 4 * t * t)) / 2
        share = 0.0 if uphill else (t - 1) / t_new
        u, c = w_new + share * (w_new - w), b_new + share * (b_new - b)
        w, b, t = w_new, b_new, t_new
    return w, b, max_iter


def sklearn_saga(x: np.ndarray, y: np.ndarray, lam: float, tol: float) -> tuple[np.ndarray, np.ndarray, int]:
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LogisticRegression(
            penalty="elasticnet",
            solver="saga",
            C=1 / (lam * len(y)),
            l1_ratio=ALPHA,
            tol=tol,
            max_iter=2000,
            random_state=0,
        ).fit(x, y)
    return model.coef_, model.intercept_, int(model.n_iter_.max())


def load_glm_saga(path: str | None) -> Callable[..., Any] | None:
    if path:
        sys.path.append(path)
    try:
        from glm_saga.elasticnet import train_saga
    except ImportError:
        return None
    return train_saga


def glm_saga(
    train_saga: Callable[..., Any],
    x: torch.Tensor,
    y: torch.Tensor,
    k: int,
    lam: float,
    *,
    epochs: int,
    tol: float,
) -> Any:
    """As label-free concept bottlenecks call it: zero start, learning rate 0.1, batches of 256, ungrouped."""
    from torch.utils.data import DataLoader, TensorDataset

    class Counted(DataLoader):
        epochs = 0

        def __iter__(self) -> Any:
            self.epochs += 1
            return super().__iter__()

    data = TensorDataset(x, y, torch.arange(len(y)))
    loader = Counted(data, batch_size=256, shuffle=True, generator=torch.Generator().manual_seed(0))
    linear = torch.nn.Linear(x.shape[1], k)
    torch.nn.init.zeros_(linear.weight)
    torch.nn.init.zeros_(linear.bias)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train_saga(
            linear,
            loader,
            0.1,
            epochs,
            lam,
            ALPHA,
            group=False,
            tol=tol,
            n_ex=len(y),
            n_classes=k,
            logger=lambda _: None,
        )
    return linear.weight.detach(), linear.bias.detach(), loader.epochs


def timed(function: Callable[[], Any]) -> tuple[float, float, Any]:
    wall, cpu = time.perf_counter(), time.process_time()
    value = function()
    return time.perf_counter() - wall, time.process_time() - cpu, value


def compare(ours: Callable[[], Any], peers: dict[str, Callable[[], Any]], rounds: dict[str, int]) -> dict[str, Any]:
    """Interleave ours with every peer; median seconds and median in-round factors."""
    ours()
    out: dict[str, Any] = {"ours": {"wall": [], "cpu": []}}
    for name in peers:
        out[name] = {"wall": [], "cpu": [], "factor_wall": [], "factor_cpu": []}
    for round_ in range(max(rounds.values())):
        for name, peer in peers.items():
            if round_ >= rounds[name]:
                continue
            before = timed(ours)
            wall, cpu, value = timed(peer)
            after = timed(ours)
            own_wall, own_cpu = (before[0] + after[0]) / 2, (before[1] + after[1]) / 2
            out["ours"]["wall"] += [before[0], after[0]]
            out["ours"]["cpu"] += [before[1], after[1]]
            for key, figure in zip(
                ("wall", "cpu", "factor_wall", "factor_cpu"),
                (wall, cpu, wall / own_wall, cpu / own_cpu),
                strict=True,
            ):
                out[name][key].append(figure)
            out[name]["value"] = value
    out["ours"]["value"] = ours()
    for entry in out.values():
        entry.update({key: statistics.median(v) for key, v in entry.items() if isinstance(v, list)})
    return out


def run_peers(args: argparse.Namespace) -> dict[str, Any]:
    n, d, k, lam = args.rows, args.columns, args.classes, args.lam
    x, y = problem(n, d, k, seed=args.seed)
    x_np, y_np = x.numpy(), y.numpy()
    best = fit_elastic_net(x.double(), y, lam, alpha=ALPHA, tol=1e-9)
    goal = fit_elastic_net(x, y, lam, alpha=ALPHA, tol=args.tol).objective
    peers: dict[str, Callable[[], Any]] = {
        "plain FISTA": lambda: fista(x, y, k, lam, stop_at=goal + 1e-8, max_iter=5000),
        "scikit-learn saga": lambda: sklearn_saga(x_np, y_np, lam, args.tol),
    }
    rounds = {"plain FISTA": args.repeats, "scikit-learn saga": args.repeats}
    for tol in (100 * args.tol, args.tol / 100):
        peers[f"ours, tol {tol:.0e}"] = lambda tol=tol: fit_elastic_net(x, y, lam, alpha=ALPHA, tol=tol)
        rounds[f"ours, tol {tol:.0e}"] = args.repeats
    train = load_glm_saga(args.glm_saga_path)
    if train is not None:
        slow = max(1, args.repeats // 3)
        fixed = f"glm_saga, {args.glm_saga_epochs} epochs"
        peers["glm_saga, its own stop"] = lambda: glm_saga(train, x, y, k, lam, epochs=1000, tol=1e-4)
        peers[fixed] = lambda: glm_saga(train, x, y, k, lam, epochs=args.glm_saga_epochs, tol=0.0)
        rounds.update({"glm_saga, its own stop": slow, fixed: slow})
    results = compare(lambda: fit_elastic_net(x, y, lam, alpha=ALPHA, tol=args.tol), peers, rounds)
    rows = []
    for name, entry in results.items():
        value = entry.pop("value")
        if name.startswith("ours"):
            w, b, steps = value.weight, value.bias, value.n_passes
        else:
            w, b, steps = value
        entry.update(
            objective=objective(x, y, w, b, lam),
            passes=steps,
            runs=2 * sum(rounds.values()) if name == "ours" else rounds[name],
        )
        entry["excess"] = entry["objective"] - (best.objective - best.gap)
        rows.append(
            [
                name,
                entry["wall"],
                entry["cpu"],
                entry.get("factor_wall", 1.0),
                entry.get("factor_cpu", 1.0),
                f"{entry['objective']:.8f}",
                f"{entry['excess']:.1e}",
                steps,
            ]
        )
    print(f"\n## {n} x {d}, {k} classes, lam {lam}, alpha {ALPHA}, tol {args.tol}\n")
    print(
        table(
            [
                "solver",
                "s (wall)",
                "s (CPU)",
                "factor (wall)",
                "factor (CPU)",
                "objective",
                "above the bound",
                "passes",
            ],
            rows,
        )
    )
    if train is None:
        print("\nglm_saga is not installed: absent from this run.")
    own = {name: entry for name, entry in results.items() if name.startswith("ours")}
    goals = {}
    for name, entry in results.items():
        least = 8 if name.startswith("scikit-learn") else 40 if name.startswith("glm_saga") else None
        if least is None:
            continue
        enough = {n: e for n, e in own.items() if e["objective"] <= entry["objective"]}
        if not enough:
            goals[f"{name}: at least {least} x at an objective not above"] = "no run of ours is as low"
            continue
        fastest = min(enough, key=lambda n: enough[n]["cpu"])
        factor = entry["cpu"] / enough[fastest]["cpu"]
        goals[f"{name}: at least {least} x at an objective not above"] = (
            f"{'yes' if factor >= least else 'NO'}, {factor:.1f} x in CPU time ({fastest})"
        )
    for goal_name, met in goals.items():
        print(f"\n{goal_name}: {met}")
    return {
        "rows": n,
        "columns": d,
        "classes": k,
        "lam": lam,
        "solvers": results,
        "goals": goals,
    }


def run_correlated(args: argparse.Namespace) -> dict[str, Any]:
    """Covariance of condition 1e4: passes and time against plain FISTA to the same objective."""
    out, rows = [], []
    for condition in (None, 1e4):
        x, y = problem(args.rows, args.columns, args.classes, condition=condition, seed=args.seed)
        for lam in (0.007, 0.001, 0.0003):
            goal = fit_elastic_net(x, y, lam, tol=args.tol)
            result = compare(
                lambda x=x, y=y, lam=lam: fit_elastic_net(x, y, lam, tol=args.tol),
                {
                    "fista": lambda x=x, y=y, lam=lam, g=goal.objective: fista(
                        x, y, args.classes, lam, stop_at=g + 1e-7, max_iter=4000
                    )
                },
                {"fista": max(1, args.repeats // 3)},
            )
            passes = result["fista"].pop("value")[2]
            result["ours"].pop("value")
            row = [
                "1e4" if condition else "none",
                lam,
                float(goal.nonzeros.double().mean()),
                goal.n_passes,
                passes,
                result["ours"]["cpu"],
                result["fista"]["cpu"],
                result["fista"]["factor_wall"],
                result["fista"]["factor_cpu"],
            ]
            rows.append(row)
            keys = [
                "condition",
                "lam",
                "nonzeros_per_class",
                "passes",
                "fista_passes",
                "cpu",
                "fista_cpu",
                "factor_wall",
                "factor_cpu",
            ]
            out.append(dict(zip(keys, row, strict=True)))
    print("\n## Correlated columns: to our objective + 1e-7 (FISTA is told when to stop; at most 4000 iterations)\n")
    print(
        table(
            [
                "condition",
                "lam",
                "nonzeros/class",
                "passes",
                "FISTA passes",
                "s (CPU)",
                "FISTA s (CPU)",
                "factor (wall)",
                "factor (CPU)",
            ],
            rows,
        )
    )
    return {"cases": out}


def run_growth(args: argparse.Namespace) -> dict[str, Any]:
    """CPU seconds against rows, columns and classes, the other two at 10,000, 256 and 20."""
    base = {"rows": 10_000, "columns": 256, "classes": 20}
    sweeps = {
        "rows": [2500, 10_000, 40_000, 160_000],
        "columns": [64, 256, 512, 1024],
        "classes": [5, 20, 80, 320],
    }
    out: dict[str, Any] = {}
    rows = []
    for axis, values in sweeps.items():
        out[axis] = []
        for value in values:
            size = {**base, axis: value}
            x, y = problem(size["rows"], size["columns"], size["classes"], seed=args.seed)
            y[: size["classes"]] = torch.arange(size["classes"])
            lam = 0.007 * 20 / size["classes"]
            ours = min(
                (timed(lambda x=x, y=y, lam=lam: fit_elastic_net(x, y, lam, tol=args.tol)) for _ in range(2)),
                key=lambda r: r[1],
            )
            goal = ours[2].objective + 1e-7
            peer = timed(
                lambda x=x, y=y, lam=lam, g=goal, k=size["classes"]: fista(x, y, k, lam, stop_at=g, max_iter=1000)
            )
            entry = {
                "value": value,
                "lam": lam,
                "cpu": ours[1],
                "passes": ours[2].n_passes,
                "fista_cpu": peer[1],
                "fista_passes": peer[2][2],
            }
            out[axis].append(entry)
            rows.append(
                [
                    axis,
                    value,
                    entry["cpu"],
                    entry["passes"],
                    entry["fista_cpu"],
                    entry["fista_passes"],
                ]
            )
    print("\n## Growth (others at 10,000 rows, 256 columns, 20 classes; lam 0.14 / classes)\n")
    print(
        table(
            ["axis", "value", "s (CPU)", "passes", "FISTA s (CPU)", "FISTA passes"],
            rows,
        )
    )
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), sharey=True, layout="constrained")
    for ax, (axis, entries) in zip(axes, out.items(), strict=True):
        at = [e["value"] for e in entries]
        ax.loglog(
            at,
            [e["cpu"] for e in entries],
            "o-",
            color="#0072b2",
            label="fit_elastic_net",
        )
        ax.loglog(
            at,
            [e["fista_cpu"] for e in entries],
            "s--",
            color="#d55e00",
            label="plain FISTA, told when to stop",
        )
        first = entries[0]["cpu"]
        ax.loglog(at, [first * v / at[0] for v in at], ":", color="0.6", label="proportional")
        ax.set_xlabel(axis)
        ax.set_xticks(at, [f"{v:,}" for v in at])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("CPU seconds")
    axes[0].legend(fontsize=8)
    figure.suptitle("Time to the same objective")
    figure.savefig(RESULTS / "solver_growth.png", dpi=120)
    plt.close(figure)
    return out


def run_path(args: argparse.Namespace) -> dict[str, Any]:
    """A warm-started path from all-zero to nearly dense, and the search for 25 nonzeros a class."""
    out: dict[str, Any] = {}
    rows = []
    for condition in (None, 1e4):
        x, y = problem(args.rows, args.columns, args.classes, condition=condition, seed=args.seed)
        wall, cpu, path = timed(lambda x=x, y=y: elastic_net_path(x, y, n_lams=20, lam_ratio=3e-3, tol=args.tol))
        search = timed(lambda x=x, y=y: elastic_net_path(x, y, nonzeros_per_class=25, tol=args.tol))
        entry = {
            "points": [
                {
                    "lam": r.lam,
                    "nonzeros_per_class": float(r.nonzeros.double().mean()),
                    "passes": r.n_passes,
                    "gap": r.gap,
                    "objective": r.objective,
                    "converged": r.converged,
                }
                for r in path
            ],
            "cpu": cpu,
            "wall": wall,
            "search": {
                "cpu": search[1],
                "wall": search[0],
                "solves": len(search[2]),
                "nonzeros_per_class": float(search[2].selected.nonzeros.double().mean()),
                "met": search[2].target_met,
            },
        }
        name = "1e4" if condition else "none"
        out[name] = entry
        points = entry["points"]
        for at in (1, len(points) // 2, len(points) - 1):
            p = points[at]
            rows.append([name, p["lam"], p["nonzeros_per_class"], p["passes"], p["gap"]])
        found = entry["search"]
        print(f"\ncondition {name}: 20 points in {cpu:.2f} s CPU; 25 nonzeros a class: {found['solves']} solves in")
        print(f"{found['cpu']:.2f} s CPU, hit {found['nonzeros_per_class']:.2f}")
    print("\n## Both ends of the path\n")
    print(table(["condition", "lam", "nonzeros/class", "passes", "gap"], rows))
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for (name, entry), color in zip(out.items(), ("#0072b2", "#d55e00"), strict=True):
        lams = [p["lam"] for p in entry["points"]]
        label = "independent columns" if name == "none" else "condition 1e4"
        left.semilogx(
            lams,
            [p["nonzeros_per_class"] for p in entry["points"]],
            "o-",
            color=color,
            label=label,
        )
        right.semilogx(lams, [p["passes"] for p in entry["points"]], "o-", color=color, label=label)
    for ax, text in (
        (left, "nonzero weights per class"),
        (right, "passes over the rows, warm start"),
    ):
        ax.set_xlabel("lam")
        ax.set_ylabel(text)
        ax.invert_xaxis()
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    figure.savefig(RESULTS / "solver_path.png", dpi=120)
    plt.close(figure)
    return out


def run_ridge(args: argparse.Namespace) -> dict[str, Any]:
    """One logistic vector under ridge, as for a concept against negatives: 188,160 rows, against sklearn's lbfgs."""
    from sklearn.linear_model import LogisticRegression

    rows, out = [], []
    for columns in (32, 160, 512):
        x, y = problem(188_160, columns, 2, condition=1e3, seed=args.seed)
        lam = 1e-3
        x_np, y_np = x.numpy(), y.numpy()

        def theirs(x_np: np.ndarray = x_np, y_np: np.ndarray = y_np, lam: float = lam) -> Any:
            return LogisticRegression(C=1 / (lam * len(y_np)), tol=args.tol, max_iter=1000).fit(x_np, y_np)

        result = compare(
            lambda x=x, y=y, lam=lam: fit_elastic_net(x, y, lam, alpha=0.0, loss="logistic", tol=args.tol),
            {"lbfgs": theirs},
            {"lbfgs": 1},
        )
        fit, model = result["ours"].pop("value"), result["lbfgs"].pop("value")
        z = x.double() @ torch.as_tensor(model.coef_).double().T + torch.as_tensor(model.intercept_).double()
        value = float(torch.nn.functional.binary_cross_entropy_with_logits(z[:, 0], y.double()))
        value += lam / 2 * float((model.coef_.astype(np.float64) ** 2).sum())
        row = [
            columns,
            result["ours"]["cpu"],
            result["lbfgs"]["cpu"],
            result["lbfgs"]["factor_wall"],
            result["lbfgs"]["factor_cpu"],
            fit.n_passes,
            int(model.n_iter_[0]),
            fit.objective - value,
        ]
        rows.append(row)
        out.append(
            dict(
                zip(
                    [
                        "columns",
                        "cpu",
                        "lbfgs_cpu",
                        "factor_wall",
                        "factor_cpu",
                        "passes",
                        "lbfgs_iterations",
                        "objective_minus_theirs",
                    ],
                    row,
                    strict=True,
                )
            )
        )
    print("\n## One logistic vector, ridge, 188,160 rows, covariance of condition 1e3\n")
    print(
        table(
            [
                "columns",
                "s (CPU)",
                "lbfgs s (CPU)",
                "factor (wall)",
                "factor (CPU)",
                "passes",
                "lbfgs iterations",
                "objective - theirs",
            ],
            rows,
        )
    )
    return {"cases": out}


def run_memory(args: argparse.Namespace) -> dict[str, Any]:
    """Solve from a memory map four times larger than the limit set on the process's memory."""
    limit = args.memory_limit_mb * 2**20
    columns, classes = 256, 5
    n = 4 * limit // (4 * columns)
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(args.seed)
        x = np.lib.format.open_memmap(f"{folder}/x.npy", mode="w+", dtype=np.float32, shape=(n, columns))
        y = np.empty(n, np.int64)
        w = rng.normal(size=(columns, classes)).astype(np.float32) * (rng.random((columns, classes)) < 0.05)
        for start in range(0, n, 50_000):
            part = rng.standard_normal((min(50_000, n - start), columns), dtype=np.float32)
            x[start : start + len(part)] = part
            y[start : start + len(part)] = (part @ w + rng.gumbel(size=(len(part), classes))).argmax(1)
        x.flush()
        del x
        np.save(f"{folder}/y.npy", y)
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "benchmarks.run.solver",
                "--memory-child",
                folder,
                "--memory-limit-mb",
                str(args.memory_limit_mb),
                "--tol",
                str(args.tol),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"the limited process failed:\n{done.stderr[-2000:]}")
    record = json.loads(done.stdout.splitlines()[-1])
    record["rows"], record["columns"], record["classes"] = n, columns, classes
    print("\n## Larger than memory\n")
    print(table(["figure", "value"], [[key, value] for key, value in record.items()]))
    return record


def memory_child(args: argparse.Namespace) -> None:
    """The limited process: RLIMIT_DATA covers the heap and every private writable mapping, PyTorch's own included."""
    limit = args.memory_limit_mb * 2**20
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    x = np.load(f"{args.memory_child}/x.npy", mmap_mode="r")
    y = np.load(f"{args.memory_child}/y.npy")
    try:
        np.array(x)
        loads = True
    except MemoryError:
        loads = False
    wall, cpu, result = timed(lambda: fit_elastic_net(x, y, 0.005, tol=args.tol))
    anonymous = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    print(
        json.dumps(
            {
                "limit_mb": args.memory_limit_mb,
                "file_mb": round(x.nbytes / 2**20),
                "loading_it_whole_works": loads,
                "data_segment_mb_at_the_end": int(anonymous.split()[1]) // 1024,
                "converged": result.converged,
                "gap": result.gap,
                "passes": result.n_passes,
                "wall": wall,
                "cpu": cpu,
            }
        )
    )


RUNS = {
    "peers": run_peers,
    "correlated": run_correlated,
    "path": run_path,
    "ridge": run_ridge,
    "growth": run_growth,
    "memory": run_memory,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--columns", type=int, default=256)
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--lam", type=float, default=0.007)
    parser.add_argument("--tol", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--repeats",
        type=int,
        default=6,
        help="rounds for the quick peers; slow ones get a third",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="torch threads, for us and for torch peers",
    )
    parser.add_argument("--glm-saga-path", default=None, help="folder that holds the glm_saga package")
    parser.add_argument("--glm-saga-epochs", type=int, default=150)
    parser.add_argument("--memory-limit-mb", type=int, default=1100)
    parser.add_argument("--memory-child", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_child:
        memory_child(args)
        return
    path = RESULTS / "solver.json"
    record = json.loads(path.read_text()) if path.exists() and set(args.only) != set(RUNS) else {}
    arguments = {k: v for k, v in vars(args).items() if k not in ("memory_child", "glm_saga_path", "only")}
    RESULTS.mkdir(exist_ok=True)
    for name in args.only:
        record[name] = {
            "environment": environment("scikit-learn", "glm_saga"),
            "arguments": arguments,
            **RUNS[name](args),
        }
        write("solver", record)


if __name__ == "__main__":
    main()
