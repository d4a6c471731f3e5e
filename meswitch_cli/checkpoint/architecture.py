"""What a model is made of, read off transformers' own module tree on the meta device: no weight is allocated."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from meswitch_cli.checkpoint.names import canonical_name, explain_names
from meswitch_cli.errors import CheckpointError

if TYPE_CHECKING:
    from meswitch_cli.checkpoint.checkpoint import Checkpoint

#: Entries of config.json that choose an attention kernel, which may not be installed here.
ATTENTION_ENTRIES = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")

Kind = Literal["linear", "embedding", "head", "dense"]


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
        stored = {canonical_name(name, self.parameters, self.base_prefix): name for name in checkpoint.tensors}
        for name, item in self.parameters.items():
            if item.tied_to and item.tied_to not in stored and name in stored:
                stored[item.tied_to] = stored.pop(name)  # one tensor for both, under the head's name
        where = checkpoint.source.path
        missing = [name for name, item in self.parameters.items() if name not in stored and not item.tied_to]
        unknown = sorted(set(stored) - set(self.parameters))
        reasons = [reason for reason in (explain_names(unknown, self.parameters, self.base_prefix),) if reason]
        reasons += checkpoint.notes
        because = "".join(f"; {reason}" for reason in reasons)
        if missing:
            raise CheckpointError(
                f"{where}: {len(missing)} tensors of {self.model_type} are missing, the first is {missing[0]!r}"
                + (f"; {len(unknown)} are not part of it, the first is {unknown[0]!r}" if unknown else "")
                + because
            )
        if unknown:
            raise CheckpointError(
                f"{where}: {len(unknown)} tensors are not part of {self.model_type}, the first is {unknown[0]!r}"
                + because
            )
        return {name: stored[name] for name in self.parameters if name in stored}


def skeleton(config: dict[str, Any], path: str) -> nn.Module:
    """Build the model a config describes on the meta device, in fp32 and evaluation mode.

    Raises:
        CheckpointError: transformers does not know the architecture as a causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    # The class that auto_map names would be code from the checkpoint; a built-in class of the same type is used
    # instead. How attention is computed is the machine's affair, not the checkpoint's.
    config = _without(config, ("auto_map", *ATTENTION_ENTRIES))
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


def _without(config: dict[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """A config without some entries, those of its parts included."""
    return {
        key: _without(value, keys) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in keys
    }


def architecture(config: dict[str, Any], path: str) -> Architecture:
    """Read the parameters of the model that a config describes, and their kinds.

    Raises:
        CheckpointError: the family has weights that are neither `nn.Linear` nor embedding nor vector.
    """
    model: Any = skeleton(config, path)
    model_type = str(config["model_type"])
    prefix, count = _decoder_layers(model, model_type, path)
    tied = _ties(model)
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
    for name, target in tied.items():  # of modules that are one object, named_modules lists the first
        if name not in parameters:
            kind = parameters[target].kind
            parameters[name] = Parameter(
                name, "head" if kind == "embedding" else kind, parameters[target].shape, None, target
            )
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
    expected = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == expected > 0:
            return name, expected
    raise CheckpointError(f"{path}: family {model_type!r} cannot be compressed: no list of decoder layers found")


def _ties(model: Any) -> dict[str, str]:
    """Tensors that share another's values, and whose: what transformers itself ties for this config. A class may
    tie nothing although the config says `tie_word_embeddings`.
    """
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {target: source for target, source in model.all_tied_weights_keys.items() if source in names}
