"""An artifact that is served: checked against the base, with its own tokenizer and ends of text."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.artifact.base import check_base_shapes, refuse_other_base
from meswitch_cli.artifact.carried import Carried
from meswitch_cli.artifact.manifest import Manifest
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.engine.contract import BASE, EngineError, Tokenizer
from meswitch_cli.engine.sampling_defaults import sampling_defaults
from meswitch_cli.errors import ArtifactError
from meswitch_cli.model.differences import model_differences
from meswitch_cli.model.tokenizer import end_ids, load_tokenizer
from meswitch_cli.model.weights import CheckpointWeights


@dataclass(frozen=True, eq=False, kw_only=True)
class ServedModel:
    """The base, or an expert of it.

    Attributes:
        digest: the artifact's, and empty for the base; the cache's keys begin with it.
        vocabulary: rows of its own embedding; no later token is ever chosen.
        end_ids: tokens that end a text.
        sampling: what its generation_config.json sets of `contract.Sampling`.
    """

    name: str
    path: Path
    digest: str
    tokenizer: Tokenizer
    vocabulary: int
    end_ids: frozenset[int]
    artifact: Artifact | None = None
    sampling: Mapping[str, float] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return self.artifact.manifest.nbytes if self.artifact else 0


def open_base(checkpoint: Checkpoint, vocabulary: int) -> ServedModel:
    path = checkpoint.source.path
    tokenizer = load_tokenizer(path)
    return ServedModel(
        name=BASE,
        path=path,
        digest="",
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        end_ids=end_ids(path, tokenizer),
        sampling=sampling_defaults(path),
    )


class ExpertOpener:
    """Opens experts of one base, from any thread; hashes the base's tensors once, and again when its files change."""

    def __init__(self, base: Checkpoint) -> None:
        self._base = base
        self._fingerprint: tuple[str, str] | None = None
        self._lock = threading.Lock()

    def open(self, name: str, path: Path) -> ServedModel:
        """Open an artifact and check all of it: files, hashes, values, base, configuration, tokenizer.

        Raises:
            ArtifactError: it is damaged, or was made against another base.
            EngineError: it computes differently from the base, beside its weights.
        """
        base, artifact = self._base, Artifact.open(path)
        check_base_shapes(artifact.manifest, base)
        refuse_other_base(artifact.manifest, self._base_fingerprint(), base.source.path)
        artifact.check_whole()
        config = artifact.config
        refuse_other_computation(artifact, base)
        tokenizer = load_tokenizer(path, ArtifactError)
        return ServedModel(
            name=name,
            path=path,
            digest=artifact.digest,
            tokenizer=tokenizer,
            vocabulary=expert_vocabulary(artifact.manifest, int(config.get("vocab_size", base.config["vocab_size"]))),
            end_ids=end_ids(path, tokenizer),
            artifact=artifact,
            sampling=sampling_defaults(path),
        )

    def _base_fingerprint(self) -> str:
        with self._lock:
            stat = self._base.stat_digest()
            if self._fingerprint is None or self._fingerprint[0] != stat:
                self._fingerprint = (stat, CheckpointWeights(self._base).fingerprint)
            return self._fingerprint[1]


def refuse_other_computation(artifact: Artifact, base: Checkpoint) -> None:
    """Check that an expert's layers compute as its base's do, weights apart.

    Raises:
        EngineError: an entry of its configuration makes them compute differently.
    """
    differences = model_differences(base.config, artifact.config)
    if differences:
        raise EngineError(
            f"{artifact.path}: cannot be served from {base.source.path}: {', '.join(differences)} in config.json "
            "differ; `meswitch restore` makes a model of its own of it"
        )
    buffers = Carried.of(artifact).own_buffers
    if buffers:
        raise EngineError(
            f"{artifact.path}: cannot be served from {base.source.path}: its buffer {buffers[0]} has other values; "
            "`meswitch restore` makes a model of its own of it"
        )


def expert_vocabulary(manifest: Manifest, otherwise: int) -> int:
    """Rows of an expert's own embedding and head; `otherwise` where it stores neither."""
    rows = [entry.shape[0] for entry in manifest.tensors if entry.kind in ("embedding", "head") and entry.shape]
    return min(rows, default=otherwise)
