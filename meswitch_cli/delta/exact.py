"""What two tensors of one floating-point type differ in, bit for bit: for updates that leave most weights alone.

Floating-point numbers, read as integers in their order, are neighbours where nothing lies between them; an update is a
step of so many places for each weight that changes. Stored are the gaps between those weights and their steps.

Weights are taken by the exponent of the base's, which whoever decodes knows: one rounding step of a large weight is
larger, so the same update moves fewer of the large weights, and by fewer places. Within one exponent gaps and steps are
like draws from one distribution, which a Huffman code of bytes comes near.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np
import torch
from numpy.typing import NDArray

#: Weights that are ordered by exponent at once; bounds the memory, and is part of the format.
BLOCK = 1 << 22
#: Type of a tensor by its code in the header, and the integers of its size; mantissa bits.
_TYPES: dict[int, tuple[torch.dtype, torch.dtype, int]] = {
    1: (torch.bfloat16, torch.int16, 7),
    2: (torch.float16, torch.int16, 10),
    3: (torch.float32, torch.int32, 23),
}
#: Version, type code, and of the gaps, the signs, the sizes and the long steps: bytes, and bytes as they are stored.
_HEADER = struct.Struct("<BB8Q")
_VERSION = 1
#: A gap's byte that means as many weights without a change; a size's that means one among the long steps.
_LONG_GAP, _LONG_SIZE = 255, 255
#: Signs that lie in a byte: 0 and 1 for steps of 1 and -1, 2 and 3 for larger ones up and down.
_SIGNS = 4
#: Deflate with Huffman codes alone: there is nothing to find twice. Measured by tests/benchmarks/exact.py.
_LEVEL, _WINDOW, _MEMORY = 9, -15, 9

_Bytes = NDArray[np.uint8]
_Integers = NDArray[np.int64]


def encode(base: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
    """A stream, uint8 `[n]`, by which `decode` makes of the base the expert; both are of one shape.

    A base of another type is rounded to the expert's first.

    Raises:
        ValueError: the type is not bf16, fp16 or fp32, or the shapes differ.
    """
    code = next((code for code, (dtype, _, _) in _TYPES.items() if dtype == expert.dtype), None)
    if code is None or base.shape != expert.shape:
        raise ValueError(f"{expert.dtype} {list(expert.shape)} against {base.dtype} {list(base.shape)}")
    gaps, moves = [], []
    ours, theirs = base.to(expert.dtype).flatten(), expert.flatten()
    for start in range(0, len(ours), BLOCK):
        own = ours[start : start + BLOCK]
        difference = _ordered(theirs[start : start + BLOCK], code) - _ordered(own, code)
        difference = difference[_in_order(own, code)]
        places = np.flatnonzero(difference)
        gaps.append(_gaps(places))
        moves.append(difference[places])
    nothing = np.empty(0, dtype=np.int64)
    parts = (np.concatenate([nothing.astype(np.uint8), *gaps]), *_steps(np.concatenate([nothing, *moves])))
    streams = [part.tobytes() for part in parts]
    packed = [_deflated(stream) for stream in streams]
    sizes = [size for stream, own in zip(streams, packed, strict=True) for size in (len(stream), len(own))]
    data = b"".join((_HEADER.pack(_VERSION, code, *sizes), *packed))
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def decode(stream: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """The expert's tensor, in its own type and the base's shape.

    Raises:
        ValueError: the stream is damaged, or not of a tensor of this size.
    """
    code, gaps, *steps = _parts(stream, base.numel())
    dtype, integer, _ = _TYPES[code]
    ours = base.to(dtype).flatten()
    result = torch.empty(base.numel(), dtype=integer)
    changes, block_gaps = _Changes(*steps), _Blocks(gaps)
    for start in range(0, len(ours), BLOCK):
        own = ours[start : start + BLOCK]
        places = block_gaps.places(len(own))
        values = _ordered(own, code)
        values[_in_order(own, code)[places]] += changes.take(len(places))
        result[start : start + BLOCK] = _unordered(values, code)
    block_gaps.finish()
    changes.finish()
    return result.view(dtype).view(base.shape)


def check(stream: torch.Tensor, numel: int) -> None:
    """Read a stream without its base.

    Raises:
        ValueError: as `decode`.
    """
    _, gaps, *steps = _parts(stream, numel)
    changes, block_gaps = _Changes(*steps), _Blocks(gaps)
    for start in range(0, numel, BLOCK):
        changes.take(len(block_gaps.places(min(BLOCK, numel - start))))
    block_gaps.finish()
    changes.finish()


def _ordered(values: torch.Tensor, code: int) -> _Integers:
    """Floating-point numbers as integers in their order, int64; the two zeros are neighbours."""
    integer = _TYPES[code][1]
    bits = values.contiguous().view(integer).numpy()
    ordered: _Integers = (bits ^ ((bits >> (8 * integer.itemsize - 1)) & torch.iinfo(integer).max)).astype(np.int64)
    return ordered


def _unordered(values: _Integers, code: int) -> torch.Tensor:
    """The inverse, as integers of the type's own size; what a damaged stream adds wraps around."""
    integer = _TYPES[code][1]
    bits = torch.from_numpy(values).to(integer)
    return bits ^ ((bits >> (8 * integer.itemsize - 1)) & torch.iinfo(integer).max)


