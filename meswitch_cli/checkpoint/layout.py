"""How transformers saves the parameters of a module tree, and finds them again: names, and what it fuses in memory.

A *piece* is what one weight matrix (or vector) of a checkpoint is: transformers holds the experts of a mixture as one
3-D parameter, the pieces are the matrices of single experts, as most checkpoints have them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from meswitch_cli.checkpoint.tensorfile import TensorInfo

#: Operations of transformers that fuse, or rearrange, each matrix of a stack by itself, if not along the stack.
_BY_MATRIX = ("Concatenate", "Transpose", "Interleave")

#: A piece's name to its values, as a checkpoint holds them.
Read = Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class Piece:
    """One matrix or vector of what transformers saves.

    Attributes:
        saved: the tensor that it is or lies in.
        index: which matrix of that tensor it is; None: the whole.
        place: the matrix of the parameter in memory that it becomes a part of, and its rows there; None where it cannot
            be found there so simply.
    """

    name: str
    shape: tuple[int, ...]
    saved: str
    index: int | None = None
    place: tuple[str, int, int] | None = None

    def within(self, info: TensorInfo) -> TensorInfo:
        """Where it lies in the saved tensor."""
        return info if self.index is None else _rows(info, self.index, 0, self.shape)

    def within_parameter(self, info: TensorInfo) -> TensorInfo:
        """Where it lies in the parameter of `place`, of which a checkpoint holds the whole."""
        assert self.place is not None
        return _rows(info, self.place[1], self.place[2], self.shape)


def _rows(info: TensorInfo, index: int, start: int, shape: tuple[int, ...]) -> TensorInfo:
    """Rows of one matrix of a stored stack."""
    row = torch.Size(info.shape[2:]).numel() * info.dtype.itemsize
    offset = info.offset + (index * info.shape[1] + start) * row
    return replace(info, shape=shape, offset=offset, nbytes=torch.Size(shape).numel() * info.dtype.itemsize)


@dataclass(frozen=True)
class Group:
    """Parameters of a module tree that are saved together, and the pieces that they are saved as.

    Attributes:
        stack: matrices of the one parameter; 0 where it is none.
        converter: transformers' own, None where the parameter is saved as it is.
    """

    parameters: tuple[str, ...]
    pieces: tuple[Piece, ...]
    stack: int = 0
    converter: Any = None
    model: Any = None

    @property
    def transposes(self) -> bool:
        """Whether what is saved lies the other way round than in memory."""
        return self.converter is not None and any(
            type(item).__name__ == "Transpose" for item in self.converter[0].operations
        )

    def of_index(self, index: int) -> Sequence[Piece]:
        """The pieces of one matrix of the stack."""
        each = len(self.pieces) // self.stack
        return self.pieces[index * each : (index + 1) * each]

    def values(self, read: Read) -> dict[str, torch.Tensor]:
        """The parameters, as the module tree holds them; not for a stack."""
        return self._converted(self.pieces, {piece.saved: read(piece.name) for piece in self.pieces})

    def matrix(self, index: int, read: Read) -> torch.Tensor:
        """One matrix of the stack, as the module tree holds it."""
        pieces = self.of_index(index)
        values = {piece.saved: read(piece.name) for piece in pieces}
        if self.converter is None:
            return values[pieces[0].saved]
        if pieces[0].index is not None:
            values = {name: value[None] for name, value in values.items()}
        return self._converted(pieces, values)[self.parameters[0]][0]

    def _converted(self, pieces: Sequence[Piece], values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self.converter is None:
            return {self.parameters[0]: values[pieces[0].saved]}
        converter, target = copy.deepcopy(self.converter[0]), ""
        for saved, value in values.items():
            target, pattern = self.converter[1][saved]
            converter.add_tensor(target, saved, pattern, value)
        found = converter.convert(target, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in found.items()}


class CheckpointLayout:
    """What a module tree's parameters are saved as, by transformers' own conversions.

    Attributes:
        groups: by parameter.
        shapes: of the parameters.
    """

    def __init__(self, model: Any, parameters: Mapping[str, torch.Tensor], others: Iterable[str] = ()) -> None:
        """`model` is on the meta device; `parameters` are those of it that checkpoints hold, `others` names that some
        hold besides."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        self._model, self._prefix = model, str(model.base_model_prefix)
        loading = get_model_conversion_mapping(model)
        self._renamings = [item for item in loading if not isinstance(item, WeightConverter)]
        self._converters = [item for item in loading if isinstance(item, WeightConverter)]
        self.shapes = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
        self.groups: dict[str, Group] = {}
        saved = self._saved(parameters)
        for names, tensors in saved:
            group = self._group(names, tensors, parameters)
            self.groups |= dict.fromkeys(names, group)
        self._by_piece = {piece.name: group for group in self.groups.values() for piece in group.pieces}
        self._saved_names = {name: next(iter(tensors)) for names, tensors in saved for name in names[:1]}
        #: What a stored name may mean: a parameter as it is in memory, or what its group is saved as.
        self._known = {name: name for name in (*others, *parameters)}
        for group in self.groups.values():
            self._known |= {piece.name: piece.name for piece in group.pieces if piece.index is not None}
            if group.converter is not None:
                self._known |= {self._renamed(piece.saved): piece.saved for piece in group.pieces}

    def canonical(self, stored: Iterable[str]) -> dict[str, str]:
        """By stored name, the parameter or saved tensor that transformers takes it for; or the name itself."""
        self._renamings = copy.deepcopy(self._renamings)  # some remember what they have met
        return {name: self._canonical(name) for name in sorted(stored, key=_natural)}

    def _canonical(self, name: str) -> str:
        for candidate in (self._renamed(name), name):
            without = candidate.removeprefix(f"{self._prefix}.")
            for variant in (without if without != candidate else None, f"{self._prefix}.{candidate}", candidate):
                if variant in self._known:
                    return self._known[variant]
        return name

    def group_of(self, piece: str) -> Group:
        return self._by_piece[piece]

    def is_known(self, canonical: str) -> bool:
        return canonical in self._known or canonical in self._known.values()

    def saved_name(self, parameter: str) -> str:
        """What transformers calls a parameter that it saves as it is."""
        return self._saved_names.get(parameter, parameter)

    def _renamed(self, name: str) -> str:
        for renaming in self._renamings:
            name = renaming.rename_source_key(name)[0]
        return name

    def _saved(
        self, parameters: Mapping[str, torch.Tensor]
    ) -> list[tuple[tuple[str, ...], dict[str, tuple[int, ...]]]]:
        """Which parameters are saved together, and as what: names and shapes."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import PrefixChange, WeightConverter

        mapping = get_model_conversion_mapping(self._model, add_legacy=False)
        saving = [item.reverse_transform() for item in mapping[::-1] if not isinstance(item, PrefixChange)]
        renamings = [item for item in saving if not isinstance(item, WeightConverter)]
        together: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
        alone: dict[str, str] = {}
        for name in sorted(parameters, key=_natural):
            for converter in (item for item in saving if isinstance(item, WeightConverter)):
                target, pattern = converter.rename_source_key(name)
                if pattern is not None:
                    together.setdefault(target, (converter, []))[1].append((name, pattern))
                    break
            else:
                for renaming in renamings:
                    alone[name] = renaming.rename_source_key(alone.get(name, name))[0]
                alone.setdefault(name, name)
        result: list[tuple[tuple[str, ...], dict[str, tuple[int, ...]]]] = [
            ((name,), {saved: tuple(parameters[name].shape)}) for name, saved in alone.items()
        ]
        for target, (converter, members) in together.items():
            own = copy.deepcopy(converter)
            for name, pattern in members:
                own.add_tensor(target, name, pattern, parameters[name])
            try:
                found = own.convert(target, model=self._model, config=self._model.config)
            except Exception:  # of a family that is saved as it is after all
                result += [((name,), {name: tuple(parameters[name].shape)}) for name, _ in members]
                continue
            tensors = {}
            for name, value in found.items():
                for renaming in renamings:
                    name = renaming.rename_source_key(name)[0]
                tensors[name] = tuple((value[0] if isinstance(value, list) else value).shape)
            result.append((tuple(name for name, _ in members), tensors))
        return result

    def _group(
        self, names: tuple[str, ...], tensors: Mapping[str, tuple[int, ...]], parameters: Mapping[str, torch.Tensor]
    ) -> Group:
        found = self._converter_of(names, tensors)
        shape = tuple(parameters[names[0]].shape)
        stack = shape[0] if len(names) == 1 and is_stack(self._model, names[0], parameters[names[0]]) else 0
        if found is None:
            if not stack:
                return Group(names, (Piece(names[0], shape, names[0]),))
            matrices = (Piece(f"{names[0]}.{index}", shape[1:], names[0], index) for index in range(stack))
            return Group(names, tuple(matrices), stack)
        converter, targets = found
        kinds = [type(item).__name__ for item in converter.operations]
        merged = kinds[0] == "MergeModulelist" and converter.operations[0].dim == 0
        by_matrix = all(
            kind in _BY_MATRIX and getattr(item, "dim", getattr(item, "dim0", 0)) != 0
            for kind, item in zip(kinds[merged:], converter.operations[merged:], strict=True)
        )
        if len(names) == 1 and merged and by_matrix:
            by_pattern: dict[str, list[str]] = {}
            for name in sorted(tensors, key=_natural):
                by_pattern.setdefault(targets[name][1], []).append(name)
            lists = [by_pattern[pattern] for pattern in converter.source_patterns if pattern in by_pattern]
            if {len(item) for item in lists} == {shape[0]}:
                simple = set(kinds[1:]) <= {"Concatenate"} and all(item.dim == 1 for item in converter.operations[1:])
                pieces = []
                for index in range(shape[0]):
                    row = 0
                    for item in lists:
                        piece, name = tensors[item[index]], item[index]
                        pieces.append(Piece(name, piece, name, None, (names[0], index, row) if simple else None))
                        row += piece[0] if piece else 0
                return Group(names, tuple(pieces), shape[0], found, self._model)
        if stack and by_matrix and not merged and all(item[0] == stack for item in tensors.values()):
            slices = [
                Piece(f"{name}.{index}", item[1:], name, index)
                for index in range(stack)
                for name, item in tensors.items()
            ]
            return Group(names, tuple(slices), stack, found, self._model)
        return Group(names, tuple(Piece(name, item, name) for name, item in tensors.items()), 0, found, self._model)

    def _converter_of(self, names: tuple[str, ...], tensors: Mapping[str, Any]) -> Any:
        """transformers' converter that makes these parameters of what they are saved as, and its target and pattern for
        each; None where it makes nothing."""
        found: Any = None
        targets: dict[str, tuple[str, str]] = {}
        for saved in tensors:
            renamed = self._renamed(saved)
            for converter in self._converters:
                target, pattern = converter.rename_source_key(renamed)
                if pattern is None:
                    continue
                if found not in (None, converter):
                    return None
                found, targets[saved] = converter, (self._with_prefix(target, names), pattern)
                break
        return (found, targets) if found is not None and len(targets) == len(tensors) else None

    def _with_prefix(self, target: str, names: tuple[str, ...]) -> str:
        if target not in names and f"{self._prefix}.{target}" in names:
            return f"{self._prefix}.{target}"
        return target


def is_stack(model: nn.Module, name: str, parameter: torch.Tensor) -> bool:
    """Whether a parameter is one matrix for each expert of a mixture."""
    owner: Any = model.get_submodule(name.rpartition(".")[0])
    return parameter.dim() == 3 and getattr(owner, "num_experts", None) == parameter.shape[0]


def _natural(name: str) -> list[Any]:
    """Sorts numbers by value, as transformers does."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]
