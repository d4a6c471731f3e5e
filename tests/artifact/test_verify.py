import dataclasses
import json
import math
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.artifact.base import check_base_shapes, refuse_other_base
from meswitch_cli.artifact.disk import file_digest
from meswitch_cli.artifact.manifest import MANIFEST_FILE, Manifest
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.errors import ArtifactError, MeswitchError
from meswitch_cli.model.weights import CheckpointWeights
from zoo.tiny import Pair, make_pair

Make = Callable[..., Artifact]


def _verify(path: Path) -> int:
    return len(list(Artifact.open(path).verify()))


def _edit(path: Path, edit: Callable[[dict], None]) -> None:
    file = path / MANIFEST_FILE
    value = json.loads(file.read_text())
    edit(value)
    file.write_text(json.dumps(value))


def _with_honest_hash(path: Path, shard: str) -> None:
    """Make the manifest agree with a shard's bytes, as a forger would."""

    def edit(value: dict) -> None:
        entry = next(item for item in value["shards"] if item["name"] == shard)
        entry |= {"nbytes": (path / shard).stat().st_size, "sha256": file_digest(path / shard)}

    _edit(path, edit)


def _require_base(manifest: Manifest, base: Checkpoint) -> None:
    check_base_shapes(manifest, base)
    refuse_other_base(manifest, CheckpointWeights(base).fingerprint, "base")


def test_a_sound_artifact_passes(pair: Pair, make_artifact: Make) -> None:
    artifact = make_artifact(pair)
    assert _verify(artifact.path) == len(artifact.manifest.files) + len(artifact.manifest.shards)


def test_its_base_and_no_other_passes(pair: Pair, make_artifact: Make, tmp_path: Path) -> None:
    manifest = make_artifact(pair).manifest
    base = Checkpoint.open(str(pair[0]))
    _require_base(manifest, base)
    (tmp_path / "sharded").mkdir()
    (tmp_path / "other").mkdir()
    resharded = Checkpoint.open(str(make_pair(tmp_path / "sharded", max_shard_size="20KB")[0]))
    _require_base(manifest, resharded)
    other = Checkpoint.open(str(make_pair(tmp_path / "other", seed=5)[0]))
    with pytest.raises(ArtifactError, match="wrong base") as caught:
        _require_base(manifest, other)
    assert f"with {manifest.base.fingerprint[:19]};" in str(caught.value)
    assert not re.search(r"[0-9a-f]{13}", str(caught.value).replace(str(other.source.path), ""))


@pytest.mark.parametrize("family", ["qwen2", "gpt_neox"])
def test_base_of_another_family_is_refused_on_metadata(
    pair: Pair, make_artifact: Make, tmp_path: Path, family: str
) -> None:
    other = Checkpoint.open(str(make_pair(tmp_path, family)[0]))
    with pytest.raises(ArtifactError, match="wrong base"):
        check_base_shapes(make_artifact(pair).manifest, other)


