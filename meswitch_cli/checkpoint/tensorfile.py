"""One safetensors file, read lazily: the header is checked in full, tensor bytes are read only when asked for.

Plain reads instead of a memory map: resident memory stays what the caller holds, and a file that shrinks while it
is being read ends in an error, not in a signal.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch

from meswitch_cli.errors import MeswitchError

#: The format's own limit on the header (safetensors, "Format"): it keeps a hostile length from exhausting memory.
MAX_HEADER_BYTES = 100_000_000
#: How a Git LFS pointer begins: what a clone without LFS holds in a file's place (git-lfs, "Specification").
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
#: Bytes that are read at once, about a large decoder layer's at 2 bits: what a GPU is given in one copy.
PIECE_BYTES = 64 << 20
#: Elements of two tensors that are compared at once.
COMPARED_ELEMENTS = 1 << 24

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class TensorFileError(MeswitchError):
    """A safetensors file is missing, truncated or garbled."""


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `offset` and `nbytes` are bytes into `path`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """List the tensors of a safetensors file, by name, without reading any of their bytes.

    Raises:
        TensorFileError: the file is unreadable, or its header is not one that the format allows.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            prefix = stream.read(8)
            length = int.from_bytes(prefix, "little")
            if is_lfs_pointer(prefix + stream.peek(len(_LFS_POINTER))):
                raise TensorFileError(f"{path}: a Git LFS pointer, not the weights; run `git lfs pull`")
            if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise TensorFileError(f"{path}: not a safetensors file, or cut short ({size} bytes)")
            raw = stream.read(length)
    except OSError as error:
        raise TensorFileError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise TensorFileError(f"{path}: the safetensors header is not valid JSON") from error
    if not isinstance(header, dict):
        raise TensorFileError(f"{path}: the safetensors header is not an object")
    header.pop("__metadata__", None)
    data_start = 8 + length
    tensors = {name: _tensor_info(path, name, entry, data_start, size) for name, entry in header.items()}
    _refuse_overlap(path, tensors)
    return tensors


def is_lfs_pointer(start: bytes) -> bool:
    """Whether a file that starts with these bytes is a Git LFS pointer in place of the file itself."""
    return start.startswith(_LFS_POINTER)


def _tensor_info(path: Path, name: str, entry: Any, data_start: int, file_size: int) -> TensorInfo:
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict):
        raise TensorFileError(f"{where}: the header entry is not an object")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry.get("dtype"), str) else None
    if dtype is None:
        raise TensorFileError(f"{where}: unknown dtype {entry.get('dtype')!r}")
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise TensorFileError(f"{where}: shape or data_offsets is not a list of sizes")
    start, stop = offsets
    nbytes = math.prod(shape) * dtype.itemsize
    if stop - start != nbytes:
        raise TensorFileError(f"{where}: {stop - start} bytes given, shape {shape} of {dtype} needs {nbytes}")
    if data_start + stop > file_size:
        raise TensorFileError(f"{where}: ends at byte {data_start + stop}, the file has {file_size}: cut short?")
    return TensorInfo(name, dtype, tuple(shape), path, data_start + start, nbytes)


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return (
        isinstance(value, list)
        and len(value) <= 16
        and all(isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 2**48 for item in value)
    )


def _refuse_overlap(path: Path, tensors: Mapping[str, TensorInfo]) -> None:
    end, previous = 0, ""
    for info in sorted(tensors.values(), key=lambda item: (item.offset, item.nbytes)):
        if info.offset < end:
            raise TensorFileError(f"{path}: tensors {previous!r} and {info.name!r} overlap")
        end, previous = info.offset + info.nbytes, info.name


def new_buffer(nbytes: int) -> torch.Tensor:
    """Uninitialised memory, uint8 `[nbytes]`."""
    return torch.empty(nbytes, dtype=torch.uint8)


def read_tensor(info: TensorInfo, buffer_of: Callable[[int], torch.Tensor] = new_buffer) -> torch.Tensor:
    """Read one tensor into a buffer of its own, which `buffer_of` makes for a number of bytes.

    Raises:
        TensorFileError: the bytes cannot be read in full.
    """
    buffer = buffer_of(info.nbytes)
    try:
        with info.path.open("rb", buffering=0) as stream:
            stream.seek(info.offset)
            view, done = tensor_bytes(buffer), 0
            while done < info.nbytes:
                count = stream.readinto(view[done:])
                if not count:
                    raise TensorFileError(f"{info.path}: cut short inside tensor {info.name!r}")
                done += count
    except OSError as error:
        raise TensorFileError(f"{info.path}: tensor {info.name!r}: {error.strerror or error}") from error
    return buffer.view(info.dtype).reshape(info.shape)


def read_tensors(
    infos: Mapping[str, TensorInfo],
    buffer_of: Callable[[int], torch.Tensor] = new_buffer,
    piece_bytes: int = PIECE_BYTES,
) -> dict[str, torch.Tensor]:
    """Read all of these tensors, which lie in one file, in pieces: neighbours are views of one buffer where possible.

    `buffer_of` makes it, for a number of bytes: at most `piece_bytes`, or one larger tensor's.

    Raises:
        TensorFileError: the bytes cannot be read in full.
    """
    read: dict[str, torch.Tensor] = {}
    for piece in _pieces(infos, piece_bytes):
        start = infos[piece[0]].offset
        nbytes = max(infos[name].offset + infos[name].nbytes for name in piece) - start
        whole = read_tensor(TensorInfo("all", torch.uint8, (nbytes,), infos[piece[0]].path, start, nbytes), buffer_of)
        read |= {name: _view(whole, infos[name], infos[name].offset - start) for name in piece}
    return read


def _pieces(infos: Mapping[str, TensorInfo], piece_bytes: int) -> list[list[str]]:
    """Names in the order of the file, those together that are read together."""
    pieces: list[list[str]] = []
    start = 0
    for name in sorted(infos, key=lambda name: (infos[name].offset, infos[name].nbytes)):
        end = infos[name].offset + infos[name].nbytes
        if not pieces or end - start > piece_bytes:
            pieces.append([])
            start = infos[name].offset
        pieces[-1].append(name)
    return pieces


def _view(whole: torch.Tensor, info: TensorInfo, place: int) -> torch.Tensor:
    own = whole[place : place + info.nbytes]
    if place % info.dtype.itemsize:
        own = own.clone()
    return own.view(info.dtype).reshape(info.shape)


def equal_tensors(first: TensorInfo, second: TensorInfo) -> bool:
    """Whether two stored tensors hold the same values, whatever their types; read in pieces, up to a difference.

    Raises:
        TensorFileError: the bytes cannot be read in full.
    """
    if first.shape != second.shape:
        return False
    return all(
        torch.equal(read_tensor(_slice(first, start)).float(), read_tensor(_slice(second, start)).float())
        for start in range(0, first.numel, COMPARED_ELEMENTS)
    )


def _slice(info: TensorInfo, start: int) -> TensorInfo:
    """`COMPARED_ELEMENTS` elements of a tensor from this one on, as a tensor of one dimension."""
    count = min(COMPARED_ELEMENTS, info.numel - start)
    size = info.dtype.itemsize
    return TensorInfo(info.name, info.dtype, (count,), info.path, info.offset + start * size, count * size)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy, in the order safetensors stores them."""
    return memoryview(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
