"""The weights of an artifact's expert, made of its base's."""

from __future__ import annotations

import torch

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.artifact.carried import Carried
from meswitch_cli.errors import ArtifactError
from meswitch_cli.model.architecture import architecture
from meswitch_cli.model.weights import CheckpointWeights


class ArtifactWeights:
    """An artifact's expert: base + dequantised delta, fp32. Implements `model.weights.Weights`."""

    def __init__(self, artifact: Artifact, base: CheckpointWeights) -> None:
        self.artifact, self.base = artifact, base
        self.name, self.config = str(artifact.path), artifact.config
        self.architecture = architecture(self.config, self.name)
        self._entries = {entry.name: entry for entry in artifact.manifest.tensors}

    @property
    def buffers(self) -> dict[str, torch.Tensor]:
        return Carried.of(self.artifact).buffers(self.base.checkpoint)

    def read(self, name: str) -> torch.Tensor:
        name = self.architecture.holder(name).name
        if name in self._entries:
            return self.artifact.expert_tensor(self._entries[name], self.base.read(self._entries[name].base))
        if name not in self.artifact.manifest.unchanged:
            raise ArtifactError(f"{self.artifact.path}: the manifest does not list {name!r}")
        return self.base.read(name)
