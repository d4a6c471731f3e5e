"""A model's weights by parameter name, wherever they come from, and what their number and names tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Protocol

import torch

from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.checkpoint.fingerprint import fingerprint
from meswitch_cli.model.architecture import Architecture, Storage, architecture


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

    @property
    def buffers(self) -> Mapping[str, torch.Tensor]:
        """Values that are stored of buffers that are no parameters, by module name."""

    def read(self, name: str) -> torch.Tensor:
        """A parameter's value, any floating dtype, a linear's as `[out, in]`; of a tied one the tensor it shares."""


class CheckpointWeights:
    """The weights of an opened checkpoint."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.name, self.config, self.nbytes = str(checkpoint.source.path), checkpoint.config, checkpoint.nbytes

    @cached_property
    def architecture(self) -> Architecture:
        return architecture(self.config, self.name)

    @property
    def buffers(self) -> dict[str, torch.Tensor]:
        return self.checkpoint.read_buffers()

    @cached_property
    def stored(self) -> dict[str, Storage]:
        return self.architecture.stored(self.checkpoint)

    @cached_property
    def fingerprint(self) -> str:
        """The fingerprint that artifacts record; reads every weight once."""
        return self.take_fingerprint()

    def take_fingerprint(self, on_tensor: Callable[[int], None] = lambda nbytes: None) -> str:
        """As `fingerprint`; `on_tensor` hears the bytes of each tensor that has been read."""
        digests: dict[str, str] = {}
        for name, storage in self.stored.items():
            if storage.parameter.tied_to is None:
                tensor = storage.read(self.checkpoint)
                digests[name] = storage.digest(self.checkpoint, tensor)
                on_tensor(tensor.nbytes)
        return fingerprint(digests)

    def read(self, name: str) -> torch.Tensor:
        return self.stored[self.architecture.holder(name).name].read(self.checkpoint)


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
