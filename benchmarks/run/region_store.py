"""Region embeddings: throughput of a build against the bare encoder, size on disk, P against drawing naively.

    python -m benchmarks.run.region_store [--images 24] [--repeats 5]

The bare encoder embeds the same pictures, drawn beforehand and held in memory, in batches of the same size; loading,
drawing, hashing, writing and fsync are thus all cost of the store. Both run in turn in every repeat. The encoder is
open_clip's ViT-B-32 with random weights (time does not depend on them) on images of 224 px, the paper's 7 x 7 circles;
a second row is a convolutional encoder a few times faster, where there is less to hide behind.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from benchmarks import record as _record
from captum_concepts.errors import InputWarning
from captum_concepts.store import RegionEmbeddingStore
from captum_concepts.vlm import OpenCLIPEncoder, RegionPrompt

BATCH = 49


class MobileNet(nn.Module):
    """MobileNetV2's pooled features as an image encoder."""

    logit_scale, logit_bias = 100.0, 0.0

    def __init__(self) -> None:
        super().__init__()
        self.features = torchvision.models.mobilenet_v2(weights=None).features.eval()

    def encode_image(self, images: Tensor) -> Tensor:
        return self.features(images).mean((2, 3))


def vit() -> OpenCLIPEncoder:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InputWarning)
        return OpenCLIPEncoder.from_pretrained("ViT-B-32")


@torch.no_grad()
def bare(encoder: nn.Module, views: Tensor) -> float:
    start = time.perf_counter()
    for part in views.split(BATCH):
        encoder.encode_image(part)
    return time.perf_counter() - start


def measure(name: str, encoder: nn.Module, prompt: RegionPrompt, images: Tensor, repeats: int) -> dict[str, object]:
    views = prompt.draw(images).flatten(0, 1)
    bare(encoder, views[:BATCH])
    times: dict[str, list[float]] = {"bare": [], "store": []}
    for _ in range(repeats):
        times["bare"].append(bare(encoder, views))
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            store = RegionEmbeddingStore.build(folder, images, encoder, prompt, batch_size=BATCH)
            whole = time.perf_counter() - start
            once = opening(folder, images, encoder, prompt)
            times["store"].append(whole - once)
            raw = store.expected_bytes(len(images), prompt, store.embedding_dim)
            size = store.nbytes / raw
            with torch.no_grad():
                unit = nn.functional.normalize(
                    torch.cat([encoder.encode_image(v) for v in views[:98].split(BATCH)]), dim=1
                )
            text = nn.functional.normalize(
                torch.randn(20, unit.shape[1], generator=torch.Generator().manual_seed(0)), dim=1
            )
            p = store.similarity(text)[:2].flatten(2).transpose(1, 2).flatten(0, 1)
            error = float((p - unit @ text.T).abs().max())
            bound = store.error_bound
    ratios = [b / s for b, s in zip(times["bare"], times["store"], strict=True)]
    return {
        "encoder": name,
        "prompt": prompt.kind,
        "pictures": len(views),
        "bare_ms_a_picture": 1000 * statistics.median(times["bare"]) / len(views),
        "store_ms_a_picture": 1000 * statistics.median(times["store"]) / len(views),
        "throughput_ratio": statistics.median(ratios),
        "throughput_ratio_each": [round(r, 4) for r in ratios],
        "recognising_encoder_and_data_s": once,
        "size_over_N_hw_D_2_bytes": size,
        "largest_error_of_P": error,
        "bound_on_error_of_P": bound,
    }


def opening(folder: str, images: Tensor, encoder: nn.Module, prompt: RegionPrompt) -> float:
    """What a build costs once, however many images: hashing the weights, the test image, checking a sample."""
    start = time.perf_counter()
    RegionEmbeddingStore.build(Path(folder), images, encoder, prompt, batch_size=BATCH)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    images = torch.rand(arguments.images, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    rows = []
    for name, make in (("ViT-B-32", vit), ("MobileNetV2", MobileNet)):
        encoder = make()
        for kind in ("circle", "crop"):
            rows.append(measure(name, encoder, RegionPrompt(kind, (7, 7), 32), images, arguments.repeats))
            columns = ["encoder", "prompt", "throughput_ratio", "size_over_N_hw_D_2_bytes", "largest_error_of_P"]
            print(_record.table(columns, [[row[c] for c in columns] for row in rows]), flush=True)
            record = {**_record.environment("open-clip-torch"), "images": arguments.images, "batch_size": BATCH}
            record |= {"repeats": arguments.repeats, "rows": rows}
            print(_record.write("region_store", record))


if __name__ == "__main__":
    main()
