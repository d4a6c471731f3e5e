"""An artifact being made: finished units survive a crash, and the finished artifact appears in one rename.

Work goes on in a hidden folder beside the output, removed when it is done. A finished unit is a shard and a record of
it; the shard is there before the record, so a record can be trusted. The same command finds the folder again and
continues.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meswitch_cli.artifact.disk import disk_errors, exclusive, file_digest, sync_folder, write_atomically
from meswitch_cli.artifact.manifest import MANIFEST_FILE, FileEntry, Manifest, TensorEntry
from meswitch_cli.errors import ArtifactError

_IDENTITY_FILE = "identity.json"
_REPLACED = "replaced"


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
    """The state of one artifact in the making; open it with `workspace()`.

    `state` holds what only the work needs; `artifact`, inside it, becomes the output.
    """

    def __init__(self, out: Path, state: Path) -> None:
        self.out, self.state, self.artifact = out, state, state / "artifact"

    def identity(self) -> dict[str, Any] | None:
        """What earlier work here was made from, None where there is none."""
        path = self.state / _IDENTITY_FILE
        return json.loads(path.read_bytes()) if path.exists() else None

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Forget all earlier work and begin anew."""
        _empty(self.state)
        self.set_identity(identity)

    def set_identity(self, identity: Mapping[str, Any]) -> None:
        with disk_errors(self.artifact):
            self.artifact.mkdir(exist_ok=True)
        write_atomically(self.state / _IDENTITY_FILE, json.dumps(identity).encode())

    def shard_path(self, name: str) -> Path:
        """Where a shard lies: among the artifact's files if it is one of them."""
        return (self.artifact if name.startswith("delta-") else self.state) / name

    def record(self, index: int, stage: str) -> UnitRecord | None:
        """The record of a finished unit whose shard is there in full, else None."""
        path = self.state / f"{stage}-{index:05d}.json"
        if not path.exists():
            return None
        record = UnitRecord.from_json(path.read_bytes())
        shard = self.shard_path(record.shard.name)
        return record if shard.exists() and shard.stat().st_size == record.shard.nbytes else None

    def finish_unit(self, index: int, stage: str, shard: bytes, record: UnitRecord) -> None:
        """Make a unit durable: shard first, record second."""
        write_atomically(self.shard_path(record.shard.name), shard)
        write_atomically(self.state / f"{stage}-{index:05d}.json", record.to_json().encode())

    def drop(self) -> None:
        """Forget the work: nothing of it will be wanted."""
        with disk_errors(self.state):
            shutil.rmtree(self.state)

    def publish(self, manifest: Manifest, side_files: Mapping[str, bytes]) -> None:
        """Write the manifest and the side files, and move the artifact into place.

        Raises:
            ArtifactError: a shard is not what its record says, or the disk refuses.
        """
        for name, data in side_files.items():
            with disk_errors(self.artifact / name):
                (self.artifact / name).parent.mkdir(exist_ok=True)
            write_atomically(self.artifact / name, data)
        paths = [self.artifact / shard.name for shard in manifest.shards]
        with ThreadPoolExecutor(2, "verify") as threads:
            for path, shard, digest in zip(paths, manifest.shards, threads.map(file_digest, paths), strict=True):
                if digest != shard.sha256:
                    raise ArtifactError(f"{path}: changed on disk since it was written; delete it and run again")
        write_atomically(self.artifact / MANIFEST_FILE, manifest.to_json().encode())
        keep = {MANIFEST_FILE, *(entry.name for entry in (*manifest.shards, *manifest.files))}
        with disk_errors(self.out):
            for path in self.artifact.rglob("*"):
                if path.is_file() and path.relative_to(self.artifact).as_posix() not in keep:
                    path.unlink()  # a temporary file of an interrupted write
            if self.out.exists():
                self.out.rename(self.state / _REPLACED)
            self.artifact.rename(self.out)
            sync_folder(self.out.parent)
            shutil.rmtree(self.state)


@contextmanager
def workspace(out: Path, *, force: bool) -> Iterator[Workspace]:
    """Open the place where `out` is made, held against other processes.

    Raises:
        ArtifactError: `out` exists (and `force` does not apply), is in use by another process, or cannot be written.
    """
    out = out.expanduser().absolute()
    state = out.parent / f".{out.name}.partial"
    _refuse_foreign(out)
    with exclusive(state):
        if (state / _REPLACED).exists() and not out.exists():  # killed between the two renames of `publish`
            with disk_errors(out):
                (state / _REPLACED).rename(out)
        if (out / MANIFEST_FILE).is_file() and not (state / "artifact").exists():
            _empty(state)  # the work ended with the artifact in place, but could not clean up
        try:
            _refuse_existing(out, force)
        except ArtifactError:
            if not any(state.iterdir()):
                state.rmdir()
            raise
        yield Workspace(out, state)


def _empty(folder: Path) -> None:
    with disk_errors(folder):
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def _refuse_foreign(out: Path) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise ArtifactError(f"{out}: a file is there; choose another output folder")
    if any(out.iterdir()) and not (out / MANIFEST_FILE).is_file():
        raise ArtifactError(f"{out}: in use by other files, not an artifact; choose another output folder")


def _refuse_existing(out: Path, force: bool) -> None:
    if not out.exists():
        return
    if not any(out.iterdir()):
        with disk_errors(out):
            out.rmdir()
    elif not force:
        raise ArtifactError(f"{out}: an artifact is there already; give --force to replace it")
