"""One shard: stored tensors to bytes and back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import safetensors.torch
import torch

from meswitch_cli.checkpoint.tensorfile import (
    PIECE_BYTES,
    TensorFileError,
    new_buffer,
    read_header,
    read_tensor,
    read_tensors,
)
from meswitch_cli.delta.stored import StoredDelta, TensorEntry
from meswitch_cli.errors import ArtifactError

#: Bytes of a shard beside its tensors and their entries in the header: the header's length, the format, padding.
SHARD_NBYTES = 8 + len('{"__metadata__":{"format":"meswitch"}}') + 8
SHARD_METADATA = {"format": "meswitch"}


def encode_shard(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Safetensors bytes of the tensors; the same tensors give the same bytes."""
    contiguous = {name: tensors[name].contiguous() for name in sorted(tensors)}
    data: bytes = safetensors.torch.save(contiguous, metadata=SHARD_METADATA)
    return data


def header_nbytes(entry: TensorEntry, offset_digits: int) -> int:
    """Bytes that an entry takes of a shard's header, at most; offsets have no more digits than said."""
    offset = 10**offset_digits - 1
    total = 0
    for part in entry.parts:
        value = {"dtype": "BF16", "shape": list(part.shape(entry)), "data_offsets": [offset, offset]}
        total += len(json.dumps({f"{entry.name}.{part.name}": value}, separators=(",", ":"))) - 1  # a comma, no braces
    return total


class Shard:
    """A shard file whose header agrees with the manifest's entries for it."""

    def __init__(self, path: Path, entries: list[TensorEntry]) -> None:
        """Check the header.

        Raises:
            ArtifactError: the file is damaged, or holds other tensors, shapes or types than the manifest says.
        """
        try:
            self._infos = read_header(path)
        except TensorFileError as error:
            raise ArtifactError(str(error)) from error
        self._entries = {entry.name: entry for entry in entries}
        expected = {f"{entry.name}.{part.name}": (entry, part) for entry in entries for part in entry.parts}
        if set(expected) != set(self._infos):
            odd = sorted(set(expected) ^ set(self._infos))
            holder = "is missing" if odd[0] in expected else "is not in the manifest"
            raise ArtifactError(f"{path}: tensor {odd[0]!r} {holder}")
        for name, (entry, part) in expected.items():
            info, shape = self._infos[name], part.shape(entry)
            if info.shape != shape:
                raise ArtifactError(f"{path}: tensor {name!r} is {list(info.shape)}, the manifest says {list(shape)}")
            if info.dtype not in part.dtypes:
                raise ArtifactError(f"{path}: tensor {name!r} has type {info.dtype}")

    def value_dtype(self, name: str) -> torch.dtype | None:
        """The type in which a parameter is stored whole; None of one that is not."""
        info = self._infos.get(f"{name}.value")
        return info.dtype if info else None

    def delta(self, name: str) -> StoredDelta:
        """Read what is stored of one parameter.

        Raises:
            ArtifactError: salient indices are not ascending channels of the tensor, or a number is not finite.
        """
        entry = self._entries[name]
        try:
            return _decoded(entry, {part.name: read_tensor(self._infos[f"{name}.{part.name}"]) for part in entry.parts})
        except TensorFileError as error:
            raise ArtifactError(str(error)) from error

    def read_all(
        self, buffer_of: Callable[[int], torch.Tensor] = new_buffer, piece_bytes: int = PIECE_BYTES
    ) -> dict[str, StoredDelta]:
        """What is stored of every parameter, by name, in few reads, with the checks of `delta`; `buffer_of` makes the
        memory for each."""
        try:
            stored = read_tensors(self._infos, buffer_of, piece_bytes)
        except TensorFileError as error:
            raise ArtifactError(str(error)) from error
        return {
            name: _decoded(entry, {part.name: stored[f"{name}.{part.name}"] for part in entry.parts})
            for name, entry in self._entries.items()
        }

    def check_values(self) -> Iterator[str]:
        """Read every parameter once, with the checks of `delta`; yield its name."""
        for name in self._entries:
            self.delta(name)
            yield name


def _decoded(entry: TensorEntry, tensors: Mapping[str, torch.Tensor]) -> StoredDelta:
    try:
        return StoredDelta.of(entry, tensors)
    except ValueError as error:
        raise ArtifactError(f"tensor {entry.name!r}: {error}") from error
