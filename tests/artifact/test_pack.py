"""One file where an artifact is small, several where it is not, and the same tensors in either."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from meswitch_cli.artifact import pack
from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.artifact.manifest import FileEntry, Manifest, ModelReference, shard_name
from meswitch_cli.artifact.pack import pack_shards
from meswitch_cli.artifact.shard import encode_shard
from meswitch_cli.checkpoint.tensorfile import read_header
from meswitch_cli.compression.job import compress, prepare
from meswitch_cli.compression.settings import CompressionSettings
from meswitch_cli.errors import ArtifactError
from zoo.tiny import Pair, make_pair

Make = Callable[..., Artifact]


def test_a_small_artifact_is_one_file_of_the_same_tensors(pair: Pair, make_artifact: Make) -> None:
    whole = make_artifact(pair, out="whole", rank=3)
    apart = make_artifact(pair, out="apart", rank=3, max_shard_bytes=1)
    assert [shard.name for shard in whole.manifest.shards] == ["delta-00001-of-00001.safetensors"]
    assert len(apart.manifest.shards) == apart.manifest.num_layers + 1
    loaded = safetensors.torch.load_file(whole.path / "delta-00001-of-00001.safetensors")
    parts = [safetensors.torch.load_file(apart.path / shard.name) for shard in apart.manifest.shards]
    assert sum(map(len, parts)) == len(loaded)
    for part in parts:
        for name, tensor in part.items():
            assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)
    first, second = whole.read_all(), apart.read_all()
    assert list(first) == list(second)
    for name, delta in second.items():
        assert all(torch.equal(first[name].tensors[part], tensor) for part, tensor in delta.tensors.items())
    assert whole.manifest.nbytes == sum((whole.path / shard.name).stat().st_size for shard in whole.manifest.shards)
    assert len(list(whole.verify())) == 1 + len(whole.manifest.files)


def test_files_fill_up_to_the_limit_in_the_order_of_the_layers(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, num_hidden_layers=5)
    job = prepare(str(pair[0]), str(pair[1]), tmp_path / "a", CompressionSettings(salient=4), None)
    layer = compress(job, max_shard_bytes=1).shards[0].nbytes
    manifest = compress(job, max_shard_bytes=int(2.5 * layer), force=True)
    held = [{entry.layer for entry in manifest.tensors if entry.shard == shard.name} for shard in manifest.shards]
    assert held[:2] == [{0, 1}, {2, 3}] and set().union(*held[2:]) == {4, None}
    assert all(shard.nbytes <= 2.5 * layer for shard in manifest.shards[:3])
    assert len(list(Artifact.open(job.out).verify())) == len(manifest.shards) + len(manifest.files)


def _units(folder: Path, *units: dict[str, torch.Tensor]) -> Manifest:
    files = []
    for index, tensors in enumerate(units):
        data = encode_shard(tensors)
        (folder / shard_name(index, len(units))).write_bytes(data)
        files.append(FileEntry(shard_name(index, len(units)), len(data), hashlib.sha256(data).hexdigest()))
    nobody = ModelReference("base", None, f"sha256:{'0' * 64}")
    return Manifest(nobody, nobody, "llama", 1, "bfloat16", {}, (), (), tuple(files), (), {}, "meswitch")


def test_odd_numbers_of_halves_leave_every_tensor_aligned(tmp_path: Path) -> None:
    """Units end in types of two bytes, and a reader of one of four wants it at a multiple of four."""
    units = [
        {
            f"{index}.codes": torch.arange(index, index + 3, dtype=torch.int32),
            f"{index}.half": torch.full((index + 1,), float(index), dtype=torch.float16),
            f"{index}.brain": torch.full((1,), float(-index), dtype=torch.bfloat16),
            f"{index}.steps": torch.full((2, 1), 0.5 + index),
        }
        for index in range(4)
    ]
    (tmp_path / "out").mkdir()
    packed = pack_shards(tmp_path, _units(tmp_path, *units), tmp_path / "out")
    (file,) = packed.shards
    path = tmp_path / "out" / file.name
    assert (file.nbytes, file.sha256) == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    assert all(info.offset % info.dtype.itemsize == 0 for info in read_header(path).values())
    loaded = safetensors.torch.load(path.read_bytes())
    wanted = {name: tensor for unit in units for name, tensor in unit.items()}
    assert loaded.keys() == wanted.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in wanted.items())


def test_a_unit_alone_keeps_its_bytes(tmp_path: Path) -> None:
    dtypes = {"é": torch.float16, "b": torch.bfloat16, "c": torch.int32, "d": torch.float32, "a": torch.int32}
    tensors = {name: torch.ones(3, dtype=dtype) for name, dtype in dtypes.items()}
    manifest = _units(tmp_path, tensors)
    (tmp_path / "out").mkdir()
    assert pack_shards(tmp_path, manifest, tmp_path / "out").shards == manifest.shards


def test_packing_that_was_cut_off_is_done_again(
    pair: Pair, make_artifact: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = prepare(str(pair[0]), str(pair[1]), tmp_path / "cut", CompressionSettings(salient=4), None)
    real, calls = pack._chunks, 0

    def cut(info):
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return real(info)

    monkeypatch.setattr(pack, "_chunks", cut)
    with pytest.raises(KeyboardInterrupt):
        compress(job)
    assert not job.out.exists()
    monkeypatch.setattr(pack, "_chunks", real)
    seen: list[str] = []
    compress(job, on_progress=lambda what, nbytes, units: seen.append(what))
    assert seen.count("resumed") == len(job.plan.units) and "compress" not in seen
    whole = make_artifact(pair, out="whole", calibration=None)
    listed = {path.name: path.read_bytes() for path in job.out.iterdir()}
    wanted = {path.name: path.read_bytes() for path in whole.path.iterdir()}
    assert listed.keys() == wanted.keys()
    shard = "delta-00001-of-00001.safetensors"
    assert listed[shard] == wanted[shard]
    assert not list(tmp_path.glob(".cut*"))


def test_a_unit_that_changed_on_disk_is_not_packed(pair: Pair, tmp_path: Path) -> None:
    job = prepare(str(pair[0]), str(pair[1]), tmp_path / "a", CompressionSettings(salient=4), None)

    def damage(what: str, nbytes: int, units: int) -> None:
        if what == "check":
            unit = next((tmp_path / ".a.partial").glob("delta-*.safetensors"))
            unit.write_bytes(unit.read_bytes()[:-1] + b"\xff")

    with pytest.raises(ArtifactError, match="changed on disk"):
        compress(job, on_progress=damage)
    assert not job.out.exists()


def test_an_artifact_of_a_file_a_layer_still_opens(pair: Pair, make_artifact: Make, tmp_path: Path) -> None:
    """As earlier versions wrote it, the card among the listed files."""
    path = Path(shutil.copytree(make_artifact(pair, max_shard_bytes=1).path, tmp_path / "old"))
    card = (path / "README.md").read_bytes()
    value = json.loads((path / "meswitch.json").read_text())
    value["files"].append({"name": "README.md", "nbytes": len(card), "sha256": hashlib.sha256(card).hexdigest()})
    (path / "meswitch.json").write_text(json.dumps(value))
    artifact = Artifact.open(path)
    assert len(list(artifact.verify())) == len(artifact.manifest.shards) + len(artifact.manifest.files) > 4
