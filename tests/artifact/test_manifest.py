import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.artifact.manifest import MANIFEST_FILE, MAX_MANIFEST_BYTES, parse_manifest
from meswitch_cli.errors import ArtifactError, MeswitchError

SHARD = "delta-00001-of-00001.safetensors"
DIGEST = "0" * 64
VALID: dict[str, Any] = {
    "format_version": 1,
    "base": {"id": "base", "revision": None, "fingerprint": f"sha256:{DIGEST}"},
    "expert": {"id": "expert", "revision": "main", "fingerprint": f"sha256:{DIGEST}"},
    "model_type": "llama",
    "num_layers": 1,
    "dtype": "bfloat16",
    "settings": {"bits": 2},
    "tensors": [
        {
            "name": "a.weight",
            "kind": "linear",
            "shape": [8, 32],
            "base": "a.weight",
            "base_shape": [8, 32],
            "layer": 0,
            "shard": SHARD,
            "nbytes": 96,
            "bits": 2,
            "salient": 1,
            "group_size": 0,
            "channel_scale": False,
            "added_rows": 0,
            "delta_energy": 1.0,
            "weight_error": 0.1,
            "output_error": None,
        }
    ],
    "unchanged": ["b.weight"],
    "shards": [{"name": SHARD, "nbytes": 200, "sha256": DIGEST}],
    "files": [{"name": "config.json", "nbytes": 2, "sha256": DIGEST}],
    "config_differences": {},
    "created_with": "meswitch 0.1.0",
}


#: A trellis code and a scalar one in version 3.
TRELLIS: dict[str, Any] = copy.deepcopy(VALID) | {"format_version": 3}
TRELLIS["tensors"] = [
    VALID["tensors"][0]
    | {"rank": 2, "bits": 0.25, "code": "trellis", "taps": [101, 73, 113, 125], "states": 64, "nbytes": 96},
    VALID["tensors"][0] | {"rank": 0, "name": "c.weight", "code": "scalar", "taps": [], "states": 0},
]


def _parse(value: Any) -> Any:
    return parse_manifest(json.dumps(value).encode(), "manifest")


def _changed(path: str, value: Any, of: dict[str, Any] = VALID) -> dict[str, Any]:
    result = copy.deepcopy(of)
    *parents, last = path.split(".")
    target: Any = result
    for key in parents:
        target = target[int(key) if key.isdigit() else key]
    if value is ...:
        del target[last]
    else:
        target[last] = value
    return result


@pytest.mark.parametrize("valid", [VALID, TRELLIS])
def test_round_trip(valid: dict[str, Any]) -> None:
    manifest = _parse(valid)
    assert parse_manifest(manifest.to_json().encode(), "again") == manifest
    assert manifest.format_version == valid["format_version"]


