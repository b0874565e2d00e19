"""Cost of FeatureActivationMap beside a bare forward pass, Captum's LayerGradCam and pytorch-grad-cam's GradCAM.

    python -m benchmarks.run.fam.cost [--repeats 9]

ResNet-50 with random weights (time and memory do not depend on them), 8 images of 224 px, in one process and in turn.
Embedding methods explain the similarity to a reference; the peers need a classifier head and explain a class.
"""

from __future__ import annotations

import argparse
import gc

import torch
import torchvision
from captum.attr import LayerGradCam

from benchmarks.record import environment, median_times, peak_mib, table, write
from captum_concepts import FeatureActivationMap


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    classifier = torchvision.models.resnet50().eval().to(args.device)
    encoder = torchvision.models.resnet50().eval().to(args.device)
    encoder.fc = torch.nn.Identity()
    images = torch.rand(8, 3, 224, 224, device=args.device)
    bank = torch.rand(10, 2048, device=args.device)
    linear = torch.nn.Sequential(encoder, torch.nn.Linear(2048, 512)).to(args.device).eval()
    fam = FeatureActivationMap(encoder, "layer4", bank)
    fam_linear = FeatureActivationMap(linear, encoder.layer4, bank[:, :512])
    grad_cam = LayerGradCam(classifier, classifier.layer4)

    def synchronised(function):
        def run():
            function()
            if args.device == "cuda":
                torch.cuda.synchronize()

        return run

    def bare() -> None:
        with torch.no_grad():
            encoder(images)

    functions = {
        "bare forward": bare,
        "FAM, embedding = pooled maps": lambda: fam.attribute(images, target=0),
        "FAM, linear head": lambda: fam_linear.attribute(images, target=0),
        "captum LayerGradCam": lambda: grad_cam.attribute(images, target=0),
    }
    packages = ["torchvision"]
    try:
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    except ImportError:
        print("pytorch-grad-cam is not installed (pip install '.[benchmark]'): its row is missing")
    else:
        packages.append("grad-cam")
        peer = GradCAM(classifier, [classifier.layer4])
        functions["pytorch-grad-cam GradCAM"] = lambda: peer(images, [ClassifierOutputTarget(0)] * 8)
    seconds = median_times({name: synchronised(f) for name, f in functions.items()}, repeats=args.repeats)
    ratios = {name: value / seconds["bare forward"] for name, value in seconds.items()}
    print(table(["method", "seconds", "x bare forward"], [[n, seconds[n], ratios[n]] for n in seconds]))

    peaks = {}
    for done in range(0, 500, 10):
        fam.attribute(torch.rand(10, 3, 224, 224, device=args.device), target=0)
        gc.collect()
        if done + 10 in (50, 100, 250, 500):
            peaks[done + 10] = round(peak_mib(), 1)
    print("\nPeak memory of the process (MiB) after a stream of images:", peaks)
    path = write(
        "fam",
        {
            "environment": environment(*packages, device=args.device),
            "setting": "ResNet-50, 8 x 3 x 224 x 224, random weights, seed 0",
            "repeats": args.repeats,
            "median_seconds": seconds,
            "ratio_to_bare_forward": ratios,
            "peak_mib_after_images": peaks,
        },
    )
    print(f"written to {path.name}")


if __name__ == "__main__":
    main()
