"""What a model is made of, read off transformers' own module tree on the meta device: no weight is allocated."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.errors import CheckpointError

Kind = Literal["linear", "embedding", "head", "dense"]

#: Names that transformers renames when it loads an older checkpoint, and that we rename likewise.
_RENAMED = ((re.compile(r"^embed_out\."), "lm_head."),)


@dataclass(frozen=True)
class Parameter:
    """One parameter: `layer` is its decoder layer, None outside them; `tied_to` names the tensor it shares."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    layer: int | None
    tied_to: str | None = None


@dataclass(frozen=True)
class Architecture:
    """The parameters of a causal language model by module name, and where its decoder layers hang."""

    model_type: str
    layers_prefix: str
    num_layers: int
    parameters: dict[str, Parameter]
    base_prefix: str

    def stored_names(self, checkpoint: Checkpoint) -> dict[str, str]:
        """Map each parameter name to the name under which the checkpoint stores it.

        Raises:
            CheckpointError: a weight of the architecture is missing, or the checkpoint holds weights beyond it.
        """
        stored = {self._canonical(name): name for name in checkpoint.tensors}
        where = checkpoint.source.path
        missing = [name for name, item in self.parameters.items() if name not in stored and not item.tied_to]
        if missing:
            raise CheckpointError(
                f"{where}: {len(missing)} tensors of {self.model_type} are missing, the first is {missing[0]!r}"
            )
        unknown = sorted(set(stored) - set(self.parameters))
        if unknown:
            raise CheckpointError(
                f"{where}: {len(unknown)} tensors are not part of {self.model_type}, the first is {unknown[0]!r}"
            )
        return {name: stored[name] for name in self.parameters if name in stored}

    def _canonical(self, name: str) -> str:
        for pattern, replacement in _RENAMED:
            name = pattern.sub(replacement, name)
        if name not in self.parameters and f"{self.base_prefix}.{name}" in self.parameters:
            return f"{self.base_prefix}.{name}"
        return name


def skeleton(config: dict[str, Any], path: str) -> nn.Module:
    """Build the model a config describes on the meta device, in fp32 and evaluation mode.

    Raises:
        CheckpointError: transformers does not know the architecture as a causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if config.get("auto_map"):
        # The class named there would be code from the checkpoint; a built-in class of the same type is used instead.
        config = {key: value for key, value in config.items() if key != "auto_map"}
    model_type = config.get("model_type")
    try:
        parsed = AutoConfig.for_model(**config) if model_type else None
        if parsed is None:
            raise ValueError("config.json names no model_type")
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(parsed, dtype=torch.float32)
    except Exception as error:  # transformers raises many kinds for a config it cannot use
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path}: {model_type}: not a causal language model transformers can build: {reason}"
        ) from (error)
    return model.eval()


def architecture(config: dict[str, Any], path: str) -> Architecture:
    """Read the parameters of the model that a config describes, and their kinds.

    Raises:
        CheckpointError: the family has weights that are neither `nn.Linear` nor embedding nor vector.
    """
    model: Any = skeleton(config, path)
    model_type = str(config["model_type"])
    prefix, count = _decoder_layers(model, model_type, path)
    tied = _tied_head(model, config)
    parameters: dict[str, Parameter] = {}
    head = model.get_output_embeddings()
    for module_name, module in model.named_modules():
        for leaf, tensor in module.named_parameters(recurse=False):
            name = f"{module_name}.{leaf}" if module_name else leaf
            kind = _kind(module, leaf, tensor, module is head)
            if kind is None:
                raise CheckpointError(
                    f"{path}: family {model_type!r} cannot be compressed: {name} is a {tensor.dim()}-D weight of "
                    f"{type(module).__name__}; meswitch handles weights of nn.Linear and nn.Embedding "
                    "(not fused mixture-of-experts weights, convolutions or Conv1D)"
                )
            layer = int(name[len(prefix) + 1 :].split(".")[0]) if name.startswith(f"{prefix}.") else None
            parameters[name] = Parameter(name, kind, tuple(tensor.shape), layer, tied.get(name))
    for name, target in tied.items():  # a tied head shares its tensor, so named_parameters lists it once
        if name not in parameters:
            parameters[name] = Parameter(name, "head", parameters[target].shape, None, target)
    return Architecture(model_type, prefix, count, parameters, str(model.base_model_prefix))


def _kind(module: nn.Module, leaf: str, tensor: torch.Tensor, is_head: bool) -> Kind | None:
    if tensor.dim() <= 1:
        return "dense"
    if type(module) is nn.Linear and leaf == "weight":
        return "head" if is_head else "linear"
    if isinstance(module, nn.Embedding) and leaf == "weight":
        return "embedding"
    return None


def _decoder_layers(model: Any, model_type: str, path: str) -> tuple[str, int]:
    expected = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == expected > 0:
            return name, expected
    raise CheckpointError(f"{path}: family {model_type!r} cannot be compressed: no list of decoder layers found")


def _tied_head(model: Any, config: dict[str, Any]) -> dict[str, str]:
    """Name the head's tensor and the embedding's where the two are one."""
    if not model.config.get_text_config().tie_word_embeddings:
        return {}
    names = {id(module): name for name, module in model.named_modules(remove_duplicate=False)}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or embedding is None:
        return {}
    return {f"{names[id(head)]}.weight": f"{names[id(embedding)]}.weight"}
