"""RegionEmbeddingStore: P as by Algorithm 1, resumed after kills to the same bytes, damage and misuse refused."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from comparisons import within
from safetensors import safe_open
from safetensors.torch import save
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from captum_concepts import _artifacts
from captum_concepts.errors import ArtifactError, InputError
from captum_concepts.store import RegionEmbeddingStore, manifest, shards, uniform_images
from captum_concepts.store.lock import FolderLock
from captum_concepts.vlm import RegionPrompt

HERE = Path(__file__).resolve()
IMPORTS = [str(folder) for folder in HERE.parents[:3]]  # of this file, of the tests' helpers, and the package
PROMPT = RegionPrompt("circle", (2, 3), 4, width=2)


class TinyEncoder(nn.Module):
    """A real network, small: convolution, nonlinearity, projection."""

    logit_scale, logit_bias = 10.0, 0.0

    def __init__(self, seed: int = 0, dim: int = 16):
        super().__init__()
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 8, 5, stride=2)
        self.norm = nn.BatchNorm2d(8)
        self.out = nn.Linear(8, dim)
        self.table = nn.Embedding(50, dim)
        torch.set_rng_state(state)
        self.scale = 1.0  # a setting that is not among the weights
        self.fail_after: int | None = None
        self.calls = 0

    def encode_image(self, images):
        self.calls += 1
        if self.fail_after is not None and self.calls > self.fail_after:
            raise RuntimeError("the encoder failed")
        return self.out(torch.tanh(self.norm(self.conv(images * self.scale))).amax((2, 3)))

    def encode_text(self, texts):
        return self.table(torch.tensor([len(t) % 50 for t in texts]))


def pictures(n: int, seed: int = 0, size: tuple[int, int] = (20, 24)) -> torch.Tensor:
    return torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(seed))


def build(path, data=None, encoder=None, prompt=PROMPT, **options):
    options = {"batch_size": 7, "shard_rows": 4, **options}
    data = pictures(19) if data is None else data
    return RegionEmbeddingStore.build(path, data, encoder or TinyEncoder(), prompt, **options)


def patch_writes(monkeypatch, function) -> None:
    """Every file of a store is written by ``function``."""
    for module in (shards, manifest):
        monkeypatch.setattr(module, "write_atomically", function)


def contents(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}


def algorithm_1(images, encoder, prompt, text):
    """Draw, encode, cosine: one image and one place at a time, as the paper prints it."""
    h, w = prompt.grid
    p = torch.zeros(len(images), len(text), h, w)
    with torch.no_grad():
        for n, image in enumerate(images):
            for ij, view in enumerate(prompt.draw(image[None])[0]):
                embedding = encoder.encode_image(view[None])[0]
                for m, t in enumerate(text):
                    cosine = embedding @ t / (embedding.norm() * t.norm())
                    p[n, m, ij // w, ij % w] = cosine
    return p


@pytest.mark.parametrize(
    "prompt", [PROMPT, RegionPrompt("crop", (3, 2), 5), RegionPrompt("blur", 2, 6)], ids=lambda p: p.kind
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.float32, 1e-5)])
def test_p_is_that_of_algorithm_1(tmp_path, prompt, dtype, tolerance):
    encoder = TinyEncoder().eval()
    images, text = pictures(6), torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    store = build(tmp_path, images, encoder, prompt, dtype=dtype)
    expected = algorithm_1(images, encoder, prompt, text)
    torch.testing.assert_close(store.similarity(text).tensor(), expected, atol=tolerance, rtol=0)
    within(store.similarity(text).tensor(), expected, store.error_bound + 1e-5)  # and of single precision
    assert store.error_bound < 2**-11


def test_reading_by_image_and_by_chunk(tmp_path):
    store = build(tmp_path)
    everything = store.embeddings(slice(None))
    assert everything.shape == (19, 6, 16)
    assert everything.dtype == torch.float16
    assert torch.equal(store.embeddings(3), everything[3])
    assert torch.equal(store.embeddings(-1), everything[18])
    assert torch.equal(store.embeddings([7, 2, 7]), everything[[7, 2, 7]])
    assert torch.equal(store.embeddings(torch.tensor([5, 0])), everything[[5, 0]])
    assert torch.equal(store.embeddings(torch.arange(19) % 2 == 0), everything[::2])
    assert store.embeddings([]).shape == (0, 6, 16)
    text = torch.randn(4, 16)
    p = store.similarity(text, chunk_size=8)
    chunks = list(p)
    assert [len(c) for c in chunks] == [8, 8, 3]
    assert len(p) == 3
    assert p.shape == (19, 4, 2, 3)
    assert torch.equal(torch.cat(chunks), p.tensor())
    assert torch.allclose(p[5], p.tensor()[5], atol=1e-6)
    for index in ((5, 2), (slice(3, 7), 1), ([4, 2], slice(1, 3), 0), (6, 1, 0, 2)):
        assert torch.allclose(p[index], p.tensor()[index], atol=1e-6)
    expected = everything.float() @ F.normalize(text, dim=1).T
    assert torch.allclose(p.tensor().flatten(2).transpose(1, 2), expected, atol=1e-6)
    again = pickle.loads(pickle.dumps(store))
    assert torch.equal(again.embeddings(4), everything[4])
    assert store.verify(pictures(19)) == {"images": 19, "shards": 5, "bytes": store.nbytes}
    assert "19 images" in repr(store)


def test_words_need_the_encoder(tmp_path):
    store = build(tmp_path)
    assert torch.equal(
        store.similarity(["abc"]).tensor(), store.similarity(TinyEncoder().encode_text(["abc"])).tensor()
    )
    assert torch.equal(store.similarity("abc").tensor(), store.similarity(["abc"]).tensor())
    bare = RegionEmbeddingStore.open(tmp_path)
    with pytest.raises(InputError, match="encoder"):
        bare.similarity(["abc"])
    for bad in (torch.zeros(2, 5), torch.full((2, 16), float("nan")), torch.zeros(0, 16)):
        with pytest.raises(InputError):
            bare.similarity(bad)
    with pytest.raises(InputError, match="store of 19"):
        bare.embeddings(19)
    with pytest.raises(InputError, match="number"):
        bare.embeddings([0.5])


def test_size_on_disk(tmp_path):
    store = build(tmp_path, pictures(70), TinyEncoder(dim=512), RegionPrompt(grid=7, radius=3), shard_rows=None)
    raw = RegionEmbeddingStore.expected_bytes(70, store.prompt, 512)
    assert raw == 70 * 49 * 512 * 2
    assert raw <= store.nbytes <= 1.01 * raw
    assert json.loads((tmp_path / "manifest.json").read_text())["rows"] == [32, 32, 6]


class Named(Dataset):
    """Items like those of image folders: (image, label), uint8."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], index % 3


