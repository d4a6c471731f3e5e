"""Writing files and folders so that a crash leaves either the whole of one or nothing, and one writer at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from meswitch_cli.errors import ArtifactError, MeswitchError

_REPLACED = "replaced"
_TOLD = re.compile(r"\(os error (\d+)\)")
_REASONS = {
    errno.ENOSPC: "the disk is full; free some space and run the same command again",
    errno.EDQUOT: "the disk quota is used up; free some space and run the same command again",
    errno.EACCES: "no permission",
    errno.EPERM: "no permission",
    errno.EROFS: "the file system is read-only",
}


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an operating system's refusal into an error that says what to do.

    Raises:
        ArtifactError: in place of any OSError, and of one that safetensors tells as text.
    """
    try:
        yield
    except OSError as error:
        raise ArtifactError(f"{error.filename or path}: {_refusal(error)}") from error
    except SafetensorError as error:
        told = _TOLD.search(str(error))
        if told is None:
            raise
        number = int(told[1])
        raise ArtifactError(f"{path}: {_refusal(OSError(number, os.strerror(number)))}") from error


def _refusal(error: OSError) -> str:
    return _REASONS.get(error.errno or 0, error.strerror or str(error))


def write_atomically(path: Path, data: bytes | memoryview | Iterable[bytes | memoryview]) -> None:
    """Write, all at once or piece by piece, under a temporary name, flush to disk, rename.

    Raises:
        ArtifactError: the disk is full, or the folder may not be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    with disk_errors(path):
        with temporary.open("wb") as stream:
            for piece in (data,) if isinstance(data, bytes | memoryview) else data:
                stream.write(piece)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.rename(path)
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal.

    Raises:
        ArtifactError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with disk_errors(path), path.open("rb", buffering=0) as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Make a folder if need be and hold it against a second writer; the hold goes with the folder if it is renamed.

    Raises:
        ArtifactError: another process holds it, or it cannot be made.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ArtifactError(f"{folder}: another meswitch is writing here; wait for it to end") from error
        if not folder.exists() or folder.stat().st_ino != os.fstat(descriptor).st_ino:
            raise ArtifactError(f"{folder}: another meswitch has just finished here; run the command again")
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def making(out: Path, state: Path) -> Iterator[None]:
    """Hold `state`, the folder in which `out` is made, and undo a `put_in_place` that a crash broke off.

    Raises:
        ArtifactError: as `exclusive`.
    """
    with exclusive(state):
        _put_back(out, state)
        yield


def put_in_place(folder: Path, out: Path, state: Path) -> None:
    """Make a finished folder `out` by renaming; what was there stays in `state` until then. Removes `state`."""
    with disk_errors(out):
        if out.exists():
            out.rename(state / _REPLACED)
        folder.rename(out)
        sync_folder(out.parent)
        shutil.rmtree(state)


@contextlib.contextmanager
def whole_folder(out: Path, suffix: str) -> Iterator[Path]:
    """A folder to write into, which becomes `out` when the block ends; where it raises, nothing is left of it.

    It lies in a hidden folder beside `out`, whose name has this suffix.

    Raises:
        ArtifactError: another process makes the same folder, or the disk refuses.
    """
    state = out.parent / f".{out.name}.{suffix}"
    folder = state / "new"
    with making(out, state), disk_errors(out):
        empty_folder(state)
        folder.mkdir()
        try:
            yield folder
            put_in_place(folder, out, state)
        except BaseException:
            _put_back(out, state)
            shutil.rmtree(state, ignore_errors=True)
            raise


def empty_folder(folder: Path) -> None:
    with disk_errors(folder):
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def refuse_occupied(out: Path, marker: str, *, force: bool, what: str, error: type[MeswitchError]) -> None:
    """Raise `error` where `out` holds anything, unless `force` is given and `marker` in it says that it is `what`."""
    with disk_errors(out):
        occupied = out.exists() and (not out.is_dir() or any(out.iterdir()))
        if occupied and not (force and (out / marker).is_file()):
            raise error(f"{out}: in use; choose another output folder, or --force to replace {what}")


def _put_back(out: Path, state: Path) -> None:
    if (state / _REPLACED).exists() and not out.exists():
        with disk_errors(out):
            (state / _REPLACED).rename(out)
