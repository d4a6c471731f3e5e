"""An artifact to a repository on the Hub."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.artifact.card import MODEL_CARD, Card
from meswitch_cli.artifact.manifest import MANIFEST_FILE, is_shard_name
from meswitch_cli.errors import ArtifactError
from meswitch_cli.hub.errors import hub_errors
from meswitch_cli.hub.names import HubName
from meswitch_cli.paths import user_path

_MAIN = "main"


@dataclass(frozen=True)
class Published:
    """What was pushed: the repository, the commit that holds it, where to look at it, and what its card leaves open.

    Attributes:
        name: `owner/name@commit`, which always names these bytes.
    """

    repo: str
    commit: str
    url: str
    nbytes: int
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.repo}@{self.commit}"


def push(
    artifact: Artifact | str | Path,
    repo: str,
    *,
    revision: str | None = None,
    public: bool = False,
    base_model: str | None = None,
    licence: str | None = None,
    message: str | None = None,
    on_file: Callable[[int], None] = lambda nbytes: None,
) -> Published:
    """Publish an artifact in one commit; files that the Hub has already are not sent again.

    Every byte is checked first. The token is the Hub client's: HF_TOKEN, or what `hf auth login` stored.

    Args:
        artifact: a folder, or an opened artifact.
        repo: `owner/name`; made if it is not there.
        revision: a branch, made if it is not there; None is the main one.
        public: whether everybody sees a repository that is made; one that is there stays as it is.
        base_model: the fine-tune's own repository, for the card of an artifact that was made from a folder.
        licence: as the Hub spells it, for a card that says `unknown`.
        message: of the commit.
        on_file: hears the bytes of each file that has been checked.

    Raises:
        ArtifactError: the artifact is damaged, a name is none, or the Hub refuses.
    """
    name = HubName.parse(repo)
    if name is None or name.revision is not None:
        raise ArtifactError(f"repository {repo!r}: not a Hub id (owner/name)")
    opened = artifact if isinstance(artifact, Artifact) else Artifact.open(user_path(artifact))
    card = Card.read(opened.path).published(repo, base_model=base_model, licence=licence)
    for file in opened.verify():
        on_file(file.nbytes)
    commit, url = _commit(opened, card, repo, revision, public, message)
    return Published(repo, commit, url, opened.manifest.nbytes, _notes(card))


def _commit(
    artifact: Artifact, card: Card, repo: str, revision: str | None, public: bool, message: str | None
) -> tuple[str, str]:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    entries = [entry.name for entry in (*artifact.manifest.shards, *artifact.manifest.files)]
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(name, str(artifact.path / name)) for name in (MANIFEST_FILE, *entries) if name != MODEL_CARD
    ]
    operations.append(CommitOperationAdd(MODEL_CARD, card.text.encode()))
    api = HfApi(library_name="meswitch")
    with hub_errors(
        f"{repo}: cannot be pushed to",
        "Check name and rights (`hf auth login`, or HF_TOKEN); the same command goes on, and sends no file twice",
        "and give the same command: it goes on, and sends no file twice",
    ):
        api.create_repo(repo, exist_ok=True, private=not public)
        if revision not in (None, _MAIN):
            api.create_branch(repo, branch=str(revision), exist_ok=True)
        there = api.list_repo_files(repo, revision=revision)
        stale = [name for name in there if is_shard_name(name) and name not in entries]
        operations += [CommitOperationDelete(name) for name in stale]
        done = api.create_commit(
            repo, operations, commit_message=message or f"Add {artifact.manifest.expert.id}", revision=revision
        )
    return str(done.oid), f"{api.endpoint}/{repo}"


def _notes(card: Card) -> tuple[str, ...]:
    notes = []
    if card.licence["license"] == "unknown":
        notes.append("the card says that the licence is unknown, as the fine-tune's card tells none; --licence sets it")
    if "base_model" not in card.front:
        notes.append("the card names no fine-tune, since it was a folder; --base-model OWNER/NAME links it")
    return tuple(notes)
