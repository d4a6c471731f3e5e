"""What a model is made of, read off transformers' own module tree, and how a checkpoint stores it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.checkpoint.names import canonical_name, explain_names
from meswitch_cli.checkpoint.skeleton import skeleton
from meswitch_cli.checkpoint.tensorfile import TensorInfo, new_buffer
from meswitch_cli.errors import CheckpointError

Kind = Literal["linear", "embedding", "head", "dense"]

#: Module classes whose weight is a linear's, by whether they keep it as `[in, out]`.
LINEAR_CLASSES: dict[type[nn.Module], bool] = {nn.Linear: False}


@dataclass(frozen=True)
class Parameter:
    """One parameter; a linear's weight is `[out, in]` to everybody, whatever way round its module keeps it.

    Attributes:
        layer: its decoder layer, None outside them.
        tied_to: the parameter whose tensor it shares.
        transposed: whether module and checkpoint hold it the other way round.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    layer: int | None
    tied_to: str | None = None
    transposed: bool = False

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return self.shape[::-1] if self.transposed else self.shape

    def from_stored(self, tensor: torch.Tensor) -> torch.Tensor:
        """The value of what a module or a checkpoint holds."""
        return tensor.T.contiguous() if self.transposed else tensor

    def to_stored(self, value: torch.Tensor) -> torch.Tensor:
        """What a module or a checkpoint holds of a value."""
        return value.T.contiguous() if self.transposed else value


@dataclass(frozen=True)
class Storage:
    """Where a checkpoint holds a parameter: `name` is what the tensor is called there."""

    parameter: Parameter
    name: str

    def info(self, checkpoint: Checkpoint) -> TensorInfo:
        return checkpoint.tensors[self.name]

    def read(self, checkpoint: Checkpoint, buffer_of: Callable[[int], torch.Tensor] = new_buffer) -> torch.Tensor:
        """The parameter's value, in the dtype that is stored."""
        return self.parameter.from_stored(checkpoint.read(self.name, buffer_of))

    def digest(self, checkpoint: Checkpoint, value: torch.Tensor) -> str:
        """What the checkpoint's fingerprint has of the parameter, whose value was read."""
        return checkpoint.digest(self.name, self.parameter.name, value)


@dataclass(frozen=True)
class Architecture:
    """The parameters of a causal language model by module name, and where its decoder layers hang.

    Attributes:
        layers_prefix: module name of the list of decoder layers.
        base_prefix: module name of the model without its head.
        embedding: the parameter that token ids look up.
    """

    model_type: str
    layers_prefix: str
    num_layers: int
    parameters: dict[str, Parameter]
    base_prefix: str
    embedding: str

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        return self.parameters[self.embedding].shape[0]

    def holder(self, name: str) -> Parameter:
        """The parameter that holds the values of `name`: the embedding where a head is tied to it."""
        return self.parameters[self.parameters[name].tied_to or name]

    def stored(self, checkpoint: Checkpoint) -> dict[str, Storage]:
        """Where the checkpoint holds each parameter; one that it leaves out, because it is tied, is not listed.

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
        because = "".join(f"; {reason}" for reason in (*reasons, *checkpoint.notes))
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
        return {name: Storage(item, stored[name]) for name, item in self.parameters.items() if name in stored}


def architecture(config: dict[str, Any], where: str) -> Architecture:
    """Read the parameters of the model that a config describes, and their kinds.

    Raises:
        CheckpointError: the family has weights that are neither a linear's nor an embedding's nor vectors.
    """
    model: Any = skeleton(config, where)
    model_type = str(config["model_type"])
    prefix, layers = decoder_layers(model, where)
    names = {id(module): f"{name}.weight" for name, module in model.named_modules(remove_duplicate=False)}
    embedding, head = names.get(id(model.get_input_embeddings())), model.get_output_embeddings()
    if embedding is None:
        raise CheckpointError(f"{where}: family {model_type!r} cannot be compressed: it looks up no tokens")
    # What transformers itself ties for this config: a class may tie nothing although it says tie_word_embeddings.
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tied = {target: source for target, source in model.all_tied_weights_keys.items() if source in known}
    parameters: dict[str, Parameter] = {}
    for module_name, module in model.named_modules():
        for leaf, tensor in module.named_parameters(recurse=False):
            name = f"{module_name}.{leaf}" if module_name else leaf
            kind = _kind(module, leaf, tensor, module is head)
            if kind is None:
                raise CheckpointError(
                    f"{where}: family {model_type!r} cannot be compressed: {name} is a {tensor.dim()}-D weight of "
                    f"{type(module).__name__}; meswitch handles weights of nn.Linear and nn.Embedding "
                    "(not fused mixture-of-experts weights, convolutions or Conv1D)"
                )
            layer = int(name[len(prefix) + 1 :].split(".")[0]) if name.startswith(f"{prefix}.") else None
            transposed = kind in ("linear", "head") and LINEAR_CLASSES[type(module)]
            shape = tuple(tensor.shape[::-1] if transposed else tensor.shape)
            parameters[name] = Parameter(name, kind, shape, layer, tied.get(name), transposed)
    for name, target in tied.items():  # of modules that are one object, named_modules lists the first
        if name not in parameters:
            kind = parameters[target].kind
            shape = parameters[target].shape
            parameters[name] = Parameter(name, "head" if kind == "embedding" else kind, shape, None, target)
    return Architecture(model_type, prefix, len(layers), parameters, str(model.base_model_prefix), embedding)


def decoder_layers(model: Any, where: str) -> tuple[str, nn.ModuleList]:
    """Module name and modules of a model's list of decoder layers.

    Raises:
        CheckpointError: it has none.
    """
    expected = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    modules = dict(model.named_modules())
    lists = {
        name: module
        for name, module in modules.items()
        if isinstance(module, nn.ModuleList) and len(module) == expected > 0
    }
    # A vision tower's list may be as long, and comes first. What text passes through hangs beside its embedding.
    embedding = model.get_input_embeddings()
    home = next((name.rpartition(".")[0] for name, module in modules.items() if module is embedding), None)
    found = next((name for name in lists if name.rpartition(".")[0] == home), next(iter(lists), None))
    if found is None:
        raise CheckpointError(
            f"{where}: family {model.config.model_type!r} cannot be compressed: no list of decoder layers found"
        )
    return found, lists[found]


def _kind(module: nn.Module, leaf: str, tensor: torch.Tensor, is_head: bool) -> Kind | None:
    if tensor.dim() <= 1:
        return "dense"
    if type(module) in LINEAR_CLASSES and leaf == "weight":
        return "head" if is_head else "linear"
    if isinstance(module, nn.Embedding) and leaf == "weight":
        return "embedding"
    return None
