"""Where a model's weights come from: a checkpoint, an artifact on its base, or another method's delta on it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.artifact.base import base_fingerprint
from meswitch_cli.artifact.sidefiles import CONFIG_FILE
from meswitch_cli.checkpoint.architecture import Architecture, architecture
from meswitch_cli.checkpoint.checkpoint import Checkpoint, read_json
from meswitch_cli.errors import EvaluationError


class Weights(Protocol):
    """A model's weights, read one tensor at a time."""

    @property
    def name(self) -> str:
        """What messages call the model."""

    @property
    def config(self) -> dict[str, Any]:
        """The content of its config.json."""

    @property
    def architecture(self) -> Architecture:
        """Its parameters."""

    def read(self, name: str) -> torch.Tensor:
        """A parameter's value, any floating dtype; for a tied parameter the tensor that it shares."""


@dataclass(frozen=True)
class CheckpointWeights:
    """The weights of an opened checkpoint."""

    checkpoint: Checkpoint

    @property
    def name(self) -> str:
        return str(self.checkpoint.source.path)

    @property
    def config(self) -> dict[str, Any]:
        return self.checkpoint.config

    @cached_property
    def architecture(self) -> Architecture:
        return architecture(self.config, self.name)

    @cached_property
    def _stored(self) -> dict[str, str]:
        return self.architecture.stored_names(self.checkpoint)

    @cached_property
    def fingerprint(self) -> str:
        """The fingerprint that artifacts record; reads every weight once."""
        return base_fingerprint(self.checkpoint, self.architecture)

    @property
    def nbytes(self) -> int:
        return self.checkpoint.nbytes

    def read(self, name: str) -> torch.Tensor:
        return self.checkpoint.read(self._stored[self.architecture.parameters[name].tied_to or name])


@dataclass(frozen=True)
class ArtifactWeights:
    """An artifact's expert: base + dequantised delta, fp32."""

    artifact: Artifact
    base: CheckpointWeights

    @property
    def name(self) -> str:
        return str(self.artifact.path)

    @cached_property
    def config(self) -> dict[str, Any]:
        return read_json(self.artifact.path / CONFIG_FILE, "an artifact carries the expert's config.json")

    @cached_property
    def architecture(self) -> Architecture:
        return architecture(self.config, self.name)

    def read(self, name: str) -> torch.Tensor:
        name = self.architecture.parameters[name].tied_to or name
        entry = next((entry for entry in self.artifact.manifest.tensors if entry.name == name), None)
        if entry is None:
            if name not in self.artifact.manifest.unchanged:
                raise EvaluationError(f"{self.artifact.path}: the manifest does not list {name!r}")
            return self.base.read(name)
        return self.artifact.expert_tensor(entry, self.base.read(entry.base))


def vocabulary_size(weights: Weights) -> int:
    """Rows of the embedding."""
    return next(item.shape[0] for item in weights.architecture.parameters.values() if item.kind == "embedding")


def context_length(weights: Weights) -> int:
    """Positions that the model was made for, as its config says."""
    value = weights.config.get("max_position_embeddings")
    if value is None and isinstance(weights.config.get("text_config"), dict):
        value = weights.config["text_config"].get("max_position_embeddings")
    return value if isinstance(value, int) and value > 0 else 2048


def parameter_count(weights: Weights) -> int:
    return sum(
        torch.Size(item.shape).numel() for item in weights.architecture.parameters.values() if item.tied_to is None
    )
