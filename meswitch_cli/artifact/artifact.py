"""An artifact on disk, opened and checked; its experts' tensors on demand."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from meswitch_cli.artifact.disk import file_digest
from meswitch_cli.artifact.manifest import MANIFEST_FILE, MAX_MANIFEST_BYTES, FileEntry, Manifest, parse_manifest
from meswitch_cli.artifact.mistaken import what_it_is
from meswitch_cli.artifact.quantization import without_transformers
from meswitch_cli.artifact.shard import Shard
from meswitch_cli.artifact.sidefiles import CONFIG_FILE
from meswitch_cli.checkpoint.checkpoint import read_json
from meswitch_cli.checkpoint.tensorfile import PIECE_BYTES, new_buffer
from meswitch_cli.delta.exact import decode
from meswitch_cli.delta.quantize import expert_value
from meswitch_cli.delta.stored import StoredDelta, TensorEntry
from meswitch_cli.errors import ArtifactError


@dataclass(frozen=True)
class Artifact:
    """An artifact whose manifest has been checked. Shards are opened, and their headers checked, when first used.

    Attributes:
        digest: SHA-256 of the manifest's file, hex. The manifest has the hashes of all others, so it stands for them.
    """

    path: Path
    manifest: Manifest
    digest: str

    @classmethod
    def open(cls, path: str | Path) -> Artifact:
        """Open a folder.

        Raises:
            ArtifactError: it is no artifact, of another version, or its manifest is damaged.
        """
        path = Path(path)
        file = path / MANIFEST_FILE
        try:
            if file.stat().st_size > MAX_MANIFEST_BYTES:
                raise ArtifactError(f"{file}: larger than a manifest can be")
            raw = file.read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ArtifactError(f"{path}: not an artifact: {what_it_is(path)}") from error
        except OSError as error:
            raise ArtifactError(f"{file}: cannot be read: {error.strerror}") from error
        return cls(path, parse_manifest(raw, str(file)), hashlib.sha256(raw).hexdigest())

    def __hash__(self) -> int:
        return hash(self.path)

    @property
    def config(self) -> dict[str, Any]:
        """The expert's config.json.

        Raises:
            CheckpointError: it is missing, or not JSON.
        """
        config = read_json(self.path / CONFIG_FILE, "an artifact carries the expert's config.json")
        return without_transformers(config)

    def entries_of(self, shard: str) -> list[TensorEntry]:
        return [entry for entry in self.manifest.tensors if entry.shard == shard]

    @functools.lru_cache(maxsize=4)  # noqa: B019 - a handful of headers, keyed by a frozen value
    def shard(self, name: str) -> Shard:
        """Open a shard by file name.

        Raises:
            ArtifactError: it is missing, damaged, or disagrees with the manifest.
        """
        return Shard(self.path / name, self.entries_of(name))

    def expert_tensor(self, entry: TensorEntry, base: torch.Tensor) -> torch.Tensor:
        """As the function `expert_tensor`, for an entry of this artifact."""
        return expert_tensor(self.shard(entry.shard), entry, base)

    def read_all(
        self, buffer_of: Callable[[int], torch.Tensor] = new_buffer, piece_bytes: int = PIECE_BYTES
    ) -> dict[str, StoredDelta]:
        """What is stored of every parameter, by name, in pieces of a shard, into memory that `buffer_of` makes.

        Raises:
            ArtifactError: a shard is damaged, or disagrees with the manifest.
        """
        return {
            name: delta
            for file in self.manifest.shards
            for name, delta in self.shard(file.name).read_all(buffer_of, piece_bytes).items()
        }

    def check_sizes(self) -> None:
        """Check that every file is there, in its size; nothing is read.

        Raises:
            ArtifactError: at the first that is not.
        """
        for file in (*self.manifest.files, *self.manifest.shards):
            self._there(file)

    def _there(self, file: FileEntry) -> Path:
        path = self.path / file.name
        if not path.is_file():
            raise ArtifactError(f"{path}: missing")
        if path.stat().st_size != file.nbytes:
            raise ArtifactError(f"{path}: {path.stat().st_size} bytes, the manifest says {file.nbytes}")
        return path

    def check_whole(self) -> None:
        """As `verify`, all of it at once."""
        for _ in self.verify():
            pass

    def verify(self) -> Iterator[FileEntry]:
        """Check every file's size and hash and every tensor's shape and values; yield each file when it is proven.

        Raises:
            ArtifactError: at the first thing that is not as the manifest says.
        """
        for file in (*self.manifest.files, *self.manifest.shards):
            path = self._there(file)
            if file_digest(path) != file.sha256:
                raise ArtifactError(f"{path}: its SHA-256 is not the manifest's: changed or damaged")
            if file in self.manifest.shards:
                for _ in self.shard(file.name).check_values():
                    pass
            yield file


def expert_tensor(shard: Shard, entry: TensorEntry, base: torch.Tensor) -> torch.Tensor:
    """The expert's tensor in `entry.shape`, given the base tensor `entry.base`, as it is stored.

    It is fp32, and of the expert's own type where it is stored bit for bit.

    Raises:
        ArtifactError: the shard is damaged, or the base tensor has another shape than the artifact was made for.
    """
    return value_of(shard.delta(entry.name), entry, base)


def value_of(stored: StoredDelta, entry: TensorEntry, base: torch.Tensor) -> torch.Tensor:
    """As `expert_tensor`, of what is stored.

    Raises:
        ArtifactError: the base tensor has another shape than the artifact was made for.
    """
    if stored.value is not None:
        return stored.value.float()
    if tuple(base.shape) != entry.base_shape:
        raise ArtifactError(
            f"tensor {entry.name!r} was made for a base of {list(entry.base_shape)}, this base has "
            f"{list(base.shape)}: wrong base"
        )
    if stored.exact is not None:
        own = decode(stored.exact, base if entry.shape == entry.base_shape else base[: entry.rows])
        return own if stored.added_rows is None else torch.cat([own, stored.added_rows])
    value = expert_value(stored, base[: entry.rows])
    if stored.added_rows is not None:
        value = torch.cat([value, stored.added_rows.float()])
    return value
