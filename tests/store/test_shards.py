"""The sharded store: order, resume after a kill, damage, foreign rows."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from captum_concepts.errors import ArtifactError, InputError
from captum_concepts.store.manifest import fingerprint_callable, fingerprint_module, fingerprint_tensor, read_manifest
from captum_concepts.store.shards import ShardReader, ShardWriter, write_shard

ROWS = torch.randn(23, 3, generator=torch.Generator().manual_seed(0))


def write(path, rows=ROWS, size=5, **options):
    with ShardWriter(path, {"model": "a"}, shard_rows=size, **options) as writer:
        for part in rows.split(4):
            writer.append({"z": part, "n": part.half()})


def test_rows_come_back_in_any_order(tmp_path):
    write(tmp_path)
    store = ShardReader(tmp_path, {"model": "a"}, verify=True)
    index = torch.randperm(23, generator=torch.Generator().manual_seed(1))
    assert len(store) == 23
    assert store.names == ["n", "z"]
    assert torch.equal(store.rows("z", index), ROWS[index])
    assert torch.equal(store.rows("n", [22, 22, 0]), ROWS[[22, 22, 0]].half())
    assert store.rows("z", []).shape == (0, 3)
    with pytest.raises(InputError, match="23"):
        store.rows("z", [23])
    with pytest.raises(InputError, match="not 'q'"):
        store.rows("q", [0])


def test_resume_after_a_kill(tmp_path):
    writer = ShardWriter(tmp_path, {"model": "a"}, shard_rows=5)
    writer.append({"z": ROWS[:12]})  # two shards reach the disk, two rows are lost with the process
    (tmp_path / ".shard-00002.safetensors.1.2.partial").write_bytes(b"half a file")
    longer = dataclasses.replace(read_manifest(tmp_path), rows=[5, 5, 2])
    write_shard(tmp_path, longer, 2, {"z": ROWS[:2].contiguous()})  # written, but not yet in the manifest
    with pytest.raises(ArtifactError, match="unfinished"):
        ShardReader(tmp_path)
    again = ShardWriter(tmp_path, {"model": "a"}, shard_rows=5)
    assert again.rows == 10
    again.append({"z": ROWS[10:]})
    again.finish()
    assert torch.equal(ShardReader(tmp_path, verify=True).rows("z", range(23)), ROWS)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "manifest.json",
        *(f"shard-{i:05d}.safetensors" for i in range(5)),
    ]


def test_without_resume_it_starts_again(tmp_path):
    write(tmp_path)
    write(tmp_path, ROWS[:3], resume=False)
    assert len(ShardReader(tmp_path)) == 3


def test_foreign_damaged_and_missing(tmp_path):
    write(tmp_path)
    with pytest.raises(ArtifactError, match="model is 'a', not 'b'"):
        ShardReader(tmp_path, {"model": "b"})
    with pytest.raises(ArtifactError, match="model"):
        ShardWriter(tmp_path, {"model": "b"})
    shard = tmp_path / "shard-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    ShardReader(tmp_path)
    with pytest.raises(ArtifactError, match="checksum"):
        ShardReader(tmp_path, verify=True)
    shard.write_bytes(data[:-4])
    with pytest.raises(ArtifactError, match=r"shard-00001.* damaged"):
        ShardReader(tmp_path)
    shard.unlink()
    with pytest.raises(ArtifactError, match="missing"):
        ShardReader(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ArtifactError, match="cannot be read"):
        ShardReader(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(ArtifactError, match="not the manifest"):
        ShardReader(tmp_path)
    with pytest.raises(FileNotFoundError):
        ShardReader(tmp_path / "none")


def test_uneven_rows_are_refused(tmp_path):
    writer = ShardWriter(tmp_path, {})
    with pytest.raises(InputError, match="same number"):
        writer.append({"z": ROWS[:2], "n": ROWS[:3]})


def test_other_kinds_of_rows_are_refused(tmp_path):
    writer = ShardWriter(tmp_path, {}, shard_rows=2)
    writer.append({"z": ROWS[:2]})
    again = ShardWriter(tmp_path, {}, shard_rows=2)
    for one in (writer, again):
        for other in ({"z": ROWS[:2, :1]}, {"z": ROWS[:2].half()}, {"y": ROWS[:2]}, {"z": ROWS[:2], "n": ROWS[:2]}):
            with pytest.raises(InputError, match="as in earlier calls"):
                one.append(other)
    again.append({"z": ROWS[2:4]})
    again.finish()
    manifest = read_manifest(tmp_path)
    assert len(ShardReader(tmp_path)) == 4
    write_shard(tmp_path, manifest, 1, {"z": ROWS[:2, :1].contiguous()})
    with pytest.raises(ArtifactError, match="not those of the other shards"):
        ShardReader(tmp_path)
    with pytest.raises(InputError, match="must have 2 rows"):
        write_shard(tmp_path, manifest, 1, {"z": ROWS[:3]})


def test_fingerprints():
    zeros = [
        torch.zeros(2, 3),
        torch.zeros(3, 2),
        torch.zeros(6),
        torch.zeros(2, 3, dtype=torch.int32),
        torch.ones(2, 3),
    ]
    assert len({fingerprint_tensor(tensor) for tensor in zeros}) == 5
    assert fingerprint_tensor(torch.zeros(2, 3)) == fingerprint_tensor(torch.zeros(3, 2).T.clone())
    a, b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    b.load_state_dict(a.state_dict())
    assert fingerprint_module(a) == fingerprint_module(b)
    assert fingerprint_callable(a) == fingerprint_callable(b) != fingerprint_callable(a.half())
    assert "lambda" in fingerprint_callable(lambda x: x)
    assert fingerprint_callable(a) == fingerprint_module(a)
    assert fingerprint_callable(a.forward) == f"forward:{fingerprint_module(a)}"


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux which files are mapped")
def test_rows_are_mapped_so_processes_share_them(tmp_path):
    with ShardWriter(tmp_path, {}, shard_rows=1000) as writer:
        writer.append({"x": torch.rand(1000, 64)})
    reader = ShardReader(tmp_path)
    place = reader._shards[0].tensors["x"].data_ptr()
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    (found,) = [m for m in maps if int(m[0].split("-")[0], 16) <= place < int(m[0].split("-")[1], 16)]
    assert found[-1] == str(tmp_path / "shard-00000.safetensors")