def test_kinds_of_data_and_loading_processes(tmp_path):
    images = (pictures(9) * 255).to(torch.uint8)
    expected = build(tmp_path / "a", images.float() / 255).embeddings(slice(None))
    loader = DataLoader(Named(images), batch_size=2, shuffle=True)
    for name, data in {
        "uint8": images,
        "pairs": Named(images),
        "list": list(images),
        "dicts": [{"image": x, "label": 0} for x in images],
        "tensors": TensorDataset(images, torch.arange(9)),
        "loader": loader,
    }.items():
        assert torch.equal(build(tmp_path / name, data).embeddings(slice(None)), expected), name
    before = torch.get_rng_state()
    store = build(tmp_path / "workers", Named(images), num_workers=1, show_progress=True)
    assert torch.equal(store.embeddings(slice(None)), expected)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([torch.rand(3, 8, 8), torch.rand(3, 8, 9)], "one size.*image 1"),
        (torch.rand(2, 4, 8, 8), "4 channels"),
        ([], "no image"),
        (torch.rand(3, 8, 8), r"\(3, 8, 8\) has no batch dimension"),
        ("folder", "folder"),
        (7, "images must be"),
        ((image for image in torch.rand(2, 3, 8, 8)), "stream"),
    ],
)
def test_unusable_data(tmp_path, data, message):
    with pytest.raises(InputError, match=message):
        build(tmp_path, data)


def test_an_encoder_that_gives_nan_is_told_where(tmp_path):
    class Broken(TinyEncoder):
        seen = 0

        def encode_image(self, images):
            embedding = super().encode_image(images)
            row = 10 * 6 + 5 - self.seen  # the last of 6 places of image 10
            self.seen += len(images)
            if 0 <= row < len(images):
                embedding[row, 3] = torch.nan
            return embedding

    encoder = Broken()
    encoder.seen = -1  # one image tries the encoder out first
    with pytest.raises(InputError, match="NaN or infinite values for image 10, cell 5"):
        build(tmp_path, encoder=encoder)


def test_a_build_is_quiet_unless_asked(tmp_path, capfd):
    build(tmp_path / "a")
    assert capfd.readouterr() == ("", "")
    build(tmp_path / "b", show_progress=True)
    assert "19/19" in capfd.readouterr().err


def test_unusable_encoders_and_settings(tmp_path):
    class Wrong:
        def __init__(self, result):
            self.result = result

        def encode_image(self, images):
            return self.result(images)

    with pytest.raises(InputError, match="encode_image"):
        RegionEmbeddingStore.build(tmp_path, pictures(2), object(), PROMPT)
    with pytest.raises(InputError, match=r"\(1, D\)"):
        build(tmp_path, encoder=Wrong(lambda x: x))
    nan = Wrong(lambda x: x.mean((2, 3)) / (x.flatten(1).amax(1, keepdim=True) < 1.2))
    images = pictures(5)
    images[3, 0, 10, 12] = 1.5
    with pytest.raises(InputError, match="image 3, cell"):
        build(tmp_path, images, nan)
    for options in ({"batch_size": 0}, {"dtype": torch.bfloat16}, {"shard_rows": 0}):
        with pytest.raises(InputError):
            build(tmp_path / "x", **options)
    with pytest.raises(InputError, match="RegionPrompt"):
        build(tmp_path / "y", prompt="circle")


def test_the_encoder_is_left_as_it_was(tmp_path):
    encoder = TinyEncoder().train()
    encoder.norm.eval()
    state = {k: v.clone() for k, v in encoder.state_dict().items()}
    torch.manual_seed(3)
    rng = torch.get_rng_state()
    build(tmp_path, encoder=encoder)
    assert torch.equal(rng, torch.get_rng_state())
    assert encoder.training
    assert not encoder.norm.training
    assert all(p.requires_grad and p.grad is None for p in encoder.parameters())
    assert all(torch.equal(v, state[k]) for k, v in encoder.state_dict().items())
    assert build(tmp_path, encoder=TinyEncoder().eval()).verify()  # its mode does not count


