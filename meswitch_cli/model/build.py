"""A transformers model out of any weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from meswitch_cli.checkpoint.skeleton import materialise_buffers, set_parameter, skeleton
from meswitch_cli.model.weights import Weights


def build_model(weights: Weights, device: torch.device, dtype: torch.dtype) -> Any:
    """The whole model in memory, in evaluation mode.

    Raises:
        CheckpointError: a buffer of this family does not follow from its config.
    """
    model: Any = skeleton(weights.config, weights.name)
    held = weights.architecture.held
    materialise_buffers(model, weights.config, device, weights.name, held, weights.buffers)
    tied = {name for name, item in weights.architecture.parameters.items() if item.tied_to}
    fill(model, "", [name for name in held if name not in tied], weights, device, dtype)
    model.tie_weights()
    return model.eval()


def fill(
    module: nn.Module, prefix: str, names: Iterable[str], weights: Weights, device: torch.device, dtype: torch.dtype
) -> None:
    """Give a module these parameters; `prefix` and a name are what its tree calls one."""
    buffers = {f"{prefix}{name}" for name, _ in module.named_buffers()}
    for full, value in weights.architecture.values((prefix + name for name in names), weights.read):
        kept = value.float() if full in buffers else value.to(dtype)
        set_parameter(module, full.removeprefix(prefix), kept.to(device))
