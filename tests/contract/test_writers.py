"""Every writer of the package on a full disk, on a read-only disk, and where a link lies in its way.

An old file stays whole, no part of a new one remains, and what links point to is not touched. Stores and folders that
are written shard by shard are in tests/store.
"""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from disks import full_disk, read_only
from tiny import (
    PICTURES,
    activation_map,
    audit,
    bottleneck,
    discovered,
    explanation,
    fitted,
    fusion_map,
    spatial_acv,
    table,
)

from captum_concepts import explore
from captum_concepts.concepts import Vocabulary, generate_concepts
from captum_concepts.errors import ArtifactError, InputError
from captum_concepts.store import FolderLock
from captum_concepts.visualization import panel, report, save_figure

PRECIOUS = b"the only copy of something" * 10


def answers(path: Path) -> None:
    generate_concepts(["bird"], lambda question: "a beak, wings" * 20, prompts={"q": "Q {class}"}, cache=path)


#: name of the file, how it is written. A new writer is one line.
WRITERS: dict[str, tuple[str, Callable[..., object]]] = {
    "ConceptExplanation": ("a.safetensors", lambda path: explanation().save(path)),
    "SpatialACV": ("a.safetensors", lambda path: spatial_acv().save(path)),
    "ConceptFusionMap": ("a.safetensors", lambda path: fusion_map().save(path)),
    "FeatureActivationMap": ("a.safetensors", lambda path: activation_map().save(path)),
    "DiscoveredConcepts": ("a.safetensors", lambda path: discovered().save(path)),
    "ConceptAudit": ("a.safetensors", lambda path: audit(class_names=["x", "y", "z"]).save(path)),
    "ConceptAudit.report": ("a.html", lambda path: audit(class_names=["x", "y", "z"]).report(path)),
    "SALFCBM": ("model.safetensors", lambda path: bottleneck().save_pretrained(path.parent)),
    "SALFCBM, configuration": ("config.json", lambda path: bottleneck().save_pretrained(path.parent)),
    "Vocabulary.txt": ("a.txt", lambda path: Vocabulary([f"word {i}" for i in range(99)]).save(path)),
    "Vocabulary.json": ("a.json", lambda path: Vocabulary([f"word {i}" for i in range(99)]).save(path)),
    "generate_concepts": ("a.json", answers),
    "EvaluationTable.csv": ("a.csv", lambda path: table().to_csv(path)),
    "EvaluationTable.json": ("a.json", lambda path: table().to_json(path)),
    "EvaluationTable.markdown": ("a.md", lambda path: table().to_markdown(path)),
    "report": ("a.html", lambda path: report(explanation(), PICTURES[:2], path)),
    "explore": ("a.html", lambda path: explore(spatial_acv(), PICTURES[:2]).save(path)),
    **{
        f"save_figure{suffix}": (f"a{suffix}", lambda path: save_figure(panel(explanation(), PICTURES[:2]), path))
        for suffix in (".png", ".svg", ".pdf")
    },
}


