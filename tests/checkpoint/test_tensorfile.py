import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meswitch_cli.checkpoint.tensorfile import TensorFileError, read_header, read_tensor


def _write(path: Path, header: object, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.uint8, torch.bool])
def test_reads_what_safetensors_wrote(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"a": torch.arange(12).reshape(3, 4).to(dtype), "empty": torch.empty(0, 4, dtype=dtype)}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    infos = read_header(tmp_path / "x.safetensors")
    assert set(infos) == {"a", "empty"}
    for name, tensor in tensors.items():
        assert torch.equal(read_tensor(infos[name]), tensor)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"not json", b"", "not valid JSON"),
        ([1, 2], b"", "not an object"),
        ({"x": 3}, b"", "not an object"),
        ({"x": ENTRY | {"dtype": "F99"}}, bytes(8), "unknown dtype"),
        ({"x": ENTRY | {"dtype": ["F32"]}}, bytes(8), "unknown dtype"),
        ({"x": ENTRY | {"shape": [-1]}}, bytes(8), "not a list of sizes"),
        ({"x": ENTRY | {"shape": [2**60]}}, bytes(8), "not a list of sizes"),
        ({"x": ENTRY | {"shape": [True, 2]}}, bytes(8), "not a list of sizes"),
        ({"x": ENTRY | {"data_offsets": [0]}}, bytes(8), "not a list of sizes"),
        ({"x": ENTRY | {"data_offsets": [8, 0]}}, bytes(8), "-8 bytes given"),
        ({"x": ENTRY | {"shape": [3]}}, bytes(8), "needs 12"),
        ({"x": ENTRY}, bytes(7), "cut short"),
        ({"x": ENTRY, "y": ENTRY | {"data_offsets": [4, 12]}}, bytes(12), "overlap"),
    ],
)
def test_garbled_headers_are_refused(tmp_path: Path, header: object, data: bytes, message: str) -> None:
    path = _write(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(TensorFileError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


def test_absurd_header_length_reads_nothing(tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(TensorFileError, match="cut short"):
        read_header(path)


def test_file_that_shrank_since_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "x.safetensors", {"x": ENTRY}, bytes(8))
    info = read_header(path)["x"]
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(TensorFileError, match="cut short inside tensor 'x'"):
        read_tensor(info)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TensorFileError, match="No such file"):
        read_header(tmp_path / "none.safetensors")


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
_ENTRIES = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "BF16", "I8", "X"]) | _VALUES, "shape": _VALUES, "data_offsets": _VALUES}
)


@settings(max_examples=300, deadline=None)
@given(header=st.dictionaries(st.text(max_size=8), _ENTRIES | _VALUES, max_size=4), data=st.binary(max_size=64))
def test_any_header_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, header: dict, data: bytes) -> None:
    path = _write(tmp_path_factory.mktemp("fuzz") / "x.safetensors", header, data)
    try:
        infos = read_header(path)
    except TensorFileError:
        return
    for info in infos.values():
        assert info.nbytes <= len(data)


@settings(max_examples=200, deadline=None)
@given(position=st.integers(0, 10_000), value=st.integers(0, 255), cut=st.integers(0, 400))
def test_a_damaged_file_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int, cut: int
) -> None:
    path = tmp_path_factory.mktemp("damage") / "x.safetensors"
    raw = bytearray(safetensors.torch.save({"a": torch.ones(5, 7), "b": torch.zeros(3, dtype=torch.int32)}))
    raw[position % len(raw)] = value
    path.write_bytes(bytes(raw[: len(raw) - cut]))
    try:
        for info in read_header(path).values():
            read_tensor(info)
    except TensorFileError as error:
        assert str(path) in str(error)