class TestRefusals:
    @pytest.fixture
    def folder(self, tmp_path):
        build(tmp_path)
        return tmp_path

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"encoder": TinyEncoder(seed=1)}, "encoder is"),
            ({"prompt": RegionPrompt("circle", (3, 3), 4, width=2)}, "grid is"),
            ({"prompt": RegionPrompt("circle", (2, 3), 5, width=2)}, "radius is 4.0, not 5.0"),
            ({"prompt": RegionPrompt("crop", (2, 3), 4, width=2)}, "kind is"),
            ({"data": pictures(19, seed=1)}, "other data: image 0"),
            ({"data": pictures(20)}, "19 images, but the data has 20"),
            ({"data": pictures(19, size=(24, 20))}, "image is"),
            ({"dtype": torch.float32}, "dtype is 'float16'"),
        ],
        ids=lambda v: v if isinstance(v, str) else next(iter(v)),
    )
    def test_another_model_grid_prompt_or_data(self, folder, change, message):
        before = contents(folder)
        with pytest.raises(ArtifactError, match=message):
            build(folder, **change)
        assert contents(folder) == before

    def test_another_preprocessing(self, folder, tmp_path):
        encoder = TinyEncoder()
        encoder.scale = 0.5
        with pytest.raises(ArtifactError, match="preprocessing or settings"):
            build(folder, encoder=encoder)
        encoder = TinyEncoder()
        encoder.preprocess = {"size": (224, 224)}
        with pytest.raises(ArtifactError, match="preprocess is"):
            build(folder, encoder=encoder)

    def test_opening_checks_as_well(self, folder):
        assert len(RegionEmbeddingStore.open(folder, encoder=TinyEncoder(), prompt=PROMPT)) == 19
        with pytest.raises(ArtifactError, match="encoder is"):
            RegionEmbeddingStore.open(folder, encoder=TinyEncoder(seed=1))
        with pytest.raises(ArtifactError, match="radius"):
            RegionEmbeddingStore.open(folder, prompt=RegionPrompt("circle", (2, 3), 9))
        with pytest.raises(FileNotFoundError):
            RegionEmbeddingStore.open(folder / "none")

    def test_a_store_of_something_else(self, tmp_path):
        with shards.ShardWriter(tmp_path, {"model": "a"}) as writer:
            writer.append({"z": torch.zeros(3, 2)})
        with pytest.raises(ArtifactError, match="not one of region embeddings"):
            RegionEmbeddingStore.open(tmp_path)
        with pytest.raises(ArtifactError, match="not one of region embeddings"):
            build(tmp_path)

    def test_starting_anew(self, folder):
        other = build(folder, pictures(5, seed=4), TinyEncoder(seed=1), resume=False)
        assert len(other) == 5
        assert contents(folder).keys() == {"manifest.json", "shard-00000.safetensors", "shard-00001.safetensors"}


def test_a_finished_store_is_not_computed_again(tmp_path):
    build(tmp_path)
    encoder = TinyEncoder()
    build(tmp_path, encoder=encoder)
    assert encoder.calls <= 3  # one test image to recognise the encoder, in build and in open


