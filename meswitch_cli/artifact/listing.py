"""The artifacts in a folder, damaged and unfinished ones too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.artifact.manifest import MANIFEST_FILE
from meswitch_cli.errors import ArtifactError, MeswitchError


@dataclass(frozen=True)
class Listed:
    """An artifact's folder.

    Attributes:
        artifact: None where its manifest cannot be used.
        problem: why it cannot be used; None where every file is there in its size or, once verified, as it was.
    """

    path: Path
    artifact: Artifact | None = None
    problem: str | None = None


def artifacts_in(folder: Path, *, verify: bool = False) -> Iterator[Listed]:
    """A folder's artifacts by name, the folder itself where it is one, and those whose compression is not finished.

    With `verify` every byte of each is read.

    Raises:
        ArtifactError: there is no such folder.
    """
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: no such folder")
    if (folder / MANIFEST_FILE).is_file():
        yield _listed(folder, verify)
        return
    for path in sorted(folder.iterdir()):
        name = path.name.removeprefix(".").removesuffix(".partial")
        if path.name == f".{name}.partial" and path.is_dir() and not (folder / name).exists():
            yield Listed(folder / name, problem="not finished; the same `meswitch compress` goes on with it")
        elif not path.name.startswith(".") and (path / MANIFEST_FILE).is_file():
            yield _listed(path, verify)


def _listed(path: Path, verify: bool) -> Listed:
    artifact = None
    try:
        artifact = Artifact.open(path)
        if verify:
            artifact.check_whole()
        else:
            artifact.check_sizes()
    except MeswitchError as error:
        return Listed(path, artifact, str(error))
    return Listed(path, artifact)
