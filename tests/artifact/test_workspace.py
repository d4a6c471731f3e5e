"""Files of unfinished work that this meswitch did not write."""

import json
from pathlib import Path
from typing import Any

import pytest

from meswitch_cli.artifact.manifest import FileEntry, TensorEntry
from meswitch_cli.artifact.workspace import Inputs, UnitRecord, Workspace, workspace
from meswitch_cli.errors import ArtifactError

INPUTS = Inputs(version="1", settings={"bits": 2}, base_files="a", expert_files="b")
RECORD = UnitRecord(
    shard=FileEntry("delta-00001-of-00001.safetensors", 3, "0" * 64),
    tensors=(
        TensorEntry(
            name="x.weight",
            kind="linear",
            shape=(4, 8),
            base="x.weight",
            base_shape=(4, 8),
            layer=0,
            shard="delta-00001-of-00001.safetensors",
            nbytes=3,
        ),
    ),
    unchanged=("norm.weight",),
    base_digests={"x.weight": "1"},
    expert_digests={"x.weight": "2"},
)


def _begun(out: Path) -> Workspace:
    with workspace(out, force=False) as space:
        space.begin(INPUTS)
        space.finish_unit(0, "unit", b"abc", RECORD)
    return space


def test_what_was_written_is_read(tmp_path: Path) -> None:
    space = _begun(tmp_path / "out")
    assert space.inputs() == INPUTS
    assert space.record(0, "unit") == RECORD
    assert space.record(1, "unit") is None
    space.shard_path(RECORD.shard.name).write_bytes(b"ab")
    assert space.record(0, "unit") is None  # cut short: to be done again


def _older(value: dict[str, Any]) -> dict[str, Any]:
    return {key: item for key, item in value.items() if key not in ("settings", "shard")}


def _newer(value: dict[str, Any]) -> dict[str, Any]:
    tensors = [item | {"trellis": 8} for item in value.get("tensors", [])]
    return value | ({"tensors": tensors} if tensors else {"trellis": 8})


@pytest.mark.parametrize("file", ["identity.json", "unit-00000.json"])
@pytest.mark.parametrize(
    "change",
    [_older, _newer, lambda value: [value], lambda value: None, lambda value: 7, lambda value: value | {"shard": {}}],
    ids=["older", "newer", "list", "null", "number", "empty"],
)
def test_a_foreign_file_is_named(tmp_path: Path, file: str, change: Any) -> None:
    space = _begun(tmp_path / "out")
    path = space.state / file
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ArtifactError, match=f"{file}: damaged, or not of this version") as caught:
        _ = space.inputs(), space.record(0, "unit")
    assert f"delete the folder {space.state}" in str(caught.value)


@pytest.mark.parametrize("file", ["identity.json", "unit-00000.json"])
def test_a_file_cut_short_is_named(tmp_path: Path, file: str) -> None:
    space = _begun(tmp_path / "out")
    path = space.state / file
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ArtifactError, match=f"{file}: damaged"):
        _ = space.inputs(), space.record(0, "unit")
