"""The module tree of a model on the meta device, where no weight takes memory, and putting values into it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from meswitch_cli.checkpoint.config import parsed_config
from meswitch_cli.errors import CheckpointError, reason_of


def skeleton(config: dict[str, Any], where: str) -> nn.Module:
    """Build the model a config describes on the meta device, in fp32 and evaluation mode.

    Raises:
        CheckpointError: transformers does not know the architecture as a causal language model.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(parsed_config(config), dtype=torch.float32)
    except Exception as error:  # transformers raises many kinds for a config it cannot use
        raise CheckpointError(
            f"{where}: {config.get('model_type')}: not a causal language model transformers can build: "
            f"{reason_of(error)}"
        ) from error
    return model.eval()


def materialise_buffers(root: Any, device: torch.device, where: str) -> None:
    """Compute the buffers that follow from the config (rotary tables, embedding scales), as from_pretrained does.

    Comes before the weights: it initialises the modules that it visits.

    Raises:
        CheckpointError: a buffer does not follow from the config.
    """
    for name, module in root.named_modules():
        buffers = [(key, buffer) for key, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for key, buffer in buffers:
            poisoned = torch.zeros(buffer.shape, dtype=buffer.dtype, device=device)
            setattr(module, key, poisoned.fill_(float("nan")) if buffer.is_floating_point() else poisoned)
        if buffers:
            root._init_weights(module)
        for key, _ in buffers:
            if not torch.isfinite(getattr(module, key)).all():
                raise CheckpointError(
                    f"{where}: {root.config.model_type}: buffer {name}.{key} does not follow from the config, so the "
                    "model cannot be run from its weights alone"
                )


def set_parameter(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Put a value in place of a parameter, which may be on the meta device."""
    parent, _, leaf = name.rpartition(".")
    owner = module.get_submodule(parent)
    owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
