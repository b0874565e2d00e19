"""What `explain` on a folder of photographs costs, in readings plus bare forward passes, beside pytorch-grad-cam.

    python -m benchmarks.run.explain_command ../shared/data [--images 60] [--repeats 5]

A real MobileNetV2, and a ResNet-50 with random weights, which cost as much as others; photographs as they are
(Flickr8k) and enlarged to 12 million pixels, as cameras write them. In turn, in one process: each photograph read at
the model's size and passed through the model; the whole command (three maps per image, a PNG of input, maps and scale);
and the usual script of pytorch-grad-cam: the map of the predicted class over the cropped input, a PNG, and one for each
of three classes, without the gradients of the weights, which it does not need. Processor time, because it does not
depend on what else runs.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file

from benchmarks import record as _record
from captum_concepts.commands.explain import ExplainSettings, explain
from captum_concepts.commands.models import LoadedModel

TOP = 3


def bare(loaded: LoadedModel, files: list[Path]) -> None:
    """Reading and forward passes alone."""
    with torch.no_grad():
        for image in loaded.open(files):
            loaded.model(loaded.prepare(image[None]))


def grad_cam(loaded: LoadedModel, files: list[Path], folder: Path, classes: int) -> None:
    """The script of pytorch-grad-cam's README, with this reader."""
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.image import show_cam_on_image
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    layer = "features" if hasattr(loaded.model, "features") else "layer4"
    with GradCAM(loaded.model, [loaded.model.get_submodule(layer)]) as cam:
        for file, image in zip(files, loaded.open(files), strict=True):
            inputs = loaded.prepare(image[None]).requires_grad_()
            best: list[int | None] = [None]
            if classes > 1:
                with torch.no_grad():
                    best = list(loaded.model(inputs)[0].topk(classes).indices.tolist())
            for k, target in enumerate(best):
                heat = cam(inputs, None if target is None else [ClassifierOutputTarget(target)])[0]
                shown = show_cam_on_image(image.permute(1, 2, 0).numpy(), heat, use_rgb=True)
                Image.fromarray(shown).save(folder / f"{file.stem}-{k}.png")


def measure(files: list[Path], model: str, weights: Path, repeats: int) -> dict[str, Any]:
    """Milliseconds of processor time per image, and how many times reading plus forward passes that is."""
    settings = {"model": model, "weights": str(weights), "top_k": TOP}
    loaded = ExplainSettings(images=[], **settings).load()  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)

        def command() -> None:
            with tempfile.TemporaryDirectory() as own:
                explain(ExplainSettings(images=[str(file) for file in files], output=own, **settings))  # type: ignore[arg-type]

        functions: dict[str, Callable[[], None]] = {"reading and forward passes": lambda: bare(loaded, files)}
        functions["explain, three maps"] = command
        functions["pytorch-grad-cam, one map"] = lambda: grad_cam(loaded, files, out, 1)
        functions["pytorch-grad-cam, three maps"] = lambda: grad_cam(loaded, files, out, TOP)
        seconds: dict[str, list[float]] = {name: [] for name in functions}
        for k in range(repeats + 1):  # the first is not counted
            for name, function in functions.items():
                begun = time.process_time()
                function()
                if k:
                    seconds[name].append(time.process_time() - begun)
    first = seconds["reading and forward passes"]
    return {
        name: {
            "ms per image": 1000 * statistics.median(own) / len(files),
            "x reading and forward passes": statistics.median(a / b for a, b in zip(own, first, strict=True)),
        }
        for name, own in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    files = sorted((args.data / "images" / "flickr8k").rglob("*.jpg"))[: args.images]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        large = []
        for file in files[: max(args.images // 5, 1)]:
            with Image.open(file) as image:
                scale = (12e6 / (image.width * image.height)) ** 0.5
                wide = image.convert("RGB").resize((round(image.width * scale), round(image.height * scale)))
            large.append(Path(folder) / file.name)
            wide.save(large[-1], quality=92)
        random = Path(folder) / "resnet50.safetensors"
        save_file(torchvision.models.resnet50().state_dict(), random)
        real = args.data / "models" / "mobilenet_v2_imagenet.safetensors"
        cases = (("mobilenet_v2", real, "500 px", files), ("mobilenet_v2", real, "12 million pixels", large),
                 ("resnet50", random, "500 px", files))  # fmt: skip
        for model, weights, kind, own in cases:
            for name, found in measure(own, model, weights, args.repeats).items():
                rows.append({"model": model, "photographs": f"{len(own)} of {kind}", "what": name, **found})
                print(rows[-1], flush=True)
    setting = "one image at a time, processor time"
    record = {**_record.environment("grad-cam", "pillow"), "setting": setting, "repeats": args.repeats, "rows": rows}
    print(_record.write("explain_command", record))


if __name__ == "__main__":
    main()
