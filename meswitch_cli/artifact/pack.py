"""Finished units to the files of an artifact: one where it is small, several where it is not."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from meswitch_cli.artifact.disk import write_atomically
from meswitch_cli.artifact.manifest import FileEntry, Manifest, shard_name
from meswitch_cli.artifact.shard import SHARD_METADATA
from meswitch_cli.checkpoint.tensorfile import DTYPES, TensorFileError, TensorInfo, read_header
from meswitch_cli.errors import ArtifactError

#: Files up to this size hold as many units as fit: a file of this size is fetched and uploaded in one go.
MAX_SHARD_BYTES = 500_000_000
_CHUNK_BYTES = 1 << 22
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def pack_shards(folder: Path, manifest: Manifest, out: Path, max_bytes: int = MAX_SHARD_BYTES) -> Manifest:
    """Write the shards that `manifest` lists, which lie in `folder`, into `out`, in as few files as `max_bytes` allows.

    A shard larger than that is a file of its own.

    Returns:
        The manifest with the new files in place of the shards.

    Raises:
        ArtifactError: a shard is damaged, or the disk refuses.
    """
    groups = _groups([shard.nbytes for shard in manifest.shards], max_bytes)
    names = {
        manifest.shards[member].name: shard_name(index, len(groups))
        for index, group in enumerate(groups)
        for member in group
    }
    files = [
        _pack([folder / manifest.shards[member].name for member in group], out / shard_name(index, len(groups)))
        for index, group in enumerate(groups)
    ]
    entries = (dataclasses.replace(entry, shard=names[entry.shard]) for entry in manifest.tensors)
    return dataclasses.replace(manifest, shards=tuple(files), tensors=tuple(entries))


def first_shard(sizes: Sequence[int], max_bytes: int) -> str:
    """What the first file will be called that units of these sizes are packed into."""
    return shard_name(0, len(_groups(sizes, max_bytes)))


def _groups(sizes: Sequence[int], max_bytes: int) -> list[list[int]]:
    """Neighbours whose sizes add up to `max_bytes` at most."""
    groups: list[list[int]] = []
    total = 0
    for index, size in enumerate(sizes):
        if not groups or total + size > max_bytes:
            groups.append([])
            total = 0
        groups[-1].append(index)
        total += size
    return groups


def _pack(parts: Sequence[Path], path: Path) -> FileEntry:
    """Join safetensors files: types of the widest elements first, so that each tensor is aligned; then by part."""
    try:
        headers = [read_header(part) for part in parts]
    except TensorFileError as error:
        raise ArtifactError(str(error)) from error
    infos = [info for header in headers for info in sorted(header.values(), key=lambda info: info.offset)]
    rank = {dtype: index for index, dtype in enumerate(dict.fromkeys(info.dtype for info in infos))}
    infos.sort(key=lambda info: (-info.dtype.itemsize, rank[info.dtype]))
    header, digest = _header(infos), hashlib.sha256()

    def pieces() -> Iterator[bytes]:
        for piece in itertools.chain([header], *map(_chunks, infos)):
            digest.update(piece)
            yield piece

    write_atomically(path, pieces())
    return FileEntry(path.name, len(header) + sum(info.nbytes for info in infos), digest.hexdigest())


def _header(infos: Sequence[TensorInfo]) -> bytes:
    """Length and header of a safetensors file with these tensors in this order (safetensors, "Format")."""
    value: dict[str, Any] = {"__metadata__": SHARD_METADATA}
    start = 0
    for info in infos:
        value[info.name] = {
            "dtype": _DTYPE_NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [start, start + info.nbytes],
        }
        start += info.nbytes
    raw = json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _chunks(info: TensorInfo) -> Iterator[bytes]:
    with info.path.open("rb") as stream:
        stream.seek(info.offset)
        left = info.nbytes
        while left:
            chunk = stream.read(min(left, _CHUNK_BYTES))
            if not chunk:
                raise ArtifactError(f"{info.path}: cut short inside tensor {info.name!r}")
            left -= len(chunk)
            yield chunk
