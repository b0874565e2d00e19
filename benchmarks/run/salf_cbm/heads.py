"""The same heads on the features of every model: accuracy by the number of nonzero weights."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.salf_cbm import LAMS, Head, dense_head, scored, sparse_head
from benchmarks.run.salf_cbm.maps import accuracy_interval
from captum_concepts.models.salf_cbm.fit import fit_head, relax_head
from captum_concepts.solvers import fit_elastic_net, relaxed_fit

Split = tuple[Tensor, Tensor]


def heads(
    name: str,
    train: Split,
    test: Split,
    num_classes: int,
    most: list[int],
    *,
    on_average: bool = False,
    effective: int | None = None,
    lam: float | None = None,
    bottleneck: Tensor | None = None,
    relaxed: bool = False,
) -> tuple[list[dict[str, Any]], dict[int | None, Head]]:
    """A row for a sparse head of at most each of ``most`` nonzero weights a class, and one for a dense head.

    Args:
        name: of the model, for the rows.
        train, test: what the head sees, and labels.
        num_classes: K.
        most: see above.
        on_average: they are means over the classes, see :func:`~salf_cbm_peers.sparse_head`.
        effective: one more row, of a head with so many effective concepts per class on average (NEC, VLG-CBM).
        lam: one more row, of a sparse head of this strength.
        relaxed: one more row for each of ``most``, of the same weights refitted without the L1 penalty, at the strength
            that ``relax_head`` takes by itself.
        bottleneck: one more row, of a dense head of the library: what made the inputs of the backbone's features.

    Returns:
        The rows and the heads, by ``most`` (None: dense).
    """
    found: dict[int | None, Head] = {}
    for count in most:
        lams = 10 if on_average else LAMS  # bisection follows anyway where one point of the path is asked for
        found[count] = sparse_head(*train, test, most=count, num_classes=num_classes, on_average=on_average, lams=lams)
    found[None] = dense_head(*train, test, num_classes=num_classes)
    how = "about" if on_average else "at most"
    named = {"dense" if n is None else f"sparse, {how} {n} a class": head for n, head in found.items()}
    if relaxed:
        strength = inspect.signature(relax_head).parameters["lam"].default
        for count in most:
            support = found[count].result.weight != 0
            fit = relaxed_fit(*train, support, strength, num_classes=num_classes, standardize=True)
            named[f"sparse, {how} {count} a class, refitted"] = scored(fit, test)
    if effective is not None:
        averaged = sparse_head(*train, test, most=effective, num_classes=num_classes, on_average=True, lams=10)
        named[f"sparse, NEC={effective}"] = averaged
    if lam is not None:
        fit = fit_elastic_net(*train, lam, alpha=0.99, num_classes=num_classes, standardize=True)
        named[f"sparse, lam={lam:g}"] = scored(fit, test)
    rows = [
        {
            "model": name,
            "head": kind,
            "inputs": train[0].shape[1],
            "accuracy": accuracy_interval(head.hits),
            "nonzeros_a_class_mean": head.nonzeros_mean,
            "nonzeros_a_class_most": head.nonzeros_most,
            "lam": head.result.lam,
        }
        for kind, head in named.items()
    ]
    if bottleneck is not None:
        own = fit_head(*train, num_classes, head="dense", bottleneck=bottleneck)
        hits = ((test[0] - own.mean) / own.std @ own.weight.T + own.bias).argmax(1) == test[1]
        width, fits = train[0].shape[1], {"accuracy": accuracy_interval(hits.tolist()), "lam": own.notes["lam"]}
        counts = {"nonzeros_a_class_mean": width, "nonzeros_a_class_most": width}
        rows.append({"model": name, "head": "dense, of the library", "inputs": width, **counts, **fits})
    for row in rows:
        print(f"{name}, {row['head']}: {row['accuracy'][0]:.4f} ({row['nonzeros_a_class_mean']:.1f})", flush=True)
    return rows, found


def backbone_row(outputs: Tensor, labels: Tensor, name: str = "backbone, its own head") -> dict[str, Any]:
    """The row of the model that is explained."""
    hits = outputs.argmax(1) == labels
    return {"model": name, "head": "as trained", "inputs": None, "accuracy": accuracy_interval(hits.tolist())}


@torch.no_grad()
def install(model: Any, head: Head) -> None:
    """Put a head, fitted to the model's standardised activations, into the model."""
    weight, bias = head.result.raw()
    model.head.weight.copy_(weight)
    model.head.bias.copy_(bias)
