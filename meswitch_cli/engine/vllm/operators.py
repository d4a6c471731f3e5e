"""Layers as operators of torch that torch.compile does not look into: they read the slots and the banks of now.

An operator is given the name of its layer, as vLLM's attention is: a traced graph may be kept on disk, and must find
the layer of the process that loads it.
"""

from __future__ import annotations

from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class NamedLayer(Protocol):
    """A linear or an embedding under its name. What it returns must share no memory with what it is given."""

    def compute(self, x: Tensor, biased: bool) -> Tensor: ...
    def empty(self, x: Tensor) -> Tensor:
        """A tensor as `compute` returns it."""


_layers: WeakValueDictionary[str, Any] = WeakValueDictionary()


def announce_layer(name: str, layer: NamedLayer) -> None:
    """Have the operators find a layer; one of the same name, of another model in this process, is forgotten."""
    _layers[name] = layer


def call(layer: NamedLayer, name: str, x: Tensor, biased: bool) -> Tensor:
    """`layer.compute`, as an operator where torch.compile traces."""
    if torch.compiler.is_compiling():
        result: Tensor = torch.ops.meswitch.served_layer(x, biased, name)
        return result
    return layer.compute(x, biased)


def _compute(x: Tensor, biased: bool, name: str) -> Tensor:
    result: Tensor = _layers[name].compute(x, biased)
    return result


def _fake(x: Tensor, biased: bool, name: str) -> Tensor:
    result: Tensor = _layers[name].empty(x)
    return result


_library: Any = torch.library.Library("meswitch", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("served_layer(Tensor x, bool biased, str name) -> Tensor")
_library.impl("served_layer", _compute, "CompositeExplicitAutograd")
torch.library.register_fake("meswitch::served_layer", _fake, lib=_library)
