"""From what the user names, a folder or a Hub id, to a local folder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from meswitch_cli.checkpoint.hub_refusal import refusal, why_unreachable
from meswitch_cli.errors import CheckpointError
from meswitch_cli.paths import user_path

#: Weights as safetensors only: pickled formats are never fetched, so they can never be loaded. The rest is what a
#: tokenizer reads, chat templates, the terms of use, and the card, which tells the licence.
CHECKPOINT_FILES = [
    *("*.safetensors", "*.json", "*.jinja", "*.model", "*.model.v*", "*.txt", "*.tiktoken", "*.spm", "*.tokenizer"),
    *("*.bpe", "*.codes", "LICENSE*", "NOTICE*", "USE_POLICY*", "README.md"),
]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?")


@dataclass(frozen=True)
class Source:
    """A model on local disk. `id` is what to call it, free of local paths; `revision` a Hub commit if known."""

    path: Path
    id: str
    revision: str | None


def resolve(name: str, *, files: list[str] | None = None) -> Source:
    """Find a folder, or download a Hub repository (`owner/name` or `owner/name@revision`).

    Raises:
        CheckpointError: there is neither such a folder nor such a repository, or it cannot be reached.
    """
    path = user_path(name)
    _refuse_other_encoding(path)
    if path.is_dir():
        return Source(path, *identify(path.resolve()))
    if path.exists():
        raise CheckpointError(f"{name}: a file, not a checkpoint folder; give the folder that holds config.json")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or not _HUB_ID.fullmatch(name):
        raise CheckpointError(f"{name}: no such folder, and not a Hub id (owner/name)")
    return _download(name, files or CHECKPOINT_FILES)


def _refuse_other_encoding(path: Path) -> None:
    """Tokenizers and safetensors open UTF-8 paths alone, and a model is called by its folder's name."""
    try:
        f"{path}{path.resolve().name}".encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{str(path)!r}: not a UTF-8 path; rename the folder") from error


def identify(path: Path) -> tuple[str, str | None]:
    """Name a folder: by its Hub repository where it lies in the Hub's cache, else by its own name."""
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.removeprefix("models--").replace("--", "/"), path.name
    return path.name, None


def _download(name: str, files: list[str]) -> Source:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    try:
        path = Path(snapshot_download(repository, revision=revision or None, allow_patterns=files))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        advice = "Check the name; a private repository needs `hf auth login`"
        why = why_unreachable(error) or f"{refusal(error)}. {advice}"
        raise CheckpointError(f"{name}: no such folder here, and the Hub does not give it: {why}") from error
    return Source(path, repository, path.name)
