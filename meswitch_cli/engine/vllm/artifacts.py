"""What can be served by a vLLM that has one tokenizer and one vocabulary, the base's."""

from __future__ import annotations

import functools
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.artifact.base import check_base_shapes, refuse_other_base
from meswitch_cli.artifact.manifest import MANIFEST_FILE
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.engine.contract import EngineError
from meswitch_cli.engine.expert import refuse_other_computation
from meswitch_cli.errors import ArtifactError
from meswitch_cli.model.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Files:
    """An artifact's files as a folder lists them, which takes microseconds where hashing them takes seconds."""

    listed: tuple[tuple[str, int, int, int], ...]

    @classmethod
    def of(cls, path: Path) -> Files:
        """Name, inode, bytes and time of change of manifest and shards; none where there is no such folder."""
        found = []
        with suppress(OSError):
            for entry in os.scandir(path):
                if entry.name == MANIFEST_FILE or entry.name.endswith(".safetensors"):
                    status = entry.stat()
                    found.append((entry.name, status.st_ino, status.st_size, status.st_mtime_ns))
        return cls(tuple(sorted(found)))


def is_artifact(path: Path) -> bool:
    """Whether a folder is an artifact, and no LoRA of vLLM's own."""
    return (path / MANIFEST_FILE).is_file()


def check_artifact(artifact: Artifact, base: Checkpoint, fingerprint: str) -> None:
    """Check all of an artifact that no server of ours stands before: files, values, base, configuration, tokens.

    Raises:
        ArtifactError: it is damaged, or was made against another base.
        EngineError: it computes differently from the base, beside its weights, or has tokens of its own.
    """
    check_base_shapes(artifact.manifest, base)
    refuse_other_base(artifact.manifest, fingerprint, base.source.path)
    refuse_other_computation(artifact, base)
    added = max((entry.added_rows for entry in artifact.manifest.tensors), default=0)
    if added:
        raise EngineError(
            f"{artifact.path}: has {added} tokens of its own, and `vllm serve` has one tokenizer, the base's; "
            "`meswitch serve --engine vllm` serves it"
        )
    if load_tokenizer(artifact.path, ArtifactError).get_vocab() != _vocabulary(base.source.path):
        raise EngineError(
            f"{artifact.path}: its tokenizer has other tokens than the base's, and `vllm serve` has that one alone; "
            "`meswitch serve --engine vllm` serves it"
        )
    artifact.check_whole()


@functools.lru_cache(maxsize=1)
def _vocabulary(base: Path) -> dict[str, int]:
    vocabulary: dict[str, int] = load_tokenizer(base).get_vocab()
    return vocabulary
