"""Which banks a set of experts needs, of layers that an engine calls what it calls them."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from meswitch_cli.artifact.manifest import Manifest
from meswitch_cli.artifact.served import slot_entries
from meswitch_cli.delta.codes import TrellisCode
from meswitch_cli.delta.stored import TensorEntry
from meswitch_cli.engine.contract import EngineError
from meswitch_kernels import Capacity
from meswitch_kernels.dispatch import reads_planes
from meswitch_kernels.messages import Message, find_message


class LayerNames(Protocol):
    """What the layers of a base are called, as transformers names its modules."""

    @property
    def linears(self) -> Container[str]: ...
    @property
    def norms(self) -> Container[str]: ...
    @property
    def whole(self) -> Container[str]:
        """Parameters of which every slot holds a copy."""

    @property
    def embedding_name(self) -> str: ...
    @property
    def head_name(self) -> str: ...


class Layers(LayerNames, Protocol):
    """A base's layers in some engine, by transformers' names: each has `weight` and `bias`, and is handed a bank."""

    @property
    def linears(self) -> Mapping[str, Any]: ...
    @property
    def norms(self) -> Mapping[str, Any]: ...
    @property
    def routers(self) -> Mapping[str, Any]:
        """What has the parameters of `whole`: each has its `base`, and is handed `tables`."""

    @property
    def own_parameters(self) -> Any:
        """What holds the parameters of `whole` in place of tables, where a forward pass is of one slot; else None."""

    @property
    def embedding(self) -> Any: ...
    @property
    def head(self) -> Any: ...
    @property
    def tied(self) -> bool: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def layer(self, name: str) -> Any:
        """A linear, the embedding or the head."""


@dataclass(frozen=True)
class Layout:
    """The banks that a set of experts needs: capacities by module name, and the norms and whole parameters that they
    change."""

    capacities: dict[str, Capacity]
    norms: frozenset[str]
    whole: frozenset[str] = frozenset()

    def joined(self, other: Layout) -> Layout:
        """The layout that holds what either holds."""
        names = sorted(self.capacities.keys() | other.capacities.keys())
        none = Capacity()
        capacities = {name: self.capacities.get(name, none).joined(other.capacities.get(name, none)) for name in names}
        return Layout(capacities, self.norms | other.norms, self.whole | other.whole)

    def holds(self, other: Layout) -> bool:
        return self.joined(other) == self.joined(self)


def capacity_of(entry: TensorEntry, *, messages: bool = False) -> Capacity:
    """What a bank must hold for what an entry tells of; `messages` where kernels decode a trellis code's themselves."""
    if not entry.bits:
        return Capacity(added_rows=entry.added_rows, rank=entry.rank)
    message = known_message(entry.trellis) if messages else None
    return Capacity(
        bits=0 if message else entry.width,
        messages=(message.number,) if message else (),
        group_size=entry.group_size,
        salient=entry.salient,
        added_rows=entry.added_rows,
        rank=entry.rank,
        channel_scale=entry.channel_scale,
    )


def slot_bits(entry: TensorEntry, *, messages: bool = False) -> float:
    """Bits of a weight's codes in a slot; `messages` as of `capacity_of`."""
    return entry.bits if messages and known_message(entry.trellis) else entry.width


def known_message(code: TrellisCode | None) -> Message | None:
    """The message that kernels decode, where they know this code."""
    return None if code is None else find_message(code.channels_a_bit, code.taps)


def bank_layout(base: LayerNames, manifests: Iterable[Manifest], *, messages: bool = False) -> Layout:
    """The banks that hold any of these experts; `messages` where kernels decode a trellis code's themselves.

    Where base and all experts tie the head, the embedding's bank is the head's too.

    Raises:
        ArtifactError: an expert that is stored bit for bit names a code that there is not.
        EngineError: an expert changes a parameter that no layer here serves.
    """
    capacities: dict[str, Capacity] = {}
    norms: set[str] = set()
    whole: set[str] = set()
    for manifest in manifests:
        for entry in slot_entries(manifest):
            module, _, leaf = entry.name.rpartition(".")
            if module in base.norms:
                norms.add(module)
            elif entry.name in base.whole:
                whole.add(entry.name)
            elif entry.kind == "dense":
                served = module in base.linears or module == base.head_name
                if leaf != "bias" or not served:
                    raise EngineError(f"{manifest.expert.id}: {entry.name} cannot be served from the base")
                capacities.setdefault(module, Capacity())
            elif module in base.linears or module in (base.head_name, base.embedding_name):
                capacities[module] = capacities.get(module, Capacity()).joined(capacity_of(entry, messages=messages))
            else:
                raise EngineError(f"{manifest.expert.id}: {entry.name} is in no layer of the base")
    # Where the head has a bank of its own, experts that tie it load their embedding's delta there too.
    embedding, head = capacities.get(base.embedding_name), capacities.get(base.head_name)
    if embedding and head:
        capacities[base.head_name] = head.joined(embedding)
    return Layout(capacities, frozenset(norms), frozenset(whole))


def device_layout(base: Layers, manifests: Iterable[Manifest]) -> Layout:
    """The banks that hold any of these experts on the base's own device. Raises as `bank_layout`."""
    return bank_layout(base, manifests, messages=reads_planes(base.device.type))