def _in_order(values: torch.Tensor, code: int) -> NDArray[np.intp]:
    """Places of a block's weights by exponent, those of one as they lie."""
    _, integer, mantissa = _TYPES[code]
    bits = values.contiguous().view(integer).numpy()
    exponent = (bits >> mantissa) & ((1 << (8 * integer.itemsize - 1 - mantissa)) - 1)
    return np.argsort(exponent.astype(np.uint8), kind="stable")


def _gaps(places: NDArray[np.intp]) -> _Bytes:
    """Weights without a change before each that has one, a byte each, and before that as many long gaps as it takes.

    A block ends with the gap to a change past it, so that it is as long as it says.
    """
    gaps = np.diff(places, prepend=-1) - 1
    long, rest = np.divmod(gaps, _LONG_GAP)
    ends = np.cumsum(long + 1)
    result = np.full(int(ends[-1]) if len(ends) else 0, _LONG_GAP, dtype=np.uint8)
    result[ends - 1] = rest
    count = struct.pack("<I", len(places))
    return np.concatenate([np.frombuffer(count, dtype=np.uint8), result])


def _steps(changes: _Integers) -> tuple[_Bytes, _Bytes, _Bytes]:
    """Signs of all steps, sizes of those larger than 1 less 2, and those that do not fit a byte, 8 bytes each."""
    size = np.abs(changes)
    larger = size > 1
    signs = ((changes < 0) + 2 * larger).astype(np.uint8)
    signs = np.pad(signs, (0, -len(signs) % _SIGNS)).reshape(-1, _SIGNS)
    packed = (signs << (2 * np.arange(_SIGNS, dtype=np.uint8))).sum(1).astype(np.uint8)
    sizes = np.minimum(size[larger] - 2, _LONG_SIZE).astype(np.uint8)
    long = changes[larger][sizes == _LONG_SIZE]
    return packed, sizes, long.astype("<i8").view(np.uint8)


class _Blocks:
    """The gaps of all blocks, read one block after the other."""

    def __init__(self, gaps: _Bytes) -> None:
        self._gaps, self._at = gaps, 0

    def places(self, length: int) -> _Integers:
        """Places of the changes in the next block, of so many weights."""
        count = int.from_bytes(self._gaps[self._at : self._at + 4].tobytes(), "little")
        self._at += 4
        ends = self._ends(count)
        own = self._gaps[self._at : self._at + (ends[-1] + 1 if count else 0)]
        self._at += len(own)
        total = np.cumsum(own.astype(np.int64))
        places: _Integers = total[ends] + np.arange(count) if count else np.empty(0, dtype=np.int64)
        if self._at > len(self._gaps) or (count and int(places[-1]) >= length):
            raise ValueError("its changes lie beyond its end")
        return places

    def _ends(self, count: int) -> NDArray[np.intp]:
        """Where the bytes are, from here, that end the next `count` gaps."""
        found: list[NDArray[np.intp]] = []
        known, at, window = 0, self._at, max(1 << 12, 2 * count)
        while known < count:
            part = self._gaps[at : at + window]
            if not len(part):
                raise ValueError("its gaps are cut short")
            own = np.flatnonzero(part != _LONG_GAP)[: count - known]
            found.append(own + (at - self._at))
            known, at = known + len(own), at + window
        return np.concatenate(found) if found else np.empty(0, dtype=np.intp)

    def finish(self) -> None:
        if self._at != len(self._gaps):
            raise ValueError("it holds more gaps than a tensor of this size has")


