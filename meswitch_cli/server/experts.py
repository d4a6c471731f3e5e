"""Which artifacts to serve under which names, from a command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from meswitch_cli.errors import UsageError
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
            raise UsageError(f"--expert {pair!r}: write NAME=ARTIFACT, for instance maths=./maths-2bit")
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
