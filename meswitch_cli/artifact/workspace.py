"""An artifact being made: finished units survive a crash, and the finished artifact appears in one rename.

Work goes on in a hidden folder beside the output, removed when it is done. A finished unit is a file of its own and a
record of it; the file is there before the record, so a record can be trusted. The same command finds the folder again
and continues. The artifact's files are packed from the units at the end, so until the rename both are on disk.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from meswitch_cli.artifact.disk import (
    disk_errors,
    empty_folder,
    file_digest,
    making,
    put_in_place,
    write_atomically,
)
from meswitch_cli.artifact.manifest import MANIFEST_FILE, FileEntry, Manifest, parse_manifest
from meswitch_cli.artifact.pack import MAX_SHARD_BYTES, pack_shards
from meswitch_cli.delta.stored import TensorEntry
from meswitch_cli.errors import ArtifactError

_INPUTS_FILE = "identity.json"
T = TypeVar("T")


@dataclass(frozen=True)
class Inputs:
    """What an artifact is made from; work goes on only with the same.

    Attributes:
        version: of meswitch.
        settings: of the compression.
        base_files, expert_files: digests of the weight files' sizes and times.
    """

    version: str
    settings: Mapping[str, Any]
    base_files: str
    expert_files: str


@dataclass(frozen=True)
class UnitRecord:
    """What is known of a finished unit: its file, its tensors, and the digests of what it was made from."""

    shard: FileEntry
    tensors: tuple[TensorEntry, ...]
    unchanged: tuple[str, ...]
    base_digests: Mapping[str, str]
    expert_digests: Mapping[str, str]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_value(cls, value: Mapping[str, Any]) -> UnitRecord:
        """The record that `to_json` wrote, from its JSON value."""
        tensors = [
            TensorEntry(
                **item
                | {"shape": tuple(item["shape"]), "base_shape": tuple(item["base_shape"]), "taps": tuple(item["taps"])}
            )
            for item in value["tensors"]
        ]
        return cls(
            shard=FileEntry(**value["shard"]),
            tensors=tuple(tensors),
            unchanged=tuple(value["unchanged"]),
            base_digests=dict(value["base_digests"]),
            expert_digests=dict(value["expert_digests"]),
        )


class Workspace:
    """The state of one artifact in the making; open it with `workspace()`.

    `state` holds what only the work needs; `artifact`, inside it, becomes the output.
    """

    def __init__(self, out: Path, state: Path) -> None:
        self.out, self.state, self.artifact = out, state, state / "artifact"

    def inputs(self) -> Inputs | None:
        """What earlier work here was made from, None where there is none.

        Raises:
            ArtifactError: this meswitch did not write the file.
        """
        return self._read(_INPUTS_FILE, lambda value: Inputs(**value | {"settings": dict(value["settings"])}))

    def begin(self, inputs: Inputs) -> None:
        """Forget all earlier work and begin anew."""
        empty_folder(self.state)
        self.set_inputs(inputs)

    def set_inputs(self, inputs: Inputs) -> None:
        with disk_errors(self.artifact):
            self.artifact.mkdir(exist_ok=True)
        write_atomically(self.state / _INPUTS_FILE, json.dumps(dataclasses.asdict(inputs)).encode())

    def shard_path(self, name: str) -> Path:
        """Where a unit's shard lies until the artifact's are packed."""
        return self.state / name

    def record(self, index: int, stage: str) -> UnitRecord | None:
        """The record of a finished unit whose shard is there in full, else None.

        Raises:
            ArtifactError: this meswitch did not write the record.
        """
        record = self._read(f"{stage}-{index:05d}.json", UnitRecord.from_value)
        if record is None:
            return None
        shard = self.shard_path(record.shard.name)
        return record if shard.exists() and shard.stat().st_size == record.shard.nbytes else None

    def stored(self, name: str, make: Callable[[Any], Any] = lambda value: value) -> Any:
        """What `make` makes of the JSON value that `store` kept; None where there is none.

        Raises:
            ArtifactError: it is damaged.
        """
        return self._read(f"{name}.json", make)

    def store(self, name: str, value: Any) -> None:
        """Keep a JSON value that only the work needs."""
        write_atomically(self.state / f"{name}.json", json.dumps(value).encode())

    def _read(self, name: str, make: Callable[[Any], T]) -> T | None:
        path = self.state / name
        if not path.exists():
            return None
        try:
            return make(json.loads(path.read_bytes()))
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise ArtifactError(
                f"{path}: damaged, or not of this version of meswitch; delete the folder {self.state} and run the same "
                "command again"
            ) from error

    def finish_unit(self, index: int, stage: str, shard: bytes, record: UnitRecord) -> None:
        """Make a unit durable: shard first, record second."""
        write_atomically(self.shard_path(record.shard.name), shard)
        write_atomically(self.state / f"{stage}-{index:05d}.json", record.to_json().encode())

    def drop(self) -> None:
        """Forget the work: nothing of it will be wanted."""
        with disk_errors(self.state):
            shutil.rmtree(self.state)

    def publish(
        self, manifest: Manifest, side_files: Mapping[str, bytes], max_shard_bytes: int = MAX_SHARD_BYTES
    ) -> Manifest:
        """Pack the units that the manifest lists as shards, write the rest, and move the artifact into place.

        Returns:
            The manifest of what was written.

        Raises:
            ArtifactError: a unit is not what its record says, or the disk refuses.
        """
        self._check_units(manifest.shards)
        packed = pack_shards(self.state, manifest, self.artifact, max_shard_bytes)
        raw = packed.to_json().encode()
        parse_manifest(raw, str(self.out))  # what could not be opened again is not published
        for name, data in side_files.items():
            with disk_errors(self.artifact / name):
                (self.artifact / name).parent.mkdir(exist_ok=True)
            write_atomically(self.artifact / name, data)
        write_atomically(self.artifact / MANIFEST_FILE, raw)
        keep = {MANIFEST_FILE, *side_files, *(shard.name for shard in packed.shards)}
        with disk_errors(self.out):
            for path in self.artifact.rglob("*"):
                if path.is_file() and path.relative_to(self.artifact).as_posix() not in keep:
                    path.unlink()  # of an interrupted end
        put_in_place(self.artifact, self.out, self.state)
        return packed

    def _check_units(self, units: Sequence[FileEntry]) -> None:
        paths = [self.shard_path(unit.name) for unit in units]
        with ThreadPoolExecutor(2, "verify") as threads:
            for path, unit, digest in zip(paths, units, threads.map(file_digest, paths), strict=True):
                if digest != unit.sha256:
                    raise ArtifactError(f"{path}: changed on disk since it was written; delete it and run again")


def unfinished_work(out: Path) -> Workspace:
    """The place where `out` is made, to look at what an earlier run kept there: nothing is made, and nothing held."""
    out = out.expanduser().absolute()
    return Workspace(out, out.parent / f".{out.name}.partial")


@contextmanager
def workspace(out: Path, *, force: bool) -> Iterator[Workspace]:
    """Open the place where `out` is made, held against other processes.

    Raises:
        ArtifactError: `out` exists (and `force` does not apply), is in use by another process, or cannot be written.
    """
    unfinished = unfinished_work(out)
    out, state = unfinished.out, unfinished.state
    require_free(out, force=True)
    with making(out, state):
        if (out / MANIFEST_FILE).is_file() and not (state / "artifact").exists():
            empty_folder(state)  # the work ended with the artifact in place, but could not clean up
        try:
            require_free(out, force=force)
        except ArtifactError:
            if not any(state.iterdir()):
                state.rmdir()
            raise
        if out.exists() and not any(out.iterdir()):
            with disk_errors(out):
                out.rmdir()
        yield unfinished


def require_free(out: Path, *, force: bool) -> None:
    """Look whether an artifact may be made at `out`, where `force` lets it replace another artifact.

    Raises:
        ArtifactError: it may not.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise ArtifactError(f"{out}: a file is there; choose another output folder")
    if not any(out.iterdir()):
        return
    if not (out / MANIFEST_FILE).is_file():
        raise ArtifactError(f"{out}: in use by other files, not an artifact; choose another output folder")
    if not force:
        raise ArtifactError(f"{out}: an artifact is there already; give --force to replace it")
