"""An artifact being made: finished units survive a crash, and the finished artifact appears in one rename.

Work goes on in a hidden folder beside the output. A finished unit is a shard and a record of it; the shard is there
before the record, so a record can be trusted. The same command finds the folder again and continues.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meswitch_cli.artifact.disk import disk_errors, exclusive, file_digest, sync_folder, write_atomically
from meswitch_cli.artifact.manifest import MANIFEST_FILE, FileEntry, Manifest, TensorEntry
from meswitch_cli.errors import ArtifactError

_IDENTITY_FILE = "identity.json"


@dataclass(frozen=True)
class UnitRecord:
    """What is known of a finished unit: its shard, its tensors, and the digests of what it was made from."""

    shard: FileEntry
    tensors: tuple[TensorEntry, ...]
    unchanged: tuple[str, ...]
    base_digests: Mapping[str, str]
    expert_digests: Mapping[str, str]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, raw: bytes) -> UnitRecord:
        value = json.loads(raw)
        tensors = [
            TensorEntry(**item | {"shape": tuple(item["shape"]), "base_shape": tuple(item["base_shape"])})
            for item in value["tensors"]
        ]
        return cls(
            FileEntry(**value["shard"]),
            tuple(tensors),
            tuple(value["unchanged"]),
            value["base_digests"],
            value["expert_digests"],
        )


class Workspace:
    """The hidden folder of one artifact in the making; open it with `workspace()`."""

    def __init__(self, out: Path, folder: Path) -> None:
        self.out, self.folder = out, folder

    def identity(self) -> dict[str, Any] | None:
        """What earlier work in this folder was made from, None where there is none."""
        path = self.folder / _IDENTITY_FILE
        return json.loads(path.read_bytes()) if path.exists() else None

    def set_identity(self, identity: Mapping[str, Any]) -> None:
        write_atomically(self.folder / _IDENTITY_FILE, json.dumps(identity).encode())

    def clear(self) -> None:
        """Forget all earlier work."""
        with disk_errors(self.folder):
            for path in self.folder.iterdir():
                path.unlink()

    def record(self, index: int, stage: str) -> UnitRecord | None:
        """The record of a finished unit whose shard is there in full, else None."""
        path = self.folder / f"{stage}-{index:05d}.json"
        if not path.exists():
            return None
        record = UnitRecord.from_json(path.read_bytes())
        shard = self.folder / record.shard.name
        return record if shard.exists() and shard.stat().st_size == record.shard.nbytes else None

    def finish_unit(self, index: int, stage: str, shard: bytes, record: UnitRecord) -> None:
        """Make a unit durable: shard first, record second."""
        write_atomically(self.folder / record.shard.name, shard)
        write_atomically(self.folder / f"{stage}-{index:05d}.json", record.to_json().encode())

    def publish(self, manifest: Manifest, side_files: Mapping[str, bytes]) -> None:
        """Write the manifest and the side files, drop what is not the artifact's, and move it into place.

        Raises:
            ArtifactError: a shard is not what its record says, or the disk refuses.
        """
        for name, data in side_files.items():
            write_atomically(self.folder / name, data)
        for shard in manifest.shards:
            if file_digest(self.folder / shard.name) != shard.sha256:
                raise ArtifactError(
                    f"{self.folder / shard.name}: changed on disk since it was written; delete it and run again"
                )
        write_atomically(self.folder / MANIFEST_FILE, manifest.to_json().encode())
        keep = {MANIFEST_FILE, *(entry.name for entry in (*manifest.shards, *manifest.files))}
        with disk_errors(self.out):
            for path in self.folder.iterdir():
                if path.name not in keep:
                    path.unlink()
            replaced = self.folder.with_suffix(".replaced")
            if self.out.exists():
                self.out.rename(replaced)
            self.folder.rename(self.out)
            sync_folder(self.out.parent)
            if replaced.exists():
                shutil.rmtree(replaced)


@contextmanager
def workspace(out: Path, *, force: bool) -> Iterator[Workspace]:
    """Open the folder in which `out` is made, held against other processes.

    Raises:
        ArtifactError: `out` exists (and `force` does not apply), is in use by another process, or cannot be written.
    """
    out = out.expanduser().absolute()
    folder = out.parent / f".{out.name}.partial"
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    lock = out.parent / f".{out.name}.lock"
    with exclusive(lock):
        try:
            _refuse_occupied(out, force)
            with disk_errors(folder):
                folder.mkdir(exist_ok=True)
            yield Workspace(out, folder)
        finally:
            if not folder.exists():
                lock.unlink(missing_ok=True)


def _refuse_occupied(out: Path, force: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise ArtifactError(f"{out}: a file is there; choose another output folder")
    if not any(out.iterdir()):
        with disk_errors(out):
            out.rmdir()
        return
    if not (out / MANIFEST_FILE).is_file():
        raise ArtifactError(f"{out}: in use by other files, not an artifact; choose another output folder")
    if not force:
        raise ArtifactError(f"{out}: an artifact is there already; give --force to replace it")
