"""The papers' own tables by their protocols, for those who have the data: it cannot be had offline.

    python -m benchmarks.run.papers.tables --list                 # protocols, commands, published rows
    python -m benchmarks.run.papers.tables --table ce-fam-broden --root broden1_224 --train IMAGENET/train

Weights are local files (.safetensors) or "pretrained" (for the image-text model a tag), which downloads them. Each run
writes ``results/paper_<table>.json`` with the published rows before the measured ones, and the results page shows it.
The rows that know no concept, and maps made worse on purpose, are always there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Subset

from benchmarks.data.published import PROTOCOLS, PUBLISHED, Row
from benchmarks.peers.salf_cbm import dense_head, fit_lf_cbm, fit_p_cbm, scored, sparse_head
from benchmarks.record import environment, write
from benchmarks.run.map_tables import interval
from benchmarks.run.papers.inputs import classifier, image_text
from benchmarks.run.papers.maps import concept_regions, segmentation
from captum_concepts import fit_salf_cbm, published
from captum_concepts.activations import spatial_activations
from captum_concepts.commands.image_files import LabelledImages, labelled_images
from captum_concepts.concepts import Vocabulary
from captum_concepts.solvers import fit_elastic_net
from captum_concepts.vlm import RegionPrompt

#: Effective concepts per class of later papers' tables.
EFFECTIVE = 5


def accuracy(args: argparse.Namespace) -> list[Row]:
    """SALF-CBM, its peers and the backbone on class folders: the published concept list, grid and encoder."""
    if args.concepts is None or args.cache is None:
        raise SystemExit("--concepts FILE (a concept a line) and --cache FOLDER (for the regions) are needed")
    train, val = (labelled_images(str(Path(args.root) / split), args.size) for split in ("train", "val"))
    if train.classes != val.classes:
        raise SystemExit("ROOT/train and ROOT/val must hold the same class folders")
    lines = args.concepts.read_text(encoding="utf-8").splitlines()
    concepts = Vocabulary([line.strip() for line in lines if line.strip()])
    model = classifier(args.model, args.model_weights, args.device)
    encoder = image_text(args.encoder, args.encoder_weights, args.device)
    own = published.SALF_CBM_DATA[args.name]
    lam = own["lam"] if args.lam is None else args.lam
    presence = own["presence_cutoff"] if args.presence_cutoff == "published" else args.presence_cutoff

    y, labels = (torch.tensor(data.targets) for data in (train, val))
    rows = _peer_rows(args, model, encoder, train, val, concepts, lam)
    for head in ("sparse", "dense"):
        salf = fit_salf_cbm(
            model,
            args.layers[-1],
            train,
            encoder,
            concepts,
            len(train.classes),
            store_path=args.cache,
            lam=lam if head == "sparse" else None,
            head=head,
            prompt=RegionPrompt(**published.REGION_PROMPT),
            presence_cutoff=presence,
            interpretability_cutoff=args.interpretability_cutoff,
            show_progress=True,
        )
        hits = _outputs(salf, val, args.device).argmax(1) == labels
        rows.append(_accuracy_row(f"SALF-CBM, {head}", head, hits, args.name, concepts=len(salf.concepts)))
        if head == "sparse":
            seen = [_outputs(_Concepts(salf), data, args.device) for data in (train, val)]
            rows.append(_effective_row("SALF-CBM", seen, (y, labels), len(train.classes), args.name))
        if args.save is not None:
            salf.save_pretrained(args.save / head)
    common = labels == torch.tensor(train.targets).mode().values
    return [*rows, _accuracy_row("the most frequent class, always", "none", common, args.name)]


def _peer_rows(
    args: argparse.Namespace,
    model: nn.Module,
    encoder: Any,
    train: LabelledImages,
    val: LabelledImages,
    concepts: Vocabulary,
    lam: float,
) -> list[Row]:
    """The backbone with its own head, sparse and dense heads on its features, and LF-CBM."""
    y, labels = (torch.tensor(data.targets) for data in (train, val))
    classes = len(train.classes)
    logits = _outputs(model, val, args.device)
    rows = []
    if logits.shape[1] == classes:
        rows.append(_accuracy_row("backbone, its own head", "dense", logits.argmax(1) == labels, args.name))
    x, x_val = (_outputs(_Pooled(model, args.layers[-1]), data, args.device) for data in (train, val))

    def sparse(a: Tensor, b: Tensor) -> Tensor:  # activations of both splits
        fit = fit_elastic_net(a, y, lam, alpha=0.99, num_classes=classes, standardize=True)
        return torch.tensor(scored(fit, (b, labels)).hits)

    dense = torch.tensor(dense_head(x, y, (x_val, labels), num_classes=classes).hits)
    rows.append(_accuracy_row("backbone, sparse", "sparse", sparse(x, x_val), args.name))
    rows.append(_effective_row("backbone", (x, x_val), (y, labels), classes, args.name))
    rows.append(_accuracy_row("backbone's features, dense", "dense", dense, args.name))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[: args.peer_images]
    held, rest = order[: max(3, len(order) // 10)], order[max(3, len(order) // 10) :]
    text = concepts.encode(encoder)
    p = (
        F.normalize(_outputs(_Encoded(encoder), Subset(train, order.tolist()), args.device), dim=1)
        @ text.cpu().float().T
    )
    n = len(held)
    cut = -2.0 if args.interpretability_cutoff is None else args.interpretability_cutoff
    lf = fit_lf_cbm(x[rest], p[n:], list(concepts), (x[held], p[:n]), cutoff=cut)
    if not lf.concepts:
        raise SystemExit("LF-CBM's units follow none of the concepts; lower --interpretability-cutoff")
    pcbm = fit_p_cbm(x[rest], p[n:], list(concepts))
    for name, bottleneck in (("P-CBM", pcbm), ("LF-CBM", lf)):
        seen = bottleneck.activations(x), bottleneck.activations(x_val)
        rows.append(_accuracy_row(name, "sparse", sparse(*seen), args.name, concepts=len(bottleneck.concepts)))
        rows.append(_effective_row(name, seen, (y, labels), classes, args.name))
    return rows


def _effective_row(name: str, seen: Any, labels: tuple[Tensor, Tensor], classes: int, column: str) -> Row:
    """A head with five concepts per class on average: NEC=5 of VLG-CBM (Srivastava et al., NeurIPS 2024)."""
    (x, x_val), (y, y_val) = seen, labels
    head = sparse_head(x, y, (x_val, y_val), most=EFFECTIVE, num_classes=classes, on_average=True, lams=10)
    more = {"concepts": x.shape[1], "weights_per_class": head.nonzeros_mean}
    return _accuracy_row(f"{name}, NEC={EFFECTIVE}", f"NEC={EFFECTIVE}", torch.tensor(head.hits), column, **more)


def _accuracy_row(method: str, head: str, hits: Tensor, name: str, **more: Any) -> Row:
    return {"method": method, "head": head, **more, name: interval(hits.float())}


class _Concepts(nn.Module):
    """What a bottleneck's head sees."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.concept_activations(x).float()


