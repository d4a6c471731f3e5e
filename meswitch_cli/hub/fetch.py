"""From what the user names, a folder or a Hub id, to an artifact on disk."""

from __future__ import annotations

import shutil
from pathlib import Path

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.artifact.card import MODEL_CARD
from meswitch_cli.artifact.disk import disk_errors, refuse_occupied, whole_folder
from meswitch_cli.artifact.manifest import MANIFEST_FILE
from meswitch_cli.checkpoint.source import identify
from meswitch_cli.errors import ArtifactError
from meswitch_cli.hub.errors import hub_errors
from meswitch_cli.hub.names import HubName
from meswitch_cli.paths import user_path


def open_artifact(name: str | Path) -> Artifact:
    """Open an artifact's folder, or fetch one from the Hub (`owner/name` or `owner/name@revision`) and open that.

    The manifest alone is read and checked; `Artifact.verify` proves the rest.

    Raises:
        ArtifactError: there is neither such a folder nor such a repository, or it is no artifact.
    """
    return Artifact.open(find_artifact(name))


def find_artifact(name: str | Path) -> Path:
    """The folder that `open_artifact` opens. A folder of this name comes before a repository; what is neither is
    returned as a path."""
    path = user_path(name)
    found = None if path.exists() else HubName.parse(str(name))
    return path if found is None else _fetch(found)


def pull(name: str, out: str | Path | None = None, *, force: bool = False) -> Artifact:
    """Fetch an artifact from the Hub and check every byte of it; what was interrupted goes on where it stopped.

    Args:
        name: `owner/name` or `owner/name@revision`.
        out: a folder to make of it; None leaves it in the Hub's cache, where its id finds it, offline too.
        force: replace an artifact that is there.

    Raises:
        ArtifactError: the name is none, the Hub does not give it, it is damaged, or `out` is occupied.
    """
    found = HubName.parse(name)
    if found is None:
        raise ArtifactError(f"{name}: not a Hub id (owner/name or owner/name@revision)")
    target = None if out is None else user_path(out).absolute()
    if target is not None:
        refuse_occupied(target, MANIFEST_FILE, force=force, what="an artifact", error=ArtifactError)
    artifact = Artifact.open(_fetch(found))
    try:
        artifact.check_whole()
    except ArtifactError as error:
        raise ArtifactError(f"{error}. If the repository is sound, delete {artifact.path} and pull again") from error
    return artifact if target is None else _copied(artifact, target)


def whole_artifact(folder: Path) -> Path:
    """A folder of which somebody fetched a part from the Hub, with the other files that the manifest lists.

    Raises:
        ArtifactError: the Hub does not give them.
    """
    if (folder / MANIFEST_FILE).is_file():
        manifest = Artifact.open(folder).manifest
        if all((folder / entry.name).is_file() for entry in (*manifest.shards, *manifest.files)):
            return folder
    repo, commit = identify(folder)
    found = HubName.parse(repo)
    if found is None or commit is None:
        return folder
    return _fetch(HubName(found.repo, commit), cache=folder.parents[2])


def _fetch(name: HubName, cache: Path | None = None) -> Path:
    """The folder in the Hub's cache, with the files that the manifest lists and no others."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    advice = "Check the name; a private repository needs `hf auth login` or HF_TOKEN"
    with hub_errors(f"{name}: no such folder here, and the Hub does not give it", advice):
        try:
            file = Path(hf_hub_download(name.repo, MANIFEST_FILE, revision=name.revision, cache_dir=cache))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError as error:
            raise ArtifactError(f"{name}: a repository without {MANIFEST_FILE}, so no artifact of meswitch") from error
        manifest = Artifact.open(file.parent).manifest
        files = [MANIFEST_FILE, MODEL_CARD, *(entry.name for entry in (*manifest.shards, *manifest.files))]
        return Path(snapshot_download(name.repo, revision=file.parent.name, allow_patterns=files, cache_dir=cache))


def _copied(artifact: Artifact, out: Path) -> Artifact:
    with whole_folder(out, "pulling") as folder, disk_errors(folder):
        for path in artifact.path.rglob("*"):
            if path.is_file():
                copy = folder / path.relative_to(artifact.path)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, copy)
    return Artifact.open(out)
