"""What a model is made of, read off transformers' own module tree, and how a checkpoint stores it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.checkpoint.contents import held_parameters
from meswitch_cli.checkpoint.layout import CheckpointLayout, Group, Piece
from meswitch_cli.checkpoint.names import explain_names
from meswitch_cli.checkpoint.skeleton import skeleton
from meswitch_cli.checkpoint.tensorfile import TensorInfo, new_buffer, read_tensor
from meswitch_cli.errors import CheckpointError, reason_of

Kind = Literal["linear", "embedding", "head", "dense"]


@dataclass(frozen=True)
class Parameter:
    """One parameter; a linear's weight is `[out, in]` to everybody, whatever way round its module keeps it.

    Attributes:
        layer: its decoder layer, None outside them.
        tied_to: the parameter whose tensor it shares.
        transposed: whether module and checkpoint hold it the other way round.
        piece: what it is of what transformers saves; None where it shares a tensor.
        stacked: whether it is one expert's of a mixture, whose matrices the module tree holds as one parameter.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    layer: int | None
    tied_to: str | None = None
    transposed: bool = False
    piece: Piece | None = None
    stacked: bool = False

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
    """Where a checkpoint holds a parameter: `name` is what the tensor is called there.

    Attributes:
        shape: of that tensor, as the config has it.
        within: finds the parameter in a tensor of which it is a part; None where it is the whole.
    """

    parameter: Parameter
    name: str
    shape: tuple[int, ...]
    within: Callable[[TensorInfo], TensorInfo] | None = None

    def info(self, checkpoint: Checkpoint) -> TensorInfo:
        info = checkpoint.tensors[self.name]
        return self.within(info) if self.within else info

    def read(self, checkpoint: Checkpoint, buffer_of: Callable[[int], torch.Tensor] = new_buffer) -> torch.Tensor:
        """The parameter's value, in the dtype that is stored."""
        if self.within:
            return self.parameter.from_stored(read_tensor(self.info(checkpoint), buffer_of))
        return self.parameter.from_stored(checkpoint.read(self.name, buffer_of))

    def digest(self, checkpoint: Checkpoint, value: torch.Tensor) -> str:
        """What the checkpoint's fingerprint has of the parameter, whose value was read."""
        return checkpoint.digest(self.name, self.parameter.name, value)