class TestInterruption:
    def test_an_error_in_the_middle_then_resume(self, tmp_path):
        build(tmp_path / "whole")
        broken = TinyEncoder()
        broken.fail_after = 9
        with pytest.raises(RuntimeError, match="the encoder failed"):
            build(tmp_path / "resumed", encoder=broken)
        with pytest.raises(ArtifactError, match="unfinished"):
            RegionEmbeddingStore.open(tmp_path / "resumed")
        with pytest.raises(ArtifactError, match="19 images, but the data has 18"):
            build(tmp_path / "resumed", pictures(18))
        with pytest.raises(ArtifactError, match="other data"):
            build(tmp_path / "resumed", pictures(19, seed=1))
        encoder = TinyEncoder()
        build(tmp_path / "resumed", encoder=encoder)
        assert encoder.calls < 5 * 4  # the first shards were not computed again
        assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")

    def test_data_that_fail(self, tmp_path):
        class Broken(Named):
            def __getitem__(self, index):
                if index == 11:
                    raise KeyError("file 11 is broken")
                return super().__getitem__(index)

        with pytest.raises(KeyError, match="file 11"):
            build(tmp_path / "resumed", Broken(pictures(19)))
        assert (tmp_path / "resumed" / "shard-00001.safetensors").exists()  # what was computed is kept
        build(tmp_path / "resumed")
        build(tmp_path / "whole")
        assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="the killed processes are forks")
    def test_kill_9_at_random_moments(self, tmp_path):
        """CAPTUM_CONCEPTS_KILLS sets how many; every third time the builder is let through to the end."""
        kills = int(os.environ.get("CAPTUM_CONCEPTS_KILLS", "6"))
        options = {"shard_rows": 2, "batch_size": 5}
        build(tmp_path / "whole", pictures(60), **options)
        expected, path, rng = contents(tmp_path / "whole"), tmp_path / "killed-0", random.Random(0)
        server = (  # imports once, then forks a builder a line
            "import os, sys, time, torch\n"
            f"sys.path[:0] = {IMPORTS!r}\n"
            "torch.set_num_threads(1)\n"
            "from test_region_embedding_store import TinyEncoder, build, pictures\n"
            "class Slow(TinyEncoder):\n"
            "    def encode_image(self, images):\n"
            "        time.sleep(0.01)\n"
            "        return super().encode_image(images)\n"
            "Slow.__qualname__ = 'TinyEncoder'\n"
            "for line in sys.stdin:\n"
            "    pid = os.fork()\n"
            "    if pid == 0:\n"
            f"        build(line.strip(), pictures(60), Slow(), **{options!r})\n"
            "        os._exit(0)\n"
            "    print(pid, flush=True)\n"
            "    print(os.waitpid(pid, 0)[1], flush=True)\n"
        )
        interrupted = 0
        command = [sys.executable, "-W", "ignore", "-c", server]
        with subprocess.Popen(command, stdin=-1, stdout=-1, text=True) as process:
            for kill in range(1, kills + 1):
                process.stdin.write(f"{path}\n")
                process.stdin.flush()
                pid = int(process.stdout.readline())
                time.sleep(rng.uniform(0.0, 0.25))
                with contextlib.suppress(ProcessLookupError):  # it ended by itself, and its parent has waited for it
                    os.kill(pid, signal.SIGKILL)
                interrupted += int(process.stdout.readline()) == signal.SIGKILL
                if kill % 3 == 0 or kill == kills:
                    build(path, pictures(60), **options)
                    assert contents(path) == expected
                    path = tmp_path / f"killed-{kill}"
            process.stdin.close()
        assert interrupted >= kills / 2

    @pytest.mark.parametrize("moment", range(0, 14))
    def test_stopped_at_every_write(self, tmp_path, monkeypatch, moment):
        """Power cut at the n-th file operation: nothing of the process runs afterwards, not even its cleaning up."""
        build(tmp_path / "whole")
        plain, count = _artifacts.write_atomically, [0]

        def until(path, data):
            count[0] += 1
            if count[0] > moment:
                path.with_name(f".{path.name}.1.2.partial").write_bytes(data[: len(data) // 2])
                raise SystemError("cut")
            plain(path, data)

        patch_writes(monkeypatch, until)
        try:
            build(tmp_path / "cut")
        except SystemError:
            pass
        monkeypatch.undo()
        build(tmp_path / "cut")
        assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


class TestDamage:
    @pytest.fixture
    def folder(self, tmp_path):
        build(tmp_path / "store")
        build(tmp_path / "whole")
        return tmp_path / "store"

    def test_truncated_shard(self, folder):
        file = folder / "shard-00002.safetensors"
        file.write_bytes(file.read_bytes()[:-10])
        with pytest.raises(ArtifactError, match="shard-00002"):
            RegionEmbeddingStore.open(folder)
        self.is_built_again(folder)

    def test_missing_shard(self, folder):
        (folder / "shard-00002.safetensors").unlink()
        with pytest.raises(ArtifactError, match=r"unfinished.*missing: 'shard-00002"):
            RegionEmbeddingStore.open(folder)
        self.is_built_again(folder)

    def test_shard_of_another_store(self, folder, tmp_path):
        """Of the same size and sound in itself."""
        build(tmp_path / "other", encoder=TinyEncoder(seed=1))
        name = "shard-00002.safetensors"
        (folder / name).write_bytes((tmp_path / "other" / name).read_bytes())
        with pytest.raises(ArtifactError, match="is not shard 2 of this store"):
            RegionEmbeddingStore.open(folder)
        self.is_built_again(folder)
        (folder / name).write_bytes((folder / "shard-00001.safetensors").read_bytes())
        self.is_built_again(folder)

    def is_built_again(self, folder):
        encoder = TinyEncoder()
        build(folder, encoder=encoder)
        assert encoder.calls == 2 + 4  # two test images, and 24 pictures by 7
        assert contents(folder) == contents(folder.parent / "whole")

    @pytest.mark.parametrize("place", [3, 20, 60, -400, -1])
    def test_flipped_byte_is_never_served(self, folder, place):
        file = folder / "shard-00001.safetensors"
        data = bytearray(file.read_bytes())
        data[place] ^= 0x10
        file.write_bytes(data)
        with pytest.raises(ArtifactError, match="shard-00001"):
            RegionEmbeddingStore.open(folder, verify=True)
        with pytest.raises(ArtifactError, match="shard-00001"):
            RegionEmbeddingStore.open(folder).embeddings(5)
        try:
            store = RegionEmbeddingStore.open(folder)
        except ArtifactError:
            return  # the header itself
        assert torch.equal(store.embeddings(0), RegionEmbeddingStore.open(folder.parent / "whole").embeddings(0))
        with pytest.raises(ArtifactError, match=r"shard-00001.safetensors \(images 4 to 7\): its checksum differs"):
            store.verify()

    def test_repair_computes_the_damaged_images_only(self, folder):
        (folder / "shard-00000.safetensors").unlink()
        file = folder / "shard-00003.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(ArtifactError, match="other data"):
            RegionEmbeddingStore.repair(folder, pictures(19, seed=1), TinyEncoder(), batch_size=7)
        with pytest.raises(ArtifactError, match="encoder is"):
            RegionEmbeddingStore.repair(folder, pictures(19), TinyEncoder(seed=1), batch_size=7)
        encoder = TinyEncoder()
        repaired = RegionEmbeddingStore.repair(folder, pictures(19), encoder, batch_size=7)
        assert repaired == [0, 1, 2, 3, 12, 13, 14, 15]
        assert encoder.calls == 1 + 2 * 4  # the test image, then two shards of 24 pictures by 7
        assert contents(folder) == contents(folder.parent / "whole")
        assert RegionEmbeddingStore.repair(folder, pictures(19), TinyEncoder()) == []

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "other"}'])
    def test_broken_manifest(self, folder, text):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(ArtifactError, match=r"manifest\.json"):
            RegionEmbeddingStore.open(folder)
        with pytest.raises(ArtifactError, match=r"manifest\.json"):
            build(folder)

    def test_verify_sees_other_pictures(self, folder):
        store = RegionEmbeddingStore.open(folder)
        other = pictures(19)
        other[13, 0, 0, 0] += 0.01
        with pytest.raises(ArtifactError, match="image 13 "):
            store.verify(other)
        with pytest.raises(ArtifactError, match="19 images, the data 18"):
            store.verify(pictures(18))

    def test_verify_sees_wrong_numbers_with_right_checksums(self, tmp_path):
        build(tmp_path)
        manifest = json.loads((tmp_path / "manifest.json").read_text())
        with shards.ShardWriter(tmp_path / "b", manifest["fingerprint"], shard_rows=4) as writer:
            writer.info.update(manifest["info"])
            writer.append({"embedding": torch.ones(19, 6, 16).half(), "digest": torch.zeros(19, dtype=torch.int64)})
        with pytest.raises(ArtifactError, match="no unit embeddings"):
            RegionEmbeddingStore.open(tmp_path / "b").verify()


def as_format_1(path: Path, shards_kept: int | None = None, extension: dict | None = None) -> None:
    """Rewrite a store as an earlier version wrote it; unfinished with fewer shards."""
    found = json.loads((path / "manifest.json").read_text())
    rows, bounds = found["rows"][:shards_kept], []
    entries = []
    for number in range(len(found["rows"])):
        file = path / manifest.shard_name(number)
        if number >= len(rows):
            file.unlink()
            continue
        with safe_open(file, "pt") as opened:
            bounds.append(json.loads(opened.metadata()["captum_concepts.shard/2"])["notes"]["error_bound"])
            data = save({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
        file.write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        entries.append({"file": file.name, "rows": rows[number], "bytes": len(data), "sha256": digest})
    info = {key: value for key, value in found["info"].items() if key != "batch_size"} | {"error_bound": max(bounds)}
    if extension is not None:
        info["extension"] = extension
    prompt = found["fingerprint"]["prompt"]
    prompt["colour"] = prompt.pop("color")
    old = {"format": "captum_concepts.shards/1", "fingerprint": found["fingerprint"], "shards": entries}
    old |= {"complete": len(rows) == len(found["rows"]) and extension is None, "info": info}
    (path / "manifest.json").write_text(json.dumps(old))


class TestFormat1:
    def test_it_opens_and_verifies(self, tmp_path):
        expected = build(tmp_path)
        values, bound = expected.embeddings(slice(None)), expected.error_bound
        as_format_1(tmp_path)
        before = contents(tmp_path)
        store = RegionEmbeddingStore.open(tmp_path, encoder=TinyEncoder(), prompt=PROMPT, verify=True)
        assert torch.equal(store.embeddings(slice(None)), values)
        assert store.error_bound == bound
        assert store.prompt == PROMPT
        assert store.verify(pictures(19))["shards"] == 5
        encoder = TinyEncoder()
        build(tmp_path, encoder=encoder)
        assert encoder.calls == 2
        assert contents(tmp_path) == before
        with pytest.raises(ArtifactError, match="other data"):
            build(tmp_path, pictures(19, seed=1))

    def test_damage_is_found_and_computed_again(self, tmp_path):
        values = build(tmp_path).embeddings(slice(None))
        as_format_1(tmp_path)
        file = tmp_path / "shard-00001.safetensors"
        data = bytearray(file.read_bytes())
        data[-3] ^= 1
        file.write_bytes(data)
        with pytest.raises(ArtifactError, match="checksum"):
            RegionEmbeddingStore.open(tmp_path).embeddings(5)
        assert RegionEmbeddingStore.repair(tmp_path, pictures(19), TinyEncoder(), batch_size=7) == [4, 5, 6, 7]
        assert torch.equal(RegionEmbeddingStore.open(tmp_path, verify=True).embeddings(slice(None)), values)

    def test_an_unfinished_one_continues(self, tmp_path):
        values = build(tmp_path).embeddings(slice(None))
        as_format_1(tmp_path, shards_kept=2)
        with pytest.raises(ArtifactError, match="unfinished"):
            RegionEmbeddingStore.open(tmp_path)
        encoder = TinyEncoder()
        assert torch.equal(build(tmp_path, encoder=encoder).embeddings(slice(None)), values)
        assert encoder.calls == 2 + 4 + 4 + 3

    def test_an_extension_continues(self, tmp_path):
        values = build(tmp_path, pictures(8)).extend(pictures(7, seed=1), TinyEncoder()).embeddings(slice(None))
        as_format_1(tmp_path, shards_kept=3, extension={"first": 8, "images": 7})
        assert len(build(tmp_path, pictures(8))) == 8  # readers do not see the rest
        found = RegionEmbeddingStore.extend_at(tmp_path, pictures(7, seed=1), TinyEncoder())
        assert torch.allclose(found.embeddings(slice(None)).float(), values.float(), atol=1e-3)
        found.verify()

    def test_it_is_extended(self, tmp_path):
        build(tmp_path, pictures(8))
        as_format_1(tmp_path)
        assert len(RegionEmbeddingStore.open(tmp_path).extend(pictures(7, seed=1), TinyEncoder())) == 15
        RegionEmbeddingStore.open(tmp_path, verify=True).verify()


class TestDiskAndLocks:
    @pytest.fixture
    def small_disk(self, tmp_path):
        """A real file system of 64 KiB where it can be mounted."""
        folder = tmp_path / "disk"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
        if sys.platform != "linux" or subprocess.run(command, capture_output=True).returncode:
            yield None
            return
        yield folder
        subprocess.run(["umount", "-l", str(folder)], check=True)

    def test_full_disk(self, tmp_path, small_disk, monkeypatch):
        build(tmp_path / "whole", pictures(60), TinyEncoder(dim=128))
        folder = small_disk if small_disk is not None else tmp_path / "simulated"
        if small_disk is None:
            plain = _artifacts.write_atomically

            def full(path, data):
                held = sum(f.stat().st_size for f in folder.iterdir())
                if held + len(data) > 65536:
                    raise OSError(errno.ENOSPC, "No space left on device", str(path))
                plain(path, data)

            patch_writes(monkeypatch, full)
        with pytest.raises(OSError, match=r"No space left.* of 60 images are stored") as caught:
            build(folder, pictures(60), TinyEncoder(dim=128))
        assert caught.value.errno == errno.ENOSPC
        safe = int(str(caught.value).split(" of 60 images")[0].split()[-1])
        assert safe >= 16
        assert not list(folder.glob(".*"))
        monkeypatch.undo()
        if small_disk is not None:
            subprocess.run(["mount", "-o", "remount,size=4m", str(folder)], check=True)
        encoder = TinyEncoder(dim=128)
        build(folder, pictures(60), encoder)
        assert encoder.calls == 2 + (60 - safe) // 4 * 4  # only what was missing: 24 pictures a shard, by 7
        assert contents(folder) == contents(tmp_path / "whole")

    def test_read_only_folder(self, tmp_path, small_disk, monkeypatch):
        folder = small_disk if small_disk is not None else tmp_path / "folder"
        build(folder, pictures(7))
        expected = contents(folder)
        if small_disk is not None:
            subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        else:
            deny = OSError(errno.EROFS, "Read-only file system", str(folder))
            monkeypatch.setattr(Path, "open", lambda self, mode="r", *a, **k: _open_or(deny, self, mode, *a, **k))
        assert len(RegionEmbeddingStore.open(folder, verify=True)) == 7
        assert len(build(folder, pictures(7))) == 7  # finished: nothing to write
        with pytest.raises(OSError, match=r"Read-only.* 7 images are stored"):
            RegionEmbeddingStore.open(folder).extend(pictures(3, seed=1), TinyEncoder())
        with pytest.raises(OSError, match="Read-only"):
            build(folder / "new", pictures(7))
        assert contents(folder) == expected

    def test_full_disk_while_extending(self, tmp_path, monkeypatch):
        store = build(tmp_path / "store", pictures(7))
        plain = _artifacts.write_atomically

        def full(path, data):
            if path.suffix == ".safetensors":
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            plain(path, data)

        patch_writes(monkeypatch, full)
        with pytest.raises(OSError, match=r"No space left.* 7 of 16 images are stored"):
            store.extend(pictures(9, seed=1), TinyEncoder())
        monkeypatch.undo()
        assert len(store.extend(pictures(9, seed=1), TinyEncoder())) == 16

    def test_two_builders_at_once(self, tmp_path):
        class Second(TinyEncoder):
            def encode_image(self, images):
                if self.calls == 3 and not hasattr(self, "seen"):
                    with pytest.raises(ArtifactError, match=f"written by process {os.getpid()} on") as caught:
                        build(tmp_path / "store")
                    self.seen = caught
                return super().encode_image(images)

        Second.__qualname__ = "TinyEncoder"
        encoder = Second()
        build(tmp_path / "store", encoder=encoder)
        assert encoder.seen
        build(tmp_path / "alone")
        assert contents(tmp_path / "store") == contents(tmp_path / "alone")

    @pytest.mark.skipif(sys.platform == "win32", reason="the other process locks as POSIX does")
    def test_two_processes_at_once(self, tmp_path):
        code = (  # as lock.py does it, without the time its imports take
            "import fcntl, os, sys\n"
            f"file = open({str(tmp_path / '.lock')!r}, 'w')\n"
            "fcntl.flock(file, fcntl.LOCK_EX)\n"
            "file.write(f'process {os.getpid()} on here'); file.flush()\n"
            "print('locked', flush=True); sys.stdin.read()"
        )
        process = subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True)
        try:
            assert process.stdout.readline() == "locked\n"
            with pytest.raises(ArtifactError, match=f"written by process {process.pid} on"):
                build(tmp_path)
        finally:
            process.kill()
            process.wait()
            process.stdin.close()
            process.stdout.close()
        assert (tmp_path / ".lock").exists()  # left by the killed process; it holds nobody up
        assert build(tmp_path).verify()
        assert not (tmp_path / ".lock").exists()

    def test_the_lock_is_free_after_an_error(self, tmp_path):
        with pytest.raises(ZeroDivisionError), FolderLock(tmp_path):
            1 / 0
        with FolderLock(tmp_path):
            pass


def _open_or(error, path, mode="r", *args, **kwargs):
    if any(c in mode for c in "wax+"):
        raise error
    return open(path, mode, *args, **kwargs)  # noqa: PTH123


class TestExtension:
    def test_it_appends(self, tmp_path):
        store = build(tmp_path / "store", pictures(10))
        before = store.embeddings(slice(None))
        encoder = TinyEncoder()
        longer = store.extend(pictures(7, seed=1), encoder, batch_size=7)
        assert len(longer) == 17
        assert len(store) == 10
        assert encoder.calls == 2 + 4 + 3  # recognised twice; shards of 4 and 3 new images
        assert torch.equal(longer.embeddings(slice(10)), before)
        alone = build(tmp_path / "alone", pictures(7, seed=1))
        assert torch.equal(longer.embeddings(slice(10, 17)), alone.embeddings(slice(None)))
        both = torch.cat([pictures(10), pictures(7, seed=1)])
        assert longer.verify(both)
        assert len(build(tmp_path / "store", both)) == 17

    @pytest.mark.parametrize("moment", range(0, 5))  # plan, three shards, the end
    def test_stopped_at_every_write(self, tmp_path, monkeypatch, moment):
        for name in ("a", "b"):
            build(tmp_path / name, pictures(10))
        new = pictures(11, seed=1)
        RegionEmbeddingStore.extend_at(tmp_path / "a", new, TinyEncoder(), batch_size=7)
        plain, count = _artifacts.write_atomically, [0]

        def until(path, data):
            count[0] += 1
            if count[0] > moment:
                raise SystemError("cut")
            plain(path, data)

        patch_writes(monkeypatch, until)
        with pytest.raises(SystemError):
            RegionEmbeddingStore.extend_at(tmp_path / "b", new, TinyEncoder(), batch_size=7)
        monkeypatch.undo()
        assert len(RegionEmbeddingStore.open(tmp_path / "b", encoder=TinyEncoder(), verify=True)) == 10
        assert len(build(tmp_path / "b", pictures(10))) == 10
        assert RegionEmbeddingStore.repair(tmp_path / "b", pictures(10), TinyEncoder()) == []
        for other in (pictures(11, seed=5), pictures(4, seed=1)):  # takes the place of the one that was stopped
            shutil.copytree(tmp_path / "b", tmp_path / "c")
            longer = RegionEmbeddingStore.extend_at(tmp_path / "c", other, TinyEncoder(), batch_size=7)
            longer.verify(torch.cat([pictures(10), other]))
            shutil.rmtree(tmp_path / "c")
        RegionEmbeddingStore.extend_at(tmp_path / "b", new, TinyEncoder(), batch_size=7)
        assert contents(tmp_path / "a") == contents(tmp_path / "b")

    def test_refusals(self, tmp_path):
        store = build(tmp_path)
        with pytest.raises(ArtifactError, match="encoder is"):
            store.extend(pictures(2), TinyEncoder(seed=1))
        with pytest.raises(ArtifactError, match="image is"):
            store.extend(pictures(2, size=(8, 8)))
        with pytest.raises(InputError, match="encoder"):
            RegionEmbeddingStore.open(tmp_path).extend(pictures(2))
        with pytest.raises(FileNotFoundError):
            RegionEmbeddingStore.extend_at(tmp_path / "none", pictures(2), TinyEncoder())
        (tmp_path / "shard-00001.safetensors").unlink()
        with pytest.raises(ArtifactError, match="is unfinished; call build again with its own images"):
            store.extend(pictures(2), TinyEncoder())

    def test_readers_see_the_old_store_until_the_end(self, tmp_path):
        build(tmp_path, pictures(10))

        class Watched(TinyEncoder):
            def encode_image(self, images):
                lengths.append(len(RegionEmbeddingStore.open(tmp_path, verify=True)))
                return super().encode_image(images)

        Watched.__qualname__, lengths = "TinyEncoder", []
        assert len(RegionEmbeddingStore.extend_at(tmp_path, pictures(9, seed=1), Watched(), batch_size=7)) == 19
        assert len(lengths) > 5
        assert lengths[:-1] == [10] * (len(lengths) - 1)

    def test_images_that_will_never_do_leave_the_store_as_it_was(self, tmp_path):
        build(tmp_path / "store", pictures(10))
        before = contents(tmp_path / "store")
        bad = pictures(9, seed=1)
        bad[8, 0, 3, 3] = torch.nan
        with pytest.raises(InputError, match="NaN or infinite values for image 8"):
            RegionEmbeddingStore.extend_at(tmp_path / "store", bad, TinyEncoder(), batch_size=7)
        assert contents(tmp_path / "store") == before
        assert RegionEmbeddingStore.repair(tmp_path / "store", pictures(10), TinyEncoder()) == []
        assert len(RegionEmbeddingStore.extend_at(tmp_path / "store", pictures(3, seed=2), TinyEncoder())) == 13

    def test_an_extension_under_way_of_an_earlier_version(self, tmp_path):
        """It listed the shards before they were there."""
        build(tmp_path, pictures(8))
        manifest = json.loads((tmp_path / "manifest.json").read_text())
        manifest["rows"] += [4, 3]
        manifest["info"] |= {"images": 15, "extension": {"first": 8, "images": 7}}
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        assert len(RegionEmbeddingStore.open(tmp_path)) == 8
        assert len(RegionEmbeddingStore.extend_at(tmp_path, pictures(7, seed=1), TinyEncoder())) == 15


class TestForeignFiles:
    """What the store has not written is never removed or replaced."""

    def foreign(self, folder: Path, name: str = "shard-00000.safetensors") -> dict[str, bytes]:
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(save({"weights": torch.ones(3)}))
        for other in (".notes.partial", ".lock-of-mine", "shard-x.safetensors"):
            (folder / other).write_text("mine")
        return contents(folder)

    @pytest.mark.parametrize("resume", [True, False])
    def test_a_folder_with_shards_and_no_manifest(self, tmp_path, resume):
        for number in (0, 3):
            folder = tmp_path / str(number)
            before = self.foreign(folder, shards.shard_name(number))
            with pytest.raises(ArtifactError, match=f"no manifest.json, but shard-0000{number}.*Nothing was changed"):
                build(folder, resume=resume)
            with pytest.raises(ArtifactError, match=f"no manifest.json, but shard-0000{number}"):
                shards.ShardWriter(folder, {}, resume=resume)
            assert contents(folder) == before

    def test_a_store_that_lost_its_manifest(self, tmp_path):
        build(tmp_path)
        (tmp_path / "manifest.json").unlink()
        before = contents(tmp_path)
        with pytest.raises(ArtifactError, match="the store lost its manifest"):
            build(tmp_path)
        assert contents(tmp_path) == before

    def test_a_manifest_of_something_else(self, tmp_path):
        (tmp_path / "manifest.json").write_text('{"name": "my web app"}')
        for resume in (True, False):
            with pytest.raises(ArtifactError, match="not the manifest of a store"):
                build(tmp_path, resume=resume)
        assert contents(tmp_path) == {"manifest.json": b'{"name": "my web app"}'}

    def test_starting_anew_and_extending(self, tmp_path):
        build(tmp_path, pictures(7))
        before = self.foreign(tmp_path, "shard-00003.safetensors")
        for attempt in (
            lambda: build(tmp_path, pictures(5), resume=False),
            lambda: RegionEmbeddingStore.extend_at(tmp_path, pictures(9, seed=1), TinyEncoder()),
        ):
            with pytest.raises(
                ArtifactError, match=r"shard-00003\.safetensors is not a shard of the store in its folder"
            ):
                attempt()
            assert contents(tmp_path) == before
        (tmp_path / "shard-00003.safetensors").unlink()
        assert len(build(tmp_path, pictures(5), resume=False)) == 5
        assert len(RegionEmbeddingStore.extend_at(tmp_path, pictures(9, seed=1), TinyEncoder())) == 14
        for other in (".notes.partial", ".lock-of-mine", "shard-x.safetensors"):
            assert (tmp_path / other).read_text() == "mine"

    def test_a_writer_that_appends(self, tmp_path):
        writer = shards.ShardWriter(tmp_path, {}, shard_rows=2)
        writer.append({"z": torch.ones(4, 2)})
        before = self.foreign(tmp_path, "shard-00002.safetensors")
        with pytest.raises(ArtifactError, match="is not a shard of the store in its folder"):
            shards.ShardWriter(tmp_path, {}, shard_rows=2)
        assert contents(tmp_path) == before


class TestSeveralProcesses:
    @pytest.mark.parametrize("size", [2, 3, 7])
    def test_shares_join_to_the_store_of_one_process(self, tmp_path, size):
        build(tmp_path / "one")
        options = {"batch_size": 7, "shard_rows": 4, "num_replicas": size}
        path = tmp_path / "many"
        for rank in reversed(range(size)):
            with pytest.raises((ArtifactError, FileNotFoundError)):
                RegionEmbeddingStore.open(path)
            whole = RegionEmbeddingStore.build_part(path, pictures(19), TinyEncoder(), PROMPT, rank=rank, **options)
            assert whole == (rank == 0)
        assert contents(path) == contents(tmp_path / "one")
        again = TinyEncoder()
        assert RegionEmbeddingStore.build_part(path, pictures(19), again, PROMPT, rank=1, **options)
        assert again.calls == 1

    def test_any_number_of_processes_continues(self, tmp_path):
        build(tmp_path / "one")
        options = {"batch_size": 7, "shard_rows": 4}
        data, path = (pictures(19), TinyEncoder(), PROMPT), tmp_path / "many"
        RegionEmbeddingStore.build_part(path, *data, rank=1, num_replicas=2, **options)
        assert sorted(p.name for p in path.glob("shard*")) == ["shard-00001.safetensors", "shard-00003.safetensors"]
        assert not RegionEmbeddingStore.build_part(path, *data, rank=2, num_replicas=3, **options)
        encoder = TinyEncoder()
        build(path, encoder=encoder)
        assert encoder.calls == 2 + 4 + 3  # shards 0 and 4, of 24 and 18 pictures by 7
        assert contents(path) == contents(tmp_path / "one")
        with pytest.raises(InputError, match=r"rank must be an integer .* at most 1, got 2"):
            RegionEmbeddingStore.build_part(path, *data, rank=2, num_replicas=2, **options)

    def test_two_gloo_processes(self, tmp_path):
        build(tmp_path / "one")
        code = (
            "import os, sys, torch, torch.distributed as dist\n"
            f"sys.path[:0] = {IMPORTS!r}\n"
            "torch.set_num_threads(1)\n"
            "from test_region_embedding_store import TinyEncoder, build, pictures\n"
            "rank, folder = int(sys.argv[1]), sys.argv[2]\n"
            "dist.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=2)\n"
            "store = build(folder + '/two')\n"
            "store.verify()\n"
            "longer = store.extend(pictures(3, seed=1), TinyEncoder())\n"
            "assert len(longer) == 22\n"
            "try:\n"
            "    build(folder + '/bad', pictures(19) if rank else [])\n"
            "except Exception as error:\n"
            "    print(type(error).__name__, error)\n"
            "sys.stdout.flush()\n"
            "os._exit(0)\n"  # gloo's threads sometimes abort: see several.ending_at_once
        )
        runs = [
            subprocess.Popen([sys.executable, "-c", code, str(rank), str(tmp_path)], stdout=-1, stderr=-1, text=True)
            for rank in range(2)
        ]
        outputs = [run.communicate(timeout=120) for run in runs]
        assert [run.returncode for run in runs] == [0, 0], outputs
        assert "InputError there is no image" in outputs[0][0]
        assert "process 1 has finished its part, but process 0: InputError" in outputs[1][0]
        two, one = contents(tmp_path / "two"), contents(tmp_path / "one")
        same = [name for name in one if name.startswith("shard")]
        assert len(same) == 5
        assert all(two[name] == one[name] for name in same)


def test_digests_tell_pictures_apart():
    a = pictures(1)[0]
    b = a.clone()
    b[2, 19, 23] += 1e-6
    assert uniform_images.digest(a) == uniform_images.digest(a.clone().transpose(1, 2).contiguous().transpose(1, 2))
    assert uniform_images.digest(a) != uniform_images.digest(b)


def test_p_of_a_real_encoder_with_crops(shared_data, tmp_path, monkeypatch):
    """ConSE (MobileNetV2 in CLIP's text space) on COCO images: draw, encode, cosine."""
    monkeypatch.syspath_prepend(str(shared_data))
    from real_models import ConSE

    from captum_concepts.images import find_images, load_image

    encoder = ConSE()
    images = torch.stack([load_image(f, 96) for f in find_images(shared_data / "images" / "coco" / "images")[:3]])
    prompt = RegionPrompt("crop", (2, 2), 30)
    text = encoder.encode_text(["dog", "car", "banana", "zebra"])
    expected = algorithm_1(images, encoder, prompt, text)
    half = build(tmp_path / "half", images, encoder, prompt)
    torch.testing.assert_close(half.similarity(text).tensor(), expected, atol=2e-3, rtol=0)
    full = build(tmp_path / "full", images, encoder, prompt, dtype=torch.float32, batch_size=1)
    torch.testing.assert_close(full.similarity(text).tensor(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["circle", "crop"])
def test_p_of_the_bundled_clip(tmp_path, kind):
    from captum_concepts import demo
    from captum_concepts.datasets import CaptionedScenes

    encoder = demo.load("clip")
    images = CaptionedScenes(3, seed=5, size=64).stack().image
    prompt = RegionPrompt(kind, (3, 3), 9)
    text = encoder.encode_text(["red", "a circle", "grass"])
    expected = algorithm_1(images, encoder, prompt, text)
    assert expected.std(dim=(2, 3)).max() > 0.02  # the encoder reacts to the mark
    half = build(tmp_path / "half", images, encoder, prompt)
    torch.testing.assert_close(half.similarity(text).tensor(), expected, atol=2e-3, rtol=0)
    full = build(tmp_path / "full", images, encoder, prompt, dtype=torch.float32, batch_size=1)
    torch.testing.assert_close(full.similarity(["red", "a circle", "grass"]).tensor(), expected, atol=1e-5, rtol=0)
