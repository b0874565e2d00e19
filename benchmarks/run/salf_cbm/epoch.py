"""One epoch of SALF-CBM's bottleneck from the store and the feature cache, against merely reading them.

    python -m benchmarks.run.salf_cbm.epoch [--images 2048] [--repeats 3]

Three costs on the same files, each for all images once:

- bytes: all embeddings and features read into memory, in the epoch's random batches;
- P: ``store.similarity(text)``, chunk by chunk, which is one matrix product with the texts, and the features read;
- epoch: the training epoch, which besides P computes the maps, the loss, and the gradient (two more matrix products of
  the features' width).

The embeddings and features are random numbers of the shapes that CLIP ViT-B/32 (512) and the named backbones give on
7 x 7 places; time does not depend on them.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import record as _record
from captum_concepts.models.salf_cbm.fit.bottleneck import _batches, _State
from captum_concepts.models.salf_cbm.fit.objective import Samples, Validation, batch_similarity
from captum_concepts.models.salf_cbm.fit.settings import BottleneckSettings
from captum_concepts.store import ShardReader, ShardWriter, Similarity

PLACES, EMBEDDING = 49, 512


class Rows:
    """A sharded store read as features or as region embeddings."""

    grid = (7, 7)
    prompt = range(PLACES)

    def __init__(self, path: Path, images: int, width: int) -> None:
        generator = torch.Generator().manual_seed(width)
        with ShardWriter(path, {}, shard_rows=256) as writer:
            for _ in range(0, images, 256):
                rows = torch.randn(256, PLACES, width, generator=generator)
                writer.append({"rows": F.normalize(rows, dim=2).half()})
        self._reader = ShardReader(path)
        self.dim = self.embedding_dim = width

    def rows(self, index: Any) -> torch.Tensor:
        """Some of them."""
        return self._reader.rows("rows", range(len(self))[index] if isinstance(index, slice) else index)

    embeddings = rows

    def __len__(self) -> int:
        return len(self._reader)


@torch.no_grad()
def measure(images: int, width: int, concepts: int, repeats: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        features = Rows(Path(folder) / "features", images, width)
        regions = Rows(Path(folder) / "regions", images, EMBEDDING)
        text = F.normalize(torch.randn(concepts, EMBEDDING), dim=1)
        samples = Samples(features, regions, torch.arange(images))
        settings = BottleneckSettings(init="random")
        held_out = Samples(features, regions, torch.arange(64))
        state = _State(settings, held_out, text, None, Validation(held_out, text), None)
        batches = _batches(samples.rows, settings, 0)

        def read() -> None:
            for part in batches:
                samples.read(part)

        def similarity() -> None:
            for part in batches:
                features.rows(part.numpy())
            for _ in Similarity(regions, text, 512):
                pass

        def epoch() -> None:
            for part, (f, e) in zip(batches, samples.batches(batches), strict=True):
                state.step(f, e, len(part))

        def arithmetic() -> None:
            f, e = held
            for _ in batches:
                batch_similarity(f, e, state.weight(), text, len(f))

        held = samples.read(batches[0])
        works = {"bytes": read, "P": similarity, "epoch": epoch, "arithmetic": arithmetic}
        found = _record.median_times(works, repeats=repeats)
    products = 2 * images * PLACES * concepts * (EMBEDDING + 2 * width)
    return {
        "features": width,
        "concepts": concepts,
        **{f"{name}_s": found[name] for name in ("bytes", "P", "epoch")},
        "epoch/bytes": found["epoch"] / found["bytes"],
        "epoch/P": found["epoch"] / found["P"],
        "arithmetic": found["arithmetic"] / found["epoch"],
        "GFLOP/s": products / found["epoch"] / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for width, concepts in ((512, 20), (512, 100), (512, 1000), (1280, 100), (2048, 500)):
        rows.append(measure(arguments.images, width, concepts, arguments.repeats))
        print(_record.table(list(rows[0]), [list(row.values()) for row in rows]), flush=True)
    record = {**_record.environment(), "images": arguments.images, "repeats": arguments.repeats, "rows": rows}
    print(_record.write("salf_epoch", record))


if __name__ == "__main__":
    main()