def contents(folder: Path) -> dict[str, bytes]:
    """Of every file in a folder and below it."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("disk", ["full", "read-only"])
def test_a_disk_that_cannot_be_written_keeps_the_old_file(tmp_path, writer, disk):
    name, write = WRITERS[writer]
    path = tmp_path / name
    if writer != "generate_concepts":
        write(path)
    else:
        path.write_text('{"Q fish": ["fins"]}')
    before = contents(tmp_path)
    with pytest.raises(OSError, match=r"."), full_disk() if disk == "full" else read_only(tmp_path):
        write(path)
    assert contents(tmp_path) == before
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


@pytest.mark.parametrize("writer", WRITERS)
def test_links_are_replaced_not_followed(tmp_path, writer):
    """A link where the file will be, and links where the parts of a new file might be."""
    name, write = WRITERS[writer]
    kept = tmp_path / "kept"
    kept.write_bytes(b"{}" if writer == "generate_concepts" else PRECIOUS)  # which is read
    before = kept.read_bytes()
    folder = tmp_path / "out"
    folder.mkdir()
    for link in (name, f".{name}.{os.getpid()}.{threading.get_ident()}.partial"):
        (folder / link).symlink_to(kept)
    write(folder / name)
    assert kept.read_bytes() == before
    assert not (folder / name).is_symlink()
    assert (folder / name).stat().st_size
    if not writer.startswith("SALFCBM"):  # written in a folder of its own
        assert not [file for file in folder.iterdir() if file.is_symlink()]


@pytest.mark.parametrize("writer", [name for name in WRITERS if not name.startswith(("SALFCBM", "generate"))])
def test_what_is_no_file_is_not_replaced(tmp_path, writer):
    name, write = WRITERS[writer]
    (tmp_path / name).mkdir()
    with pytest.raises((InputError, OSError), match=r"folder|directory"):
        write(tmp_path / name)
    (tmp_path / name).rmdir()
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match="is not a regular file"):
        write(tmp_path / name)
    assert (tmp_path / name).is_fifo()


@pytest.mark.parametrize("writer", ["ConceptExplanation", "report", "save_figure.png"])
def test_names_as_long_as_a_file_system_takes(tmp_path, writer):
    name, write = WRITERS[writer]
    suffix = Path(name).suffix
    for stem in ("a" * (255 - len(suffix)), "é" * ((255 - len(suffix)) // 2)):
        path = tmp_path / (stem + suffix)
        write(path)
        assert path.stat().st_size


class TestReadOnlyResults:
    """What `fit_salf_cbm` has finished is used again from a disk that cannot be written."""

    def test_it_is_used_and_unchanged(self, tmp_path):
        first = fitted(tmp_path)
        before = contents(tmp_path)
        with read_only(tmp_path):
            assert torch.equal(fitted(tmp_path).head.weight, first.head.weight)
            other = fitted(tmp_path, lam=0.1)
            assert fitted(tmp_path, ("blue", "red", "green")).concepts == ["blue", "red", "green"]
            with pytest.raises(OSError, match=r"regions-val cannot be written"):
                fitted(tmp_path, val_data=(PICTURES, torch.tensor([0, 1, 2] * 4)))
        assert contents(tmp_path) == before
        assert torch.equal(fitted(tmp_path, lam=0.1).head.weight, other.head.weight)

    @pytest.mark.parametrize("size", [16, 500, 900])
    def test_a_full_disk(self, tmp_path, size):
        """The first file fails, or one in the middle; afterwards the fit resumes to the same rules."""
        whole = fitted(tmp_path / "whole")
        with full_disk(size), pytest.raises(OSError, match=r"."):
            fitted(tmp_path / "cut")
        assert not list((tmp_path / "cut").rglob("*.partial"))
        assert torch.equal(fitted(tmp_path / "cut").head.weight, whole.head.weight)

    def test_a_place_without_results(self, tmp_path):
        with read_only(tmp_path), pytest.raises(OSError, match=r"Read-only|Permission"):
            fitted(tmp_path / "new")

    def test_a_folder_that_is_a_link(self, tmp_path):
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "store").mkdir()
        (tmp_path / "store" / "regions-train").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(ArtifactError, match="regions-train is a symbolic link"):
            fitted(tmp_path / "store")
        assert not list((tmp_path / "elsewhere").iterdir())


class TestLock:
    """`FolderLock` empties its own file: it must be its own."""

    @pytest.mark.parametrize("make", ["symlink", "hard link", "file", "folder", "fifo"])
    def test_a_foreign_file_is_not_taken(self, tmp_path, make):
        kept, folder = tmp_path / "kept", tmp_path / "store"
        kept.write_bytes(PRECIOUS)
        folder.mkdir()
        lock = folder / ".lock"
        {
            "symlink": lambda: lock.symlink_to(kept),
            "hard link": lambda: lock.hardlink_to(kept),
            "file": lambda: lock.write_bytes(PRECIOUS),
            "folder": lock.mkdir,
            "fifo": lambda: os.mkfifo(lock),
        }[make]()
        with pytest.raises(ArtifactError, match="is not a lock file of this package"), FolderLock(folder):
            pass
        assert kept.read_bytes() == PRECIOUS
        assert lock.is_symlink() if make == "symlink" else lock.exists()

    def test_the_file_of_a_killed_process_is_taken(self, tmp_path):
        for note in ("", "process 1 on elsewhere"):
            (tmp_path / ".lock").write_text(note)
            with FolderLock(tmp_path), pytest.raises(ArtifactError, match=f"written by process {os.getpid()} on"):
                FolderLock(tmp_path).__enter__()
        assert not (tmp_path / ".lock").exists()

    @pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
    def test_a_file_system_without_locks(self, tmp_path, monkeypatch, code):
        """The file itself is the lock; that of a dead process of this machine does not count."""
        import fcntl

        def flock(*_):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(fcntl, "flock", flock)
        with (
            FolderLock(tmp_path),
            pytest.raises(ArtifactError, match=r"process \d+ on .*does not support locks.*remove"),
        ):
            FolderLock(tmp_path).__enter__()
        assert not (tmp_path / ".lock").exists()
        gone = subprocess.Popen([sys.executable, "-c", ""])
        gone.wait()
        (tmp_path / ".lock").write_text(f"process {gone.pid} on {socket.gethostname()}")
        with FolderLock(tmp_path):
            assert f"process {os.getpid()} on" in (tmp_path / ".lock").read_text()
        (tmp_path / ".lock").write_text("process 1 on elsewhere")
        with pytest.raises(ArtifactError, match="process 1 on elsewhere"), FolderLock(tmp_path):
            pass
        assert (tmp_path / ".lock").exists()