class _Changes:
    """The steps of all changes, in order."""

    def __init__(self, signs: _Bytes, sizes: _Bytes, long: _Bytes) -> None:
        if len(long) % 8:
            raise ValueError("its long steps are cut short")
        codes = ((signs[:, None] >> (2 * np.arange(_SIGNS, dtype=np.uint8))) & 3).reshape(-1)
        larger = codes > 1
        own = sizes.astype(np.int64) + 2
        far = np.flatnonzero(sizes == _LONG_SIZE)
        if int(larger.sum()) != len(own) or len(far) != len(long) // 8:
            raise ValueError("its sizes are more or fewer than its larger steps")
        magnitudes = np.ones(len(codes), dtype=np.int64)
        magnitudes[larger] = own
        self._steps = np.where(codes & 1, -magnitudes, magnitudes)
        self._steps[np.flatnonzero(larger)[far]] = long.view("<i8")
        self._at = 0

    def take(self, count: int) -> _Integers:
        """The next steps."""
        own = self._steps[self._at : self._at + count]
        self._at += count
        if len(own) != count:
            raise ValueError("its steps are cut short")
        return own

    def finish(self) -> None:
        if len(self._steps) - self._at >= _SIGNS:
            raise ValueError("it holds more steps than changes")


def _parts(stream: torch.Tensor, numel: int) -> tuple[int, _Bytes, _Bytes, _Bytes, _Bytes]:
    """Type code, gaps, signs, sizes and long steps of a stream."""
    data = stream.numpy().tobytes()
    code, sizes = _header(data[: _HEADER.size])
    # A gap's byte stands for a weight at least, or for 255: no more than this, whatever the header says.
    most = (numel + 4 * -(-numel // BLOCK), -(-numel // _SIGNS), numel, 8 * numel)
    at, parts = _HEADER.size, []
    for (size, stored), limit in zip(sizes, most, strict=True):
        if size > limit or at + stored > len(data):
            raise ValueError("its header says more than it holds")
        parts.append(np.frombuffer(_inflated(data[at : at + stored], size), dtype=np.uint8))
        at += stored
    if at != len(data):
        raise ValueError("it is longer than its header says")
    return code, parts[0], parts[1], parts[2], parts[3]


def _header(data: bytes) -> tuple[int, list[tuple[int, int]]]:
    if len(data) < _HEADER.size:
        raise ValueError("it is cut short")
    version, code, *sizes = _HEADER.unpack(data)
    if version != _VERSION or code not in _TYPES:
        raise ValueError(f"version {version} or type {code} is not known")
    return code, list(zip(sizes[::2], sizes[1::2], strict=True))


def _deflated(data: bytes) -> bytes:
    packer = zlib.compressobj(_LEVEL, zlib.DEFLATED, _WINDOW, _MEMORY, zlib.Z_HUFFMAN_ONLY)
    return packer.compress(data) + packer.flush()


def _inflated(data: bytes, size: int) -> bytes:
    unpacker = zlib.decompressobj(_WINDOW)
    try:
        found = unpacker.decompress(data, size + 1)
    except zlib.error as error:
        raise ValueError(f"it cannot be unpacked: {error}") from error
    if len(found) != size or not unpacker.eof or unpacker.unused_data:
        raise ValueError("it does not unpack to what its header says")
    return found
