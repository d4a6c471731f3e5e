"""Reading a whole file at once gives the same tensors as one by one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from meswitch_cli.checkpoint.tensorfile import TensorFileError, read_header, read_tensor, read_tensors


def test_the_same_as_one_by_one(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(7, dtype=torch.int32), "c": torch.randn(5).bfloat16()}
    safetensors.torch.save_file(tensors, tmp_path / "file")
    infos = read_header(tmp_path / "file")
    together = read_tensors(infos)
    assert set(together) == set(tensors)
    assert all(torch.equal(together[name], read_tensor(infos[name])) for name in tensors)
    assert read_tensors({}) == {}


def test_unaligned_tensors_are_copied(tmp_path: Path) -> None:
    header = {
        "odd": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "value": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
    }
    raw = json.dumps(header).encode()
    value = torch.tensor([1.5, -2.0])
    data = b"\x01\x02\x03" + bytes(value.view(torch.uint8).tolist())
    (tmp_path / "file").write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    assert torch.equal(read_tensors(read_header(tmp_path / "file"))["value"], value)


def test_a_file_that_shrinks(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.randn(100)}, tmp_path / "file")
    infos = read_header(tmp_path / "file")
    (tmp_path / "file").write_bytes((tmp_path / "file").read_bytes()[:-40])
    with pytest.raises(TensorFileError, match="cut short"):
        read_tensors(infos)
