"""Parameters that no bank holds: a slot has its own where its expert changed them, in their modules for one forward
pass."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from meswitch_cli.delta.quantize import expert_value
from meswitch_cli.delta.stored import StoredDelta
from meswitch_cli.model.architecture import Architecture

#: The slot of the base.
BASE_SLOT = -1


class OwnParameters:
    """What a model's modules hold beside the weights of which banks have deltas, for the base and for each slot.

    A forward pass is of one slot, so it is the modules' own code that computes, whatever it is.

    Attributes:
        names: these parameters, as artifacts call them.
    """

    def __init__(
        self, model: Any, described: Architecture, held: Collection[str], read: Callable[[str], Tensor]
    ) -> None:
        """`held` are names of the module tree; `read` gives the base's values by the names that artifacts have."""
        self.names = frozenset(piece.name for name in held for piece in described.layout.groups[name].pieces)
        self._described, self._read, self._held = described, read, tuple(held)
        self._places = _places(model, self._held)
        self._base = {name: _tensor(model, name) for name in self._held}
        self._of_slot: dict[int, dict[str, Tensor]] = {}
        self._placed = BASE_SLOT
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Of all slots together."""
        return sum(self._nbytes(slot) for slot in tuple(self._of_slot))

    def load(self, slot: int, stored: Mapping[str, StoredDelta]) -> int:
        """Make a slot's own of what its expert changed; return their bytes."""
        changed = [name for name in self._held if any(piece in stored for piece in self._pieces(name))]
        made = self._described.values(changed, lambda piece: self._value(piece, stored))
        values = {name: self._as_held(name, value) for name, value in made if name in self._base}
        with self._lock:
            self._put(BASE_SLOT)
            self._of_slot[slot] = values
        return self._nbytes(slot)

    def clear(self, slot: int) -> None:
        with self._lock:
            self._put(BASE_SLOT)
            self._of_slot.pop(slot, None)

    @contextmanager
    def placed(self, slot: int) -> Iterator[None]:
        """Have the modules hold a slot's own parameters, and no other thread change that."""
        with self._lock:
            self._put(slot)
            yield

    def _put(self, slot: int) -> None:
        if slot == self._placed:
            return
        own = self._of_slot.get(slot, {})
        for name in {*own, *self._of_slot.get(self._placed, {})}:
            for owner, leaf in self._places[name]:
                owner[leaf] = own.get(name, self._base[name])
        self._placed = slot

    def _pieces(self, name: str) -> list[str]:
        return [piece.name for piece in self._described.layout.groups[name].pieces]

    def _value(self, name: str, stored: Mapping[str, StoredDelta]) -> Tensor:
        delta = stored.get(name)
        value = self._read(name) if delta is None or delta.value is None else delta.value
        if delta is not None and delta.value is None:
            value = expert_value(delta, value)
        # Of a stack every matrix is kept while it is made.
        dtype = self._dtype if self._described.parameters[name].stacked else torch.float32
        return value.to(dtype)

    @property
    def _dtype(self) -> torch.dtype:
        floating = (value.dtype for value in self._base.values() if isinstance(value, nn.Parameter))
        return next((dtype for dtype in floating if dtype.is_floating_point), torch.float32)

    def _as_held(self, name: str, value: Tensor) -> Tensor:
        base = self._base[name]
        own = value.to(device=base.device, dtype=base.dtype)
        return nn.Parameter(own, requires_grad=False) if isinstance(base, nn.Parameter) else own

    def _nbytes(self, slot: int) -> int:
        return sum(value.nbytes for value in self._of_slot.get(slot, {}).values())


def _places(model: Any, held: Collection[str]) -> dict[str, list[tuple[dict[str, Any], str]]]:
    """Where modules hold parameters and buffers: by name, all places of one that several modules share."""
    found: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for module in model.modules():
        for owner in (module._parameters, module._buffers):
            for leaf, value in owner.items():
                if value is not None:
                    found.setdefault(id(value), []).append((owner, leaf))
    return {name: found[id(_tensor(model, name))] for name in held}


def _tensor(model: Any, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    value: Tensor = getattr(model.get_submodule(path), leaf)
    return value