class _Pooled(nn.Module):
    """Spatial means of a layer's maps."""

    def __init__(self, model: nn.Module, layer: str) -> None:
        super().__init__()
        self.model, self.layer = model, layer

    def forward(self, x: Tensor) -> Tensor:
        return spatial_activations(self.model, x, [self.layer]).maps[0].float().mean((2, 3))


class _Encoded(nn.Module):
    """An image-text model's image embeddings."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder.encode_image(x).float()


@torch.no_grad()
def _outputs(model: nn.Module, data: Any, device: str) -> Tensor:
    loader = torch.utils.data.DataLoader(data, batch_size=32)
    return torch.cat([model(x.to(device)).cpu() for x, _ in loader])


# ------------------------------------------------------------------------------------------------ command line

TABLES: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    "ce-fam-broden": concept_regions,
    "ce-fam-imagenet-s": concept_regions,
    "salf-segmentation": segmentation,
    "salf-accuracy": accuracy,
}


def _cutoff(text: str) -> float | str | None:
    return text if text == "published" else None if text == "none" else float(text)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the published rows and stop")
    parser.add_argument("--table", choices=TABLES)
    parser.add_argument("--root", help="the data set, as its reader in captum_concepts.datasets wants it")
    parser.add_argument("--split", help="of Broden (train, val; by default both) or ImageNet-S (validation)")
    parser.add_argument("--model", default="resnet50", help="a timm name or demo:classifier")
    parser.add_argument("--model-weights", default="pretrained", help="a .safetensors file or 'pretrained'")
    parser.add_argument("--layers", nargs="+", default=[f"net.layer{i}" for i in (1, 2, 3, 4)], help="last: explained")
    parser.add_argument("--encoder", default="ViT-B-16-quickgelu", help="an open_clip name or demo:clip")
    parser.add_argument("--encoder-weights", default="openai", help="a file or an open_clip tag")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--limit", type=int, help="only the first images: for a trial, not for a table")
    parser.add_argument("--cache", type=Path, help="folder for activations (ce-fam) or regions (salf-accuracy)")
    parser.add_argument("--train", type=Path, help="ce-fam: folder of images for the translator")
    parser.add_argument("--train-images", type=int, help="ce-fam: at most so many of them")
    parser.add_argument("--epochs", type=int, default=150, help="ce-fam: of the translator, at most")
    parser.add_argument("--crops", type=int, default=4, help="ce-fam: of each training image, drawn once")
    parser.add_argument(
        "--last-layer", action="store_true", help="ce-fam-broden: a translator of the last layer, as published for ViTs"
    )
    parser.add_argument(
        "--name", choices=published.SALF_CBM_DATA, default="ImageNet", help="salf-accuracy: column and settings"
    )
    parser.add_argument("--concepts", type=Path, help="salf-accuracy: a file with a concept a line")
    parser.add_argument("--lam", type=float, help="salf-accuracy: of the sparse heads; by default LF-CBM's")
    parser.add_argument("--presence-cutoff", type=_cutoff, default="published", help="a number or none")
    parser.add_argument("--interpretability-cutoff", type=_cutoff, default=0.45, help="a number or none")
    parser.add_argument("--peer-images", type=int, default=50_000, help="salf-accuracy: LF-CBM's units see so many")
    parser.add_argument("--save", type=Path, help="salf-accuracy: folder for both models")
    parser.add_argument("--salf", type=Path, help="salf-segmentation: a saved SALF-CBM whose concepts are the classes")
    parser.add_argument("--score-cam", action="store_true", help="salf-segmentation: a forward for every channel: slow")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = arguments(argv)
    if args.list:
        for name, (title, protocol, command) in PROTOCOLS.items():
            print(f"{name}: {title}", protocol, command, *PUBLISHED[name], "", sep="\n  ")
        return {}
    if args.table is None or args.root is None:
        sys.exit("--table and --root are needed; --list shows the tables")
    rows = TABLES[args.table](args)
    kept = {k: v for k, v in vars(args).items() if isinstance(v, (int, float, str, list)) and k not in ("root", "list")}
    kept = {k: Path(v).name if isinstance(v, str) and "/" in v else v for k, v in kept.items()}
    part = {
        "environment": environment("timm", "open-clip-torch", device=args.device),
        "arguments": kept,
        "tables": [{"title": args.table, "note": PROTOCOLS[args.table][1], "rows": PUBLISHED[args.table] + rows}],
    }
    record = {"parts": {args.table: part}}
    write(f"paper_{args.table.replace('-', '_')}", record)
    print(*compared(args.table, rows), sep="\n")
    return record


def compared(table: str, rows: list[Row]) -> list[str]:
    """One line per method, protocol and column: the paper's number, and ours under the same protocol.

    A published row stands beside ours of the same method and protocol; rows that only one side has are printed alone.
    """

    def numbers(row: Row) -> dict[str, Any]:
        return {
            k: v for k, v in row.items() if k not in ("method", "protocol", "head", "regions", "images", "concepts")
        }

    def shown(value: Any) -> str:
        value = value[0] if isinstance(value, list) else value
        return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)

    lines, used = [f"{table}: {PROTOCOLS[table][0]}", "method | protocol | column | paper | ours"], set()
    for row in PUBLISHED[table]:
        name, protocol = row["method"].removesuffix(" (published)"), row.get("protocol", row.get("head", ""))
        alike = [r for r in rows if r.get("protocol", r.get("head", "")) == protocol]
        own = next((r for r in alike if r["method"] == name), None)
        own = own or next((r for r in alike if r["method"].split(",")[0] == name), {})
        used.add(own.get("method"))
        for column, value in numbers(row).items():
            lines.append(" | ".join([name, protocol, column, shown(value), shown(own.get(column))]))
    for row in rows:
        if row["method"] not in used:
            for column, value in numbers(row).items():
                protocol = row.get("protocol", row.get("head", ""))
                lines.append(" | ".join([row["method"], protocol, column, "-", shown(value)]))
    return lines


if __name__ == "__main__":
    main()
