"""Does the memory of ``explain``, ``report`` and ``evaluate`` grow with the number of images?

    python -m benchmarks.run.commands_memory [--images 150 1500]

The bundled classifier and words fitted to it, scenes of 64 px: as files for ``explain`` and ``report``, drawn when they
are asked for in ``evaluate``. Each command runs in a process of its own, whose memory is read twice a second: the
greatest at the end, and that of each tenth of its time. ``audit`` stands in ``audit_streaming``.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from torchvision.utils import save_image

from benchmarks.record import add_functions, environment, sources, table, write
from captum_concepts import ConceptFusionMap, demo
from captum_concepts.datasets import CaptionedScenes

SIZE = 64
PROGRAM = """
import json, pathlib, sys
import benchmarks
from captum_concepts.__main__ import main
status = main(sys.argv[1:])
from benchmarks.record import functions
memory = pathlib.Path("/proc/self/status").read_text()  # a child's ru_maxrss counts its parent's memory too
peak = int(memory.split("VmHWM:")[1].split()[0]) / 1024
print("RESULT" + json.dumps([status, peak, functions()]))
"""


def words(path: Path) -> Path:
    """An explainer by words, as the README fits it."""
    classifier, clip = demo.load("classifier"), demo.load("clip")
    scenes = CaptionedScenes(200, seed=0, size=SIZE)
    fitted = ConceptFusionMap(classifier, ["layer1", "layer2", "layer3", "layer4"], map_layer="fused").fit(
        scenes.stack().image, clip, seed=0
    )
    return fitted.with_concepts(scenes.concepts, clip).save(path)


def resident(process: int) -> float:
    """MB of memory that the process holds now."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def run(command: list[str], ran: dict[str, list[str] | None]) -> dict[str, Any]:
    """Seconds, the greatest memory, and that of each tenth of the time."""
    begun = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", PROGRAM, *command], stdout=said, stderr=errors
        )
        held = []
        while process.poll() is None:
            held.append(resident(process.pid))
            time.sleep(0.5)
        seconds = time.perf_counter() - begun
        for file in (said, errors):
            file.seek(0)
        line = next((line for line in said if line.startswith("RESULT")), "RESULT[1, 0, {}]")
        status, peak, functions = json.loads(line.removeprefix("RESULT"))
        if status:
            raise SystemExit(f"{' '.join(command)} failed: {errors.read()[-2000:]}")
    add_functions(ran, functions)
    tenths = [max(part) for k in range(10) if (part := held[len(held) * k // 10 : len(held) * (k + 1) // 10])]
    return {"seconds": seconds, "peak_mb": peak, "mb_by_tenth": [round(one) for one in tenths]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, nargs="+", default=[150, 1500])
    arguments = parser.parse_args()
    rows, ran = [], {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        options = ["--model", "demo:classifier", "--explainer", str(words(folder / "words.safetensors"))]
        for count in arguments.images:
            files = folder / f"scenes{count}"
            files.mkdir()
            for i, scene in enumerate(CaptionedScenes(count, seed=1, size=SIZE)):
                save_image(scene.image.clamp(0, 1), files / f"{i:05d}.png")
            for name, data, output in (
                ("explain", str(files), ["--output", str(folder / f"explained{count}")]),
                ("report", str(files), ["--output", str(folder / f"report{count}.html")]),
                ("evaluate", f"demo:scenes:{count}", ["--n-bootstrap", "0"]),
            ):
                rows.append({"command": name, "images": count} | run([name, data, *options, *output], ran))
                print(rows[-1], flush=True)
    print(table(list(rows[0]), [list(row.values()) for row in rows]))
    record: dict[str, Any] = {"arguments": vars(arguments), "rows": rows}
    record["environment"] = {**environment(), "sources": sources(ran)}
    print(write("commands_memory", record))


if __name__ == "__main__":
    main()
