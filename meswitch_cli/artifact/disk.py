"""Writing files so that a crash leaves either the whole file or none, and one writer at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from meswitch_cli.errors import ArtifactError

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
        ArtifactError: in place of any OSError.
    """
    try:
        yield
    except OSError as error:
        reason = _REASONS.get(error.errno or 0, error.strerror or str(error))
        raise ArtifactError(f"{error.filename or path}: {reason}") from error


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Write under a temporary name, flush to disk, rename.

    Raises:
        ArtifactError: the disk is full, or the folder may not be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    with disk_errors(path):
        with temporary.open("wb") as stream:
            stream.write(data)
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
