"""The weights of an artifact's expert, made of its base's."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.errors import ArtifactError
from meswitch_cli.model.architecture import Architecture, architecture
from meswitch_cli.model.weights import CheckpointWeights


@dataclass(frozen=True)
class ArtifactWeights:
    """An artifact's expert: base + dequantised delta, fp32. Implements `model.weights.Weights`."""

    artifact: Artifact
    base: CheckpointWeights

    @property
    def name(self) -> str:
        return str(self.artifact.path)

    @cached_property
    def config(self) -> dict[str, Any]:
        return self.artifact.config

    @cached_property
    def architecture(self) -> Architecture:
        return architecture(self.config, self.name)

    def read(self, name: str) -> torch.Tensor:
        name = self.architecture.holder(name).name
        entry = next((entry for entry in self.artifact.manifest.tensors if entry.name == name), None)
        if entry is None:
            if name not in self.artifact.manifest.unchanged:
                raise ArtifactError(f"{self.artifact.path}: the manifest does not list {name!r}")
            return self.base.read(name)
        return self.artifact.expert_tensor(entry, self.base.read(entry.base))