@dataclass(frozen=True)
class Architecture:
    """The parameters of a causal language model, and where its decoder layers hang.

    A parameter is called as its module calls it. Of what transformers fuses in memory each part is one, by its name in
    a checkpoint: the matrices of single experts.

    Attributes:
        held: the decoder layer of every parameter of the module tree, by module name.
        layout: how checkpoints hold these.
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
    held: dict[str, int | None]
    layout: CheckpointLayout

    @property
    def experts(self) -> int:
        """Experts of its mixtures, the most that a layer has; 0 where it has none that are fused."""
        return max((self.layout.groups[name].stack for name in self.held), default=0)

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
        stored = {own: name for name, own in self.layout.canonical(checkpoint.tensors).items()}
        for name, item in self.parameters.items():
            if item.tied_to and item.tied_to not in stored and name in stored:
                stored[item.tied_to] = stored.pop(name)  # one tensor for both, under the head's name
        found = {name: storage for name, item in self.parameters.items() if (storage := self._storage(item, stored))}
        where = checkpoint.source.path
        missing = [name for name, item in self.parameters.items() if name not in found and not item.tied_to]
        unknown = sorted(name for name in stored if not self.layout.is_known(name))
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
        return found

    def _storage(self, item: Parameter, stored: Mapping[str, str]) -> Storage | None:
        """Where a parameter lies, `stored` being a checkpoint's names by what transformers takes them for."""
        piece = item.piece
        if piece is None or (piece.index is not None and item.name in stored):
            return Storage(item, stored[item.name], item.stored_shape) if item.name in stored else None
        if piece.saved in stored:
            group = self.layout.group_of(piece.name)
            if piece.index is None:
                return Storage(item, stored[piece.saved], piece.shape)
            return Storage(item, stored[piece.saved], (group.stack, *piece.shape), piece.within)
        if piece.place and piece.place[0] in stored:
            whole = self.layout.shapes[piece.place[0]]
            return Storage(item, stored[piece.place[0]], whole, piece.within_parameter)
        return None

    def values(self, names: Iterable[str], read: Callable[[str], torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """Parameters of the module tree as it holds them, made of these that `read` gives by name, `[out, in]`."""

        done: set[str] = set()
        for name in names:
            group = self.layout.groups[name]
            if name in done:
                continue
            if group.stack:
                matrices = (self.matrix(name, index, read) for index in range(group.stack))
                yield name, _stacked(matrices, group.stack)
                continue
            done |= set(group.parameters)
            yield from group.values(lambda piece: self._as_saved(piece, read)).items()

    def matrix(self, name: str, index: int, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """One matrix of a parameter of the module tree that is a stack of them; `read` as for `values`."""
        return self.layout.groups[name].matrix(index, lambda piece: self._as_saved(piece, read))

    def _as_saved(self, piece: str, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        return self.parameters[piece].to_stored(read(piece))


def _stacked(matrices: Iterable[torch.Tensor], count: int) -> torch.Tensor:
    whole: torch.Tensor | None = None
    for index, matrix in enumerate(matrices):
        if whole is None:
            whole = matrix.new_empty((count, *matrix.shape))
        whole[index] = matrix
    assert whole is not None
    return whole


def architecture(config: dict[str, Any], where: str) -> Architecture:
    """Read the parameters of the model that a config describes, and their kinds.

    What is neither a linear's weight nor an embedding is `dense`: vectors, convolutions, routers.

    Raises:
        CheckpointError: the family has no decoder layers, or looks up no tokens.
    """
    model: Any = skeleton(config, where)
    model_type = str(config["model_type"])
    prefix, layers = decoder_layers(model, where)
    names = {id(module): f"{name}.weight" for name, module in model.named_modules(remove_duplicate=False)}
    looked_up, head = _ends(model, where)
    embedding = names.get(id(looked_up))
    if embedding is None:
        raise CheckpointError(f"{where}: family {model_type!r} cannot be compressed: it looks up no tokens")
    tensors = held_parameters(model)
    # What transformers itself ties for this config: a class may tie nothing although it says tie_word_embeddings.
    tied = {target: source for target, source in model.all_tied_weights_keys.items() if source in tensors}
    layout = CheckpointLayout(model, tensors)
    kinds, held = {}, {}
    for module_name, module in model.named_modules():
        for leaf, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            name = f"{module_name}.{leaf}" if module_name else leaf
            if name in tensors:
                kinds[name] = _kind(module, leaf, tensors[name], module is head)
                held[name] = int(name[len(prefix) + 1 :].split(".")[0]) if name.startswith(f"{prefix}.") else None
    parameters: dict[str, Parameter] = {}
    for name, layer in held.items():
        group = layout.groups[name]
        kind, transposed = kinds[name]
        if group.stack:
            kind, transposed = "linear", _is_transposed(model, group)
        elif {kinds.get(member) for member in group.parameters} != {(kind, False)} and group.converter:
            kind, transposed = "dense", False
        for piece in group.pieces:
            matrix = len(piece.shape) == 2
            shape = piece.shape[::-1] if transposed and matrix else piece.shape
            own: Kind = kind if matrix else "dense"
            parameters.setdefault(
                piece.name,
                Parameter(
                    piece.name, own, shape, layer, tied.get(name), transposed and matrix, piece, bool(group.stack)
                ),
            )
    for name, target in tied.items():  # of modules that are one object, named_modules lists the first
        held.setdefault(name, None)
        if name not in parameters:
            kind, shape = parameters[target].kind, parameters[target].shape
            parameters[name] = Parameter(name, "head" if kind == "embedding" else kind, shape, None, target)
    base = str(model.base_model_prefix)
    return Architecture(model_type, prefix, len(layers), parameters, base, embedding, held, layout)


def decoder_layers(model: Any, where: str) -> tuple[str, nn.ModuleList]:
    """Module name and modules of a model's list of decoder layers.

    Raises:
        CheckpointError: it has none.
    """
    text = model.config.get_text_config()
    modules = dict(model.named_modules())
    lists: dict[str, nn.ModuleList] = {}
    for expected in (getattr(text, "num_hidden_layers", 0), getattr(text, "decoder_layers", 0)):
        lists = lists or {
            name: module
            for name, module in modules.items()
            if isinstance(module, nn.ModuleList) and len(module) == expected > 0
        }
    # A vision tower's list may be as long, and comes first. What text passes through hangs beside its embedding.
    embedding, _ = _ends(model, where)
    home = next((name.rpartition(".")[0] for name, module in modules.items() if module is embedding), None)
    found = next((name for name in lists if name.rpartition(".")[0] == home), next(iter(lists), None))
    if found is None:
        raise CheckpointError(
            f"{where}: family {model.config.model_type!r} cannot be compressed: no list of decoder layers found"
        )
    return found, lists[found]


def _ends(model: Any, where: str) -> tuple[Any, Any]:
    """The modules that look up tokens and that give their logits, by transformers' own word.

    Raises:
        CheckpointError: the family's class does not know them.
    """
    try:
        return model.get_input_embeddings(), getattr(model, "get_output_embeddings", lambda: None)()
    except (AttributeError, NotImplementedError) as error:  # of a class that was made for another tree
        raise CheckpointError(
            f"{where}: family {model.config.model_type!r} cannot be compressed: {type(model).__name__} of transformers "
            f"does not find its own embedding: {reason_of(error)}"
        ) from error


def _kind(module: nn.Module, leaf: str, tensor: torch.Tensor, is_head: bool) -> tuple[Kind, bool]:
    """A parameter's kind, and whether it is a linear's weight that is kept as `[in, out]`: transformers' Conv1D."""
    from transformers.pytorch_utils import Conv1D

    if tensor.dim() == 2 and leaf == "weight":
        if isinstance(module, nn.Linear | Conv1D):
            return "head" if is_head else "linear", isinstance(module, Conv1D)
        if isinstance(module, nn.Embedding):
            return "embedding", False
    return "dense", False


def _is_transposed(model: Any, group: Group) -> bool:
    """Whether the matrices of a stack are saved as `[in, out]`."""
    module: Any = model.get_submodule(group.parameters[0].rpartition(".")[0])
    return bool(getattr(module, "is_transposed", False)) != group.transposes
