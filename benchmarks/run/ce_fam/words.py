"""Where is the word? Every method that can be asked, on scenes with exact masks, side by side. Needs no data.

    python -m benchmarks.run.ce_fam.words [--train 1000] [--scenes 20]

The classifier and the image-text model are the bundled ones. ConceptFusionMap's translator and the single-channel rules
see the same unlabelled scenes; SpatialACV sees crops of single objects; the words of grounds are left to the methods
that take any word. Held-out scenes, other seeds.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from benchmarks.peers import maps as peers
from benchmarks.record import environment, write
from benchmarks.run.map_tables import Explainer, measure
from captum_concepts import ConceptFusionMap, FeatureActivationMap, demo
from captum_concepts.datasets import CaptionedScenes

SEED = 50_001
LAYERS = ["layer2", "layer3", "layer4"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=1000)
    parser.add_argument("--scenes", type=int, default=20)
    args = parser.parse_args()
    model, clip = demo.load("classifier"), demo.load("clip")
    train = CaptionedScenes(args.train, seed=SEED, size=64)
    words = list(train.concepts)
    images = train.stack().image
    start = time.perf_counter()
    first = ConceptFusionMap(model, LAYERS).fit(images, clip, words, seed=0)
    fitted = time.perf_counter() - start
    print(f"translator: {fitted:.0f} s", flush=True)

    from benchmarks.run.fam.tasks import scene_words

    _, regions = scene_words(args.scenes, SEED + 1)

    def words_of(cefam: ConceptFusionMap) -> Explainer:
        return lambda x, target: cefam.attribute(x, target=target)

    def again(**options: Any) -> ConceptFusionMap:
        return first.with_options(**options)

    explainers: dict[str, Explainer] = {
        "CE-FAM, fused": words_of(again(map_layer="fused")),
        "CE-FAM, published map, top-1": words_of(again(map_layer="auto")),
        "CE-FAM, published map, branch gradient": words_of(again(map_layer="auto", gradient="branch")),
    }
    read = peers.activations(model, "layer4")
    for name, (channels,) in peers.channel_tables([read], clip, images, words, "cpu").items():
        explainers[f"{name}, single channel"] = peers.single_channel(read, channels)
    clip_layer = clip.model.visual.trunk.layer4
    bank = clip.encode_text(words)
    for weights in ("contribution", "gradient"):
        fam = FeatureActivationMap(clip.encode_image, clip_layer, bank, weights=weights)
        name = "FAM of the image-text model" + (", gradient" if weights == "gradient" else "")
        explainers[name] = lambda x, target, fam=fam: fam.attribute(x, target=target)
    score = lambda x: first.scores(x)  # noqa: E731
    note = (
        f"{len(regions)} regions of {len(words)} words in {args.scenes} held-out scenes. CE-FAM and single channels "
        "explain the bundled classifier, FAM the image tower of the image-text model itself."
    )
    made = measure("words, scenes", note, explainers, regions, score=score, energy=read)
    part = {
        "environment": environment("open-clip-torch"),
        "arguments": {**vars(args), "layers": LAYERS, "seed": SEED, "seconds_to_fit": round(fitted, 1)},
        "tables": [made.record()],
    }
    write("concept_words", {"parts": {"scenes": part}})


if __name__ == "__main__":
    main()
