"""Which artifacts to serve under which names, from a command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from meswitch_cli.errors import ArtifactError, MeswitchError, UsageError
from meswitch_cli.hub.fetch import find_artifact
from meswitch_cli.names import check_name


def named_experts(pairs: Sequence[str], experts_dir: Path | None = None) -> tuple[dict[str, Path], dict[str, str]]:
    """Experts from `NAME=ARTIFACT` (a folder or a Hub id), and from the sub-folders of a directory, by their names.

    A name given twice means the pair. Hidden folders are work in progress and are left out.

    Returns:
        Artifact folders by name, and the sub-folders that cannot be served, each with the reason.

    Raises:
        UsageError: a pair is malformed or a name is taken twice, or the directory is none.
        ArtifactError: the Hub does not give an artifact.
    """
    experts: dict[str, Path] = {}
    refused: dict[str, str] = {}
    for pair in pairs:
        name, separator, path = pair.partition("=")
        if not separator or not path:
            raise UsageError(f"--expert {pair!r}: write NAME=ARTIFACT, for instance maths=./maths-1bit")
        check_name(name)
        if name in experts:
            raise UsageError(f"--expert {name}: given twice")
        experts[name] = find_artifact(path)
    if experts_dir is None:
        return experts, refused
    if not experts_dir.is_dir():
        raise UsageError(f"--experts-dir {experts_dir}: not a folder")
    for folder in sorted(experts_dir.iterdir()):
        if folder.name.startswith(".") or not folder.is_dir() or folder.name in experts:
            continue
        try:
            check_name(folder.name)
        except UsageError as error:
            refused[folder.name] = str(error)
        else:
            experts[folder.name] = folder
    return experts, refused


def unservable(experts: Mapping[str, Path], base: str) -> dict[str, str]:
    """Experts that headers alone show to be none of a base, each with the reason; no weight is read.

    Raises:
        CheckpointError: there is no such base.
    """
    from meswitch_cli.artifact.artifact import Artifact
    from meswitch_cli.artifact.base import check_base_shapes
    from meswitch_cli.checkpoint.checkpoint import Checkpoint

    refused: dict[str, str] = {}
    opened: dict[str, Artifact] = {}
    for name, path in experts.items():
        try:
            opened[name] = Artifact.open(path)
        except ArtifactError as error:
            refused[name] = str(error)
    if not opened:
        return refused
    checkpoint = Checkpoint.open(base)
    for name, artifact in opened.items():
        try:
            check_base_shapes(artifact.manifest, checkpoint)
        except MeswitchError as error:
            refused[name] = f"{artifact.path}: {error}"
    return refused


def servable(experts: Mapping[str, Path], base: str, named: Sequence[str]) -> tuple[dict[str, Path], dict[str, str]]:
    """Experts that may be loaded, and the reasons against the others, as `unservable` has them.

    Args:
        named: those that the user named; the others are what a folder holds.

    Raises:
        CheckpointError: there is no such base.
        ArtifactError: one that was named cannot be served, or none is left.
    """
    refused = unservable(experts, base)
    for name in named:
        if name in refused:
            raise ArtifactError(f"--expert {name}: {refused[name]}")
    left = {name: path for name, path in experts.items() if name not in refused}
    if refused and not left:
        raise ArtifactError("no expert can be served: " + "; ".join(refused.values()))
    return left, refused
