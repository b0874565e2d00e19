"""`audit` and `explore`: what they write, say and return, of folders of images on disk."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from captum_concepts import SpatialACV, audit_dataset
from captum_concepts.__main__ import main
from captum_concepts.audit import ConceptAudit
from captum_concepts.datasets import CaptionedScenes
from captum_concepts.images import load_image

# Red and blue disks; `lean` of the evidence is the ground, light or dark.
MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, lean):
        super().__init__()
        self.colors = nn.Conv2d(3, 4, 1)
        self.colors.weight.data = torch.tensor([[3., -3, -3], [-3, -3, 3], [2, 2, 2], [-2, -2, -2]])[:, :, None, None]
        self.colors.bias.data = torch.tensor([-1., -1, -3, 3])
        self.act = nn.ReLU()
        self.head = nn.Linear(4, 2)
        self.head.weight.data = torch.tensor([[9., -9, lean, -lean], [-9, 9, -lean, lean]])
        self.head.bias.data.zero_()

    def forward(self, x):
        return self.head(self.act(self.colors(x)).mean((2, 3)))

def biased():
    return Net(0.6)

def fair():
    return Net(0.0)
"""
CLASSES = ("red disk", "blue disk")


def disk(generator: torch.Generator, color: int, light: bool) -> torch.Tensor:
    level = 0.8 + 0.1 * torch.rand((), generator=generator) if light else 0.1 * torch.rand((), generator=generator)
    image = level.expand(3, 32, 32) + 0.04 * torch.rand(3, 32, 32, generator=generator)
    y, x = torch.randint(8, 24, (2,), generator=generator).tolist()
    rows = torch.arange(32.0)
    radius = 4 + 4 * float(torch.rand((), generator=generator))
    inside = (rows[:, None] - y) ** 2 + (rows - x) ** 2 < radius**2
    shade = torch.full((3,), 0.05)
    shade[0 if color == 0 else 2] = 0.9
    return torch.where(inside, shade[:, None, None], image)