def test_every_flipped_byte_is_found(pair: Pair, make_artifact: Make) -> None:
    artifact = make_artifact(pair)
    for file in (*artifact.manifest.shards, *artifact.manifest.files):
        path = artifact.path / file.name
        original = path.read_bytes()
        damaged = bytearray(original)
        damaged[len(damaged) // 2] ^= 1
        path.write_bytes(bytes(damaged))
        with pytest.raises(ArtifactError, match="SHA-256"):
            _verify(artifact.path)
        path.write_bytes(original)
    assert _verify(artifact.path)


def test_missing_and_cut_files_are_found(pair: Pair, make_artifact: Make) -> None:
    artifact = make_artifact(pair)
    shard = artifact.path / artifact.manifest.shards[0].name
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(ArtifactError, match="bytes, the manifest says"):
        _verify(artifact.path)
    shard.unlink()
    with pytest.raises(ArtifactError, match="missing"):
        _verify(artifact.path)


def test_swapped_shards_are_found_even_with_honest_hashes(pair: Pair, make_artifact: Make) -> None:
    path = make_artifact(pair, max_shard_bytes=1).path
    first, second = (path / Artifact.open(path).manifest.shards[index].name for index in (0, 1))
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)
    for shard in (first, second):
        _with_honest_hash(path, shard.name)
    with pytest.raises(ArtifactError, match=r"is missing|not in the manifest"):
        _verify(path)


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Half a gigabyte more address space than the process has already."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (512 << 20), limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.usefixtures("little_memory")
def test_sizes_that_are_claimed_are_not_allocated(pair: Pair, make_artifact: Make) -> None:
    """Gigabytes in the manifest, the shard's header, or both: refused, not attempted."""
    artifact = make_artifact(pair)
    shard = artifact.path / artifact.manifest.shards[0].name
    entry = next(entry for entry in artifact.entries_of(shard.name) if entry.bits)
    raw = shard.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    rows, columns = 1 << 21, 1 << 14

    def claim(value: dict) -> None:
        next(item for item in value["tensors"] if item["name"] == entry.name).update(
            shape=[rows, columns], base_shape=[rows, columns]
        )

    grown = dataclasses.replace(entry, shape=(rows, columns), base_shape=(rows, columns))
    for part in grown.parts:
        name, shape = f"{entry.name}.{part.name}", part.shape(grown)
        start = header[name]["data_offsets"][0]
        size = math.prod(shape) * (2 if name.endswith("salient_value") else 4)
        header[name] |= {"shape": list(shape), "data_offsets": [start, start + size]}
    forged = json.dumps(header).encode()
    manifest = (artifact.path / MANIFEST_FILE).read_bytes()
    for edit, data in (
        (True, raw),
        (False, len(forged).to_bytes(8, "little") + forged + raw[8 + length :]),
        (True, len(forged).to_bytes(8, "little") + forged + raw[8 + length :]),
        (False, (1 << 62).to_bytes(8, "little") + raw[8:]),
    ):
        (artifact.path / MANIFEST_FILE).write_bytes(manifest)
        shard.write_bytes(data)
        if edit:
            _edit(artifact.path, claim)
        _with_honest_hash(artifact.path, shard.name)
        with pytest.raises(ArtifactError, match=r"the manifest says|cut short|overlap"):
            _verify(artifact.path)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("salient_index", lambda t: t * 0, "not ascending"),
        ("salient_index", lambda t: t + 10**6, "not ascending and below"),
        ("salient_index", lambda t: -t - 1, "not ascending"),
        ("steps", lambda t: t * float("nan"), "not finite"),
        ("steps", lambda t: t.double(), "has type"),
        ("codes", lambda t: t[:, :-1].contiguous(), "the manifest says"),
        ("salient_value", lambda t: t + float("inf"), "not finite"),
        ("left_steps", lambda t: t * float("nan"), "not finite"),
        ("right_steps", lambda t: t.half(), "has type"),
        ("left_codes", lambda t: t[:-1].contiguous(), "the manifest says"),
    ],
)
@pytest.mark.parametrize("bits", [2, 0.25])
def test_forged_tensors_are_found(
    pair: Pair, make_artifact: Make, part: str, value: Callable[[torch.Tensor], torch.Tensor], message: str, bits: float
) -> None:
    artifact = make_artifact(pair, rank=3, bits=bits)
    shard = artifact.path / artifact.manifest.shards[0].name
    tensors = safetensors.torch.load_file(shard)
    name = next(name for name in tensors if name.endswith(f".{part}"))
    tensors[name] = value(tensors[name])
    safetensors.torch.save_file(tensors, shard)
    _with_honest_hash(artifact.path, shard.name)
    with pytest.raises(ArtifactError, match=message):
        _verify(artifact.path)
    with pytest.raises(ArtifactError, match=message):  # what an engine loads is what was verified
        Artifact.open(artifact.path).read_all()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 2000), value=st.integers(0, 255), cut=st.integers(0, 100))
def test_a_forged_shard_is_read_or_refused(fuzzed: tuple[Path, bytes], position: int, value: int, cut: int) -> None:
    path, original = fuzzed
    shard = path / "delta-00001-of-00003.safetensors"
    damaged = bytearray(original)
    damaged[position % len(damaged)] = value
    shard.write_bytes(bytes(damaged[: len(damaged) - cut]))
    _with_honest_hash(path, shard.name)
    try:
        _verify(path)
    except MeswitchError:
        pass
    finally:
        shard.write_bytes(original)


@pytest.fixture(params=[2, 0.25], ids="{} bits".format)
def fuzzed(pair: Pair, make_artifact: Make, tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, bytes]:
    path = Path(shutil.copytree(make_artifact(pair, bits=request.param, max_shard_bytes=1).path, tmp_path / "fuzzed"))
    return path, (path / "delta-00001-of-00003.safetensors").read_bytes()