@pytest.mark.parametrize(
    ("rank", "settings", "version"),
    [(0, {}, 1), (3, {"factor_bits": 4}, 2), (3, {}, 4), (3, {"bits": 0.25}, 3), (0, {"bits": 0.5}, 3)],
)
def test_written_manifest_is_read_back(
    pair: tuple[Path, Path], make_artifact: Callable[..., Artifact], rank: int, settings: dict[str, Any], version: int
) -> None:
    manifest = make_artifact(pair, rank=rank, **settings).manifest
    assert parse_manifest(manifest.to_json().encode(), "again") == manifest
    assert manifest.format_version == version
    members = json.loads(manifest.to_json())["tensors"][0].keys()
    assert ("rank" in members, "taps" in members) == (version > 1, version > 2)
    assert {entry.rank for entry in manifest.tensors if entry.kind == "linear"} == {rank}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("tensors.0.rank", ..., "'rank' is missing"),
        ("tensors.0.rank", 9, "rank 9 is impossible"),
        ("tensors.0.rank", -1, "whole number"),
        ("tensors.0.kind", "dense", "cannot have quantisation"),
    ],
)
def test_a_low_rank_part_that_cannot_be_is_refused(path: str, value: Any, message: str) -> None:
    valid = _changed("format_version", 2)
    valid["tensors"][0]["rank"] = 8
    entry = _parse(valid).tensors[0]
    assert {part.name: part.shape(entry) for part in entry.parts}["right_codes"] == (8, 4)
    *_, last = path.split(".")
    if value is ...:
        del valid["tensors"][0][last]
    else:
        valid["tensors"][0][last] = value
    with pytest.raises(ArtifactError, match=message):
        _parse(valid)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format_version", 5, "format version 5.*upgrade meswitch"),
        ("format_version", 0, "format version 0"),
        ("format_version", "1", "'format_version' is not a whole number"),
        ("base", ..., "'base' is missing"),
        ("base.fingerprint", "md5:12", "'fingerprint' is not of the form"),
        ("base.id", "a\x00b", "'id' is not a short printable"),
        ("dtype", "int8", "'dtype' is not one of"),
        ("num_layers", -1, "whole number"),
        ("num_layers", True, "whole number"),
        ("tensors", {}, "'tensors' is not a list"),
        ("tensors.0.shape", [2**40, 2**40], "'shape' is not a shape"),
        ("tensors.0.shape", [8, 0], "'shape' is not a shape"),
        ("tensors.0.shape", [8, 64], "does not go with base shape"),
        ("tensors.0.shape", [12, 32], "added rows"),
        ("tensors.0.bits", 3, "bits must be"),
        ("tensors.0.bits", 10**30, "whole number"),
        ("tensors.0.salient", 33, "salient 33"),
        ("tensors.0.group_size", 20, "group size 20"),
        ("tensors.0.kind", "matrix", "'kind' is not one of"),
        ("tensors.0.kind", "dense", "cannot have quantisation"),
        ("tensors.0.shard", "../../etc/passwd", "'shard' is not of the form"),
        ("tensors.0.shard", "delta-00002-of-00002.safetensors", "not listed"),
        ("tensors.0.weight_error", "small", "a finite number"),
        ("unchanged", ["a.weight"], "listed twice"),
        ("unchanged", [3], "list of strings"),
        ("shards.0.name", "/etc/passwd", "'name' is not of the form"),
        ("shards.0.name", "delta-00002-of-00002.safetensors", "not numbered"),
        ("shards.0.nbytes", 2**60, "whole number"),
        ("files.0.name", "../config.json", "'name' is not of the form"),
        ("files.0.name", "meswitch.json", "listed twice"),
        ("files.0.name", "..", "'name' is not of the form"),
        ("files.0.sha256", "xyz", "'sha256' is not of the form"),
    ],
)
def test_what_cannot_be_is_refused(path: str, value: Any, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        _parse(_changed(path, value))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("code", ..., "'code' is missing"),
        ("code", "turbo", "'code' is not one of scalar, trellis"),
        ("code", "scalar", "scalar codes have neither taps nor states"),
        ("taps", ..., "'taps' is missing"),
        ("taps", [101, 73, 113], "3 taps do not go with 0.25 bits"),
        ("taps", [101, 73, 113, 128], "taps reach beyond 64 states"),
        ("taps", [101, 73, 113, 0], "taps reach beyond"),
        ("taps", [101, 73, 113, 2**70], "a list of whole numbers"),
        ("taps", [101, 73, 113, True], "a list of whole numbers"),
        ("taps", [1] * 1000, "a list of whole numbers"),
        ("taps", 5, "'taps' is not a list"),
        ("states", 65, "65 states are none of"),
        ("states", 2**20, "1048576 states are none of"),
        ("states", -1, "whole number"),
        ("bits", 0.3, "a trellis code cannot have 0.3 bits"),
        ("bits", 0, "a trellis code cannot have 0 bits"),
        ("bits", 1e-320, "a trellis code cannot have"),
        ("bits", 2, "a trellis code cannot have 2 bits"),
        ("bits", 1e300, "a number from 0 to 4"),
        ("bits", "0.25", "a number from 0 to 4"),
        ("group_size", 32, "group size 32 is impossible"),
        ("kind", "dense", "cannot have quantisation"),
        ("rank", 9, "rank 9 is impossible"),
    ],
)
def test_a_trellis_code_that_cannot_be_is_refused(path: str, value: Any, message: str) -> None:
    entry = _parse(TRELLIS).tensors[0]
    assert {part.name: part.shape(entry) for part in entry.parts}["codes"] == (8, 1)
    assert (entry.width, entry.trellis and entry.trellis.channels_a_bit) == (1, 4)
    with pytest.raises(ArtifactError, match=message):
        _parse(_changed(f"tensors.0.{path}", value, TRELLIS))


def test_not_json_and_too_large() -> None:
    for raw in (b"", b"[1, 2]", b"{", b'{"format_version": NaN}', b"\xff\xfe", b"[" * 100_000):
        with pytest.raises(ArtifactError):
            parse_manifest(raw, "manifest")
    with pytest.raises(ArtifactError, match="more than a manifest"):
        parse_manifest(b" " * (MAX_MANIFEST_BYTES + 1), "manifest")


def test_folder_without_manifest(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=f"not an artifact: it has no {MANIFEST_FILE}"):
        Artifact.open(tmp_path)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def _paths(value: Any, prefix: str = "") -> list[str]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = []
    for key, inner in items:
        path = f"{prefix}{key}"
        if not isinstance(value, list):
            found.append(path)
        found += _paths(inner, f"{path}.")
    return found


@settings(max_examples=500, deadline=None)
@given(of=st.sampled_from([VALID, TRELLIS]), data=st.data(), value=_JSON | st.just(...))
def test_any_change_is_read_or_refused(of: dict[str, Any], data: st.DataObject, value: Any) -> None:
    path = data.draw(st.sampled_from(_paths(of)))
    try:
        manifest = _parse(_changed(path, value, of))
    except MeswitchError:
        return
    for entry in manifest.tensors:
        assert all(part.shape(entry) for part in entry.parts if entry.shape)


@settings(max_examples=300, deadline=None)
@given(raw=st.binary(max_size=300) | _JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_refused(raw: bytes) -> None:
    with pytest.raises(MeswitchError):
        parse_manifest(raw, "manifest")