def save(image: torch.Tensor, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()).save(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model file, ``val`` with a folder per class and one broken file, and vectors of both grounds and disks."""
    root = tmp_path_factory.mktemp("audit")
    (root / "net.py").write_text(MODEL)
    g = torch.Generator().manual_seed(0)
    for k, name in enumerate(CLASSES):
        for i in range(60):
            save(disk(g, k, light=i % 2 == 0), root / "val" / name / f"{i:02}.png")
    (root / "val" / CLASSES[1] / "broken.png").write_bytes(b"nothing")
    sys.path.insert(0, str(root))
    try:
        import net
    finally:
        sys.path.remove(str(root))
    examples = {
        "light": 0.8 + 0.2 * torch.rand(12, 1, 1, 1, generator=g).expand(-1, 3, 16, 16),
        "dark": 0.1 * torch.rand(12, 1, 1, 1, generator=g).expand(-1, 3, 16, 16),
    }
    for name in ("biased", "fair"):
        noise = 0.04 * torch.rand(12, 3, 16, 16, generator=g)
        acv = SpatialACV(getattr(net, name)(), "act").fit({key: value + noise for key, value in examples.items()})
        acv.save(root / f"{name}.safetensors")
    return root


def audit(folder: Path, tmp_path: Path, which: str = "biased", *more: str) -> list[str]:
    given = ["--model", f"{folder}/net.py:{which}", "--explainer", str(folder / f"{which}.safetensors"), "--size", "32"]
    return ["audit", str(folder / "val"), *given, "--output", str(tmp_path / "audit.html"), *more]


class TestAudit:
    def test_page_file_json_and_the_broken_image(self, folder, tmp_path, capsys):
        code = main(audit(folder, tmp_path, "biased", "--save", str(tmp_path / "a.safetensors"), "--json"))
        said = capsys.readouterr()
        assert code == 1  # the broken file
        assert "broken.png" in said.err
        made = json.loads(said.out)
        assert made["images"] == 120
        pairs = {(one["class"], one["concept"]) for one in made["suspects"]}
        assert pairs == {("red disk", "light"), ("blue disk", "dark")}
        html = (tmp_path / "audit.html").read_text()
        assert html.count("data:image/") >= 12
        assert "Suspected shortcuts" in html
        kept = ConceptAudit.load(tmp_path / "a.safetensors")
        assert {(s.class_name, s.concept) for s in kept.suspects()} == pairs
        assert sorted({name.split("/")[-1] for name in kept.image_names})[0].startswith("00")

    def test_it_is_what_the_library_says(self, folder, tmp_path, capsys):
        main(audit(folder, tmp_path, "biased", "--save", str(tmp_path / "a.safetensors")))
        capsys.readouterr()
        kept = ConceptAudit.load(tmp_path / "a.safetensors")
        sys.path.insert(0, str(folder))
        try:
            import net
        finally:
            sys.path.remove(str(folder))
        acv = SpatialACV.load(folder / "biased.safetensors", net.biased())
        files = [folder / "val" / name / f"{i:02}.png" for name in sorted(CLASSES) for i in range(60)]
        labels = [CLASSES.index(path.parent.name) for path in files]
        images = torch.stack([load_image(path) for path in files])
        mine = audit_dataset(acv, images, labels=labels, class_names=kept.class_names)
        numbers = [[(s.raises, s.lowers) for s in one.suspects()] for one in (kept, mine)]
        torch.testing.assert_close(torch.tensor(numbers[0]), torch.tensor(numbers[1]))

    def test_against_and_fail_on(self, folder, tmp_path, capsys):
        kept = str(tmp_path / "fair.safetensors")
        assert main(audit(folder, tmp_path, "fair", "--save", kept, "--fail-on", "suspects>0")) == 1
        assert "0 suspects" in capsys.readouterr().out
        worse = audit(folder, tmp_path, "biased", "--against", kept, "--fail-on", "gained>0")
        assert main(worse) == 3
        said = capsys.readouterr().out
        assert "gained>0: true" in said
        assert "suspects gained: 2" in said
        assert main([*worse[:-1], "accuracy_change>0.9", "--json"]) == 1
        found = json.loads(capsys.readouterr().out)
        assert found["holds"] is False
        assert len(found["against"]["gained"]) == 2

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            (["--fail-on", "suspects are bad"], "is not a condition"),
            (["--fail-on", "suspects>1.2.3"], "is not a number"),
            (["--fail-on", "gained>0"], "not known without --against"),
            (["--against", "nowhere.safetensors"], "nowhere.safetensors"),
            (["--alpha", "2"], "alpha must be"),
            (["--top-k", "0"], "top_k must be"),
        ],
    )
    def test_what_is_wrong_is_said(self, folder, tmp_path, capsys, more, message):
        assert main(audit(folder, tmp_path, "biased", *more)) == 2
        assert message in capsys.readouterr().err

    def test_without_class_folders_there_is_nothing_to_suspect(self, folder, tmp_path, capsys):
        flat = tmp_path / "flat"
        flat.mkdir()
        for path in (folder / "val" / CLASSES[0]).glob("0*.png"):
            shutil.copy(path, flat)
        command = audit(folder, tmp_path)
        assert main([command[0], str(flat), *command[2:]]) == 0
        assert "suspects" not in capsys.readouterr().out
        assert "the true classes are not known" in (tmp_path / "audit.html").read_text()

    def test_two_processes_write_what_one_writes(self, folder, tmp_path, capfd):
        alone = audit(folder, tmp_path, "biased", "--save", str(tmp_path / "alone.safetensors"))
        assert main(alone) == 1
        page = (tmp_path / "audit.html").read_bytes()
        capfd.readouterr()
        more = ["--save", str(tmp_path / "both.safetensors"), "--store", str(tmp_path / "parts")]
        program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [*program, "-m", "captum_concepts", *audit(folder, tmp_path, "biased", *more)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.stdout.count("ConceptAudit(") == 1, done.stderr
        assert (tmp_path / "both.safetensors").read_bytes() == (tmp_path / "alone.safetensors").read_bytes()
        assert (tmp_path / "audit.html").read_bytes() == page


class TestExplore:
    @pytest.fixture(scope="class")
    def scenes(self, tmp_path_factory) -> Path:
        folder = tmp_path_factory.mktemp("scenes")
        for i, image in enumerate(CaptionedScenes(5, seed=78, size=64).stack().image):
            save(F.interpolate(image[None], (80, 64))[0], folder / f"{i}.png")
        (folder / "broken.png").write_bytes(b"nothing")
        return folder

    def test_a_page_of_concept_vectors(self, folder, tmp_path, capsys):
        images = folder / "val" / CLASSES[1]
        given = ["--model", f"{folder}/net.py:biased", "--explainer", str(folder / "biased.safetensors")]
        out = tmp_path / "new" / "page.html"
        command = ["explore", str(images), *given, "--size", "32", "--output", str(out), "--title", "<disks>"]
        assert main([*command, "--json"]) == 1
        said = capsys.readouterr()
        assert json.loads(said.out)["images"] == 60
        assert "broken.png" in said.err
        html = out.read_text()
        assert "&lt;disks&gt;" in html
        assert len(re.findall(r"data:image/", html)) >= 60

    def test_outputs_of_the_bundled_classifier(self, scenes, tmp_path, capsys):
        out = tmp_path / "page.html"
        assert main(["explore", str(scenes), "--model", "demo:classifier", "--output", str(out)]) == 1
        assert "5 images to explore in" in capsys.readouterr().out
        assert "striped circle" in out.read_text()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["nowhere"], "nowhere"),
            ([".", "--output", "."], "is a folder"),
        ],
    )
    def test_what_is_wrong_is_said(self, arguments, message, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        assert main(["explore", "--output", "page.html", "--model", "demo:classifier", *arguments]) == 2
        assert message in capsys.readouterr().err
