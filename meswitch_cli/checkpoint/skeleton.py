"""The module tree of a model on the meta device, where no weight takes memory, and putting values into it."""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from meswitch_cli.checkpoint.config import parsed_config
from meswitch_cli.errors import CheckpointError, reason_of


def auto_class(config: dict[str, Any]) -> Any:
    """transformers' auto class that makes the model of a config: a causal language model, or one that sees as well.

    The second where config.json names its class, or where the family has no other.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind = type(parsed_config(config))
    if kind not in AutoModelForImageTextToText._model_mapping:
        return AutoModelForCausalLM
    named = config.get("architectures") or []
    seeing = AutoModelForImageTextToText._model_mapping[kind]
    if seeing.__name__ in named or kind not in AutoModelForCausalLM._model_mapping:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def skeleton(config: dict[str, Any], where: str) -> nn.Module:
    """Build the model a config describes on the meta device, in fp32 and evaluation mode.

    Raises:
        CheckpointError: transformers does not know the architecture as a language model.
    """
    try:
        with torch.device("meta"):
            model: nn.Module = auto_class(config).from_config(parsed_config(config), dtype=torch.float32)
    except Exception as error:  # transformers raises many kinds for a config it cannot use
        raise CheckpointError(
            f"{where}: {config.get('model_type')}: not a causal language model transformers can build: "
            f"{reason_of(error)}"
        ) from error
    return model.eval()


#: What makes tensors with values; weights are made empty.
_MAKERS = (torch.tensor, torch.arange, torch.linspace, torch.full, torch.ones, torch.zeros)


class _RealConstants(TorchFunctionMode):
    """Makes on the CPU what is made with values, also where a model is built on the meta device."""

    def __init__(self, makers: Collection[Any]) -> None:
        super().__init__()
        self._makers = makers

    def __torch_function__(
        self, function: Any, _types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        return function(*arguments, **(options or {}) | ({"device": "cpu"} if function in self._makers else {}))


def constant_buffers(config: dict[str, Any], where: str) -> dict[str, torch.Tensor]:
    """The buffers that a model's classes fill with constants when they are made, by name."""
    try:
        with _RealConstants(_MAKERS):
            model = skeleton(config, where)
    except CheckpointError:  # a class that makes a buffer of a weight's values
        with _RealConstants((torch.tensor,)):
            model = skeleton(config, where)
    return {name: buffer for name, buffer in model.named_buffers() if not buffer.is_meta}


def materialise_buffers(
    root: Any,
    config: dict[str, Any],
    device: torch.device,
    where: str,
    stored: Container[str] = (),
    values: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> None:
    """Compute the buffers that follow from the config (rotary tables, embedding scales), as from_pretrained does.

    Comes before the weights: it initialises the modules that it visits. Those of `stored` come with them; those of
    `values` have these.

    Raises:
        CheckpointError: a buffer does not follow from the config.
    """
    constants: dict[str, torch.Tensor] = {}
    for name, module in root.named_modules():
        buffers = [(key, buffer) for key, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for key, buffer in buffers:
            poisoned = torch.zeros(buffer.shape, dtype=buffer.dtype, device=device)
            setattr(module, key, poisoned.fill_(float("nan")) if buffer.is_floating_point() else poisoned)
        if buffers:
            root._init_weights(module)
        for key, _ in buffers:
            own = f"{name}.{key}" if name else key
            if own in stored or own in values or torch.isfinite(getattr(module, key)).all():
                continue
            constants = constants or constant_buffers(config, where)
            if own in constants:
                setattr(module, key, constants[own].to(device))
            else:
                raise CheckpointError(
                    f"{where}: {root.config.model_type}: buffer {name}.{key} does not follow from the config, so the "
                    "model cannot be run from its weights alone"
                )
    for own, value in values.items():
        path, _, key = own.rpartition(".")
        module = root.get_submodule(path)
        setattr(module, key, value.to(device=device, dtype=getattr(module, key).dtype))


def set_parameter(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Put a value in place of a parameter, or of a buffer that is stored; either may be on the meta device."""
    parent, _, leaf = name.rpartition(".")
    owner = module.get_submodule(parent)
    if leaf in owner._buffers:
        owner._buffers[leaf] = value
    else:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
