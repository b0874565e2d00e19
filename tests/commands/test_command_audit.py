"""`audit`: what it writes, says and returns, of a folder of images on disk."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from captum_concepts import SpatialACV, audit_dataset
from captum_concepts.__main__ import main
from captum_concepts.audit import ConceptAudit
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
CLASSES = ("red disk", "blue disk")  # as the outputs are, not as folders are sorted


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
    (root / "classes.txt").write_text("\n".join(CLASSES))
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
        acv = SpatialACV(getattr(net, name)(), "colors").fit({key: value + noise for key, value in examples.items()})
        acv.save(root / f"{name}.safetensors")
    return root


def audit(folder: Path, tmp_path: Path, which: str = "biased", *more: str) -> list[str]:
    given = ["--model", f"{folder}/net.py:{which}", "--explainer", str(folder / f"{which}.safetensors"), "--size", "32"]
    if "--classes" not in more:
        given += ["--classes", str(folder / "classes.txt")]
    return ["audit", str(folder / "val"), *given, "--output", str(tmp_path / "audit.html"), *more]


class TestAudit:
    def test_page_file_json_and_the_broken_image(self, folder, tmp_path, capsys):
        code = main(audit(folder, tmp_path, "biased", "--save", str(tmp_path / "a.safetensors"), "--json"))
        said = capsys.readouterr()
        assert code == 1, said.err  # the broken file
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
        both = [{(s.class_name, s.concept): (s.raises, s.lowers) for s in one.suspects()} for one in (kept, mine)]
        # The command reads its images in other batches, which round otherwise.
        assert {k: pytest.approx(v, rel=1e-4) for k, v in both[0].items()} == both[1]

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
            (["--fail-on", "gained>0"], "pass --against FILE"),
            (["--fail-on", "accuracy_change<0"], "pass --against FILE"),
            (["--against", "nowhere.safetensors"], "nowhere.safetensors"),
            (["--alpha", "2"], "alpha must be"),
            (["--top-k", "0"], "top_k must be"),
            (["--save", "audit.png"], "--save 'audit.png' must end in .safetensors"),
            (["--references", "classes"], "--references would have no effect"),
            (["--layer", "0"], "--layer would have no effect"),
            (["--words", "light"], "--words would have no effect"),
        ],
    )
    def test_what_is_wrong_is_said(self, folder, tmp_path, capsys, more, message):
        assert main(audit(folder, tmp_path, "biased", *more)) == 2
        assert message in capsys.readouterr().err

    def test_a_condition_without_labels_is_refused_before_the_work(self, folder, tmp_path, capsys):
        """Nothing is suspected where nothing is known; that must not read as "nothing is wrong"."""
        line = audit(folder, tmp_path, "biased", "--fail-on", "suspects>0")
        line[1] = str(folder / "val" / CLASSES[0])
        assert main(line) == 2
        assert "--fail-on 'suspects>0' needs the true classes" in capsys.readouterr().err
        assert main(line[:-2]) == 0

    def test_the_classes_themselves_are_no_suspects(self, folder, tmp_path, capsys):
        """Of a model's own outputs no condition on suspects may hold unseen."""
        line = ["audit", str(folder / "val"), "--model", f"{folder}/net.py:biased", "--size", "32"]
        assert main([*line, "--output", str(tmp_path / "audit.html"), "--fail-on", "suspects>0"]) == 2
        assert "pass --explainer or --words" in capsys.readouterr().err

    def test_a_class_folder_without_images_is_named(self, folder, tmp_path, capsys):
        shutil.copytree(folder / "val", tmp_path / "val")
        (tmp_path / "val" / "zebra").mkdir()
        line = audit(folder, tmp_path, "biased")
        line[1] = str(tmp_path / "val")
        assert main(line) == 2
        assert "zebra" in capsys.readouterr().err
        assert not (tmp_path / "audit.html").exists()

    def test_names_of_outputs_and_folders(self, folder, tmp_path, capsys):
        """Folders number the outputs, unless a file names them."""
        kept = str(tmp_path / "a.safetensors")
        for order in (CLASSES, CLASSES[::-1]):
            (tmp_path / "names.txt").write_text("\n".join(order))
            main(audit(folder, tmp_path, "fair", "--classes", str(tmp_path / "names.txt"), "--save", kept))
            named = ConceptAudit.load(kept)
            assert named.class_names == list(order)
            assert named.accuracy == (1.0 if order == CLASSES else 0.0)
        alone = [*audit(folder, tmp_path, "fair", "--classes")[:-1], "--save", kept]
        main(alone)
        assert ConceptAudit.load(kept).class_names == sorted(CLASSES)
        shutil.copytree(folder / "val", tmp_path / "val")
        shutil.copytree(folder / "val" / CLASSES[0], tmp_path / "val" / "green disk")
        capsys.readouterr()
        assert main([alone[0], str(tmp_path / "val"), *alone[2:]]) == 2
        assert "3 class folders, but the model has 2 outputs; pass --classes" in capsys.readouterr().err

    def test_without_class_folders_there_is_nothing_to_suspect(self, folder, tmp_path, capsys):
        flat = tmp_path / "flat"
        flat.mkdir()
        for path in (folder / "val" / CLASSES[0]).glob("0*.png"):
            shutil.copy(path, flat)
        command = audit(folder, tmp_path)
        assert main([command[0], str(flat), *command[2:]]) == 0
        assert "suspects" not in capsys.readouterr().out
        assert "the true classes are unknown" in (tmp_path / "audit.html").read_text()

    def test_two_processes_write_what_one_writes(self, folder, tmp_path, capfd):
        alone = audit(folder, tmp_path, "biased", "--save", str(tmp_path / "alone.safetensors"))
        assert main(alone) == 1
        page = (tmp_path / "audit.html").read_bytes()
        capfd.readouterr()
        more = ["--save", str(tmp_path / "both.safetensors"), "--store", str(tmp_path / "parts")]
        program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [*program, "-m", "captum_concepts", *audit(folder, tmp_path, "biased", *more)]
        env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # torchrun says 1: sums round otherwise
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=env)
        assert done.stdout.count("ConceptAudit(") == 1, done.stderr
        assert (tmp_path / "both.safetensors").read_bytes() == (tmp_path / "alone.safetensors").read_bytes()
        assert (tmp_path / "audit.html").read_bytes() == page
