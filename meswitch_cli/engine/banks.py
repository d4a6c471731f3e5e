"""Every expert's deltas, slot by slot, for every layer that some expert changes."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.artifact.manifest import Manifest, TensorEntry
from meswitch_cli.delta.low_rank import vectors_of
from meswitch_cli.engine.base_model import effective_gain
from meswitch_cli.engine.contract import EngineError
from meswitch_kernels import ExpertBank, GainBank

#: Parts of an artifact's tensors, by parameter name and part, as `Shard.read` names them.
Parts = dict[tuple[str, str], Tensor]


class LayerNames(Protocol):
    """What the layers of a base are called, as transformers names its modules."""

    @property
    def linears(self) -> Container[str]: ...
    @property
    def norms(self) -> Container[str]: ...
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
class Room:
    """What the slots of one bank must hold at most."""

    bits: int = 1
    group_size: int = 0
    salient: int = 0
    added_rows: int = 0
    rank: int = 0

    def joined(self, other: Room) -> Room:
        return Room(
            max(self.bits, other.bits),
            min((size for size in (self.group_size, other.group_size) if size), default=0),
            max(self.salient, other.salient),
            max(self.added_rows, other.added_rows),
            max(self.rank, other.rank),
        )


@dataclass(frozen=True)
class Layout:
    """The banks that a set of experts needs: rooms by module name, and the norms that they change."""

    rooms: dict[str, Room]
    norms: frozenset[str]

    def joined(self, other: Layout) -> Layout:
        """The layout that holds what either holds."""
        names = self.rooms.keys() | other.rooms.keys()
        rooms = {name: self.rooms.get(name, Room()).joined(other.rooms.get(name, Room())) for name in sorted(names)}
        return Layout(rooms, self.norms | other.norms)

    def holds(self, other: Layout) -> bool:
        return self.joined(other) == self.joined(self)


def bank_layout(base: LayerNames, manifests: Iterable[Manifest]) -> Layout:
    """The banks that hold any of these experts.

    Where base and all experts tie the head, the embedding's bank is the head's too.

    Raises:
        EngineError: an expert changes a parameter that no layer here serves.
    """
    rooms: dict[str, Room] = {}
    norms: set[str] = set()
    for manifest in manifests:
        for entry in manifest.tensors:
            module, _, leaf = entry.name.rpartition(".")
            if module in base.norms:
                norms.add(module)
            elif entry.kind == "dense":
                served = module in base.linears or module == base.head_name
                if leaf != "bias" or not served:
                    raise EngineError(f"{manifest.expert.id}: {entry.name} cannot be served from the base")
                rooms.setdefault(module, Room())
            elif module in base.linears or module in (base.head_name, base.embedding_name):
                own = Room(entry.bits, entry.group_size, entry.salient, entry.added_rows, entry.rank)
                rooms[module] = rooms.get(module, Room()).joined(own)
            else:
                raise EngineError(f"{manifest.expert.id}: {entry.name} is in no layer of the base")
    return Layout(_with_shared_head(base, rooms), frozenset(norms))


def _with_shared_head(base: LayerNames, rooms: dict[str, Room]) -> dict[str, Room]:
    """Where the head has a bank of its own, experts that tie it load their embedding's delta there too."""
    embedding, head = rooms.get(base.embedding_name), rooms.get(base.head_name)
    if embedding and head:
        rooms[base.head_name] = head.joined(embedding)
    return rooms


class Banks:
    """The banks of a layout, with `slots` places each, put into the base's layers.

    Attributes:
        nbytes: of device memory, whatever is loaded.
    """

    def __init__(self, base: Layers, layout: Layout, slots: int) -> None:
        self.base, self.layout, self.slots = base, layout, slots
        self.banks = {name: self._bank(name, room) for name, room in layout.rooms.items()}
        self.added_bias: Tensor | None = None
        head = layout.rooms.get(base.head_name)
        if head and head.added_rows and base.head.bias is not None:
            self.added_bias = torch.zeros(slots + 1, head.added_rows, dtype=base.dtype, device=base.device)
        self.gains: dict[str, GainBank] = {}
        self.shifts: dict[str, GainBank] = {}
        for name in layout.norms:
            norm = base.norms[name]
            # Gemma adds 1 to the weight in fp32; the others multiply in the model's own type.
            plain = float(norm.plain.weight.flatten()[0]) == 1.0
            dtype = base.dtype if plain else torch.float32
            self.gains[name] = GainBank(slots, effective_gain(norm, norm.base.weight).to(dtype))
            if getattr(norm.base, "bias", None) is not None:
                self.shifts[name] = GainBank(slots, norm.base.bias.to(dtype))

    def install(self) -> None:
        """Hand every layer its bank. The head has the embedding's, unless an expert has a head of its own."""
        base = self.base
        for name, linear in base.linears.items():
            linear.bank = self.banks.get(name)
        base.embedding.bank = self.banks.get(base.embedding_name)
        base.head.bank = self.banks.get(base.head_name)
        if base.head.bank is None and base.tied:
            base.head.bank = base.embedding.bank
        base.head.added_bias = self.added_bias
        for name, norm in base.norms.items():
            norm.gains, norm.shifts = self.gains.get(name), self.shifts.get(name)

    @property
    def nbytes(self) -> int:
        gains = (*self.gains.values(), *self.shifts.values())
        added = 0 if self.added_bias is None else self.added_bias.nbytes
        return sum(bank.nbytes for bank in self.banks.values()) + sum(item.nbytes for item in gains) + added

    @property
    def slot_nbytes(self) -> int:
        return self.nbytes // self.slots

    def load(self, slot: int, manifest: Manifest, parts: Parts) -> int:
        """Put an expert into a slot that no token uses; return the bytes copied."""
        return self._load(slot, {entry.name: entry for entry in manifest.tensors}, self._ties_head(manifest), parts)

    def load_base(self, slot: int) -> int:
        """Put an expert that changes nothing into a slot; return the bytes copied."""
        return self._load(slot, {}, False, {})

    def _load(self, slot: int, entries: Mapping[str, TensorEntry], ties_head: bool, parts: Parts) -> int:
        moved = 0
        if self.added_bias is not None:
            self.added_bias[slot + 1] = 0
        for name, bank in self.banks.items():
            weight, bias = f"{name}.weight", f"{name}.bias"
            if name == self.base.head_name and weight not in entries and ties_head:
                weight = f"{self.base.embedding_name}.weight"
            moved += self._load_bank(bank, slot, entries.get(weight), bias, parts)
        for name, gains in self.gains.items():
            norm = self.base.norms[name]
            value = parts.get((f"{name}.weight", "value"), norm.base.weight)
            gains.load(slot, effective_gain(norm, value.to(gains.table.device)).to(gains.table.dtype))
            moved += gains.table[0].nbytes
        for name, shifts in self.shifts.items():
            shift = parts.get((f"{name}.bias", "value"), self.base.norms[name].base.bias)
            shifts.load(slot, shift.to(shifts.table.dtype))
            moved += shifts.table[0].nbytes
        if self.base.device.type == "cuda":
            torch.cuda.current_stream(self.base.device).synchronize()
        return moved

    def clear(self, slot: int) -> None:
        for bank in self.banks.values():
            bank.clear(slot)
        for gains in (*self.gains.values(), *self.shifts.values()):
            gains.clear(slot)

    def _bank(self, name: str, room: Room) -> ExpertBank:
        weight: Tensor = self.base.layer(name).weight
        out_features, in_features = weight.shape
        return ExpertBank(
            self.slots,
            in_features,
            out_features,
            room.bits,
            room.group_size,
            room.salient,
            self.base.dtype,
            self.base.device,
            max_added_rows=room.added_rows,
            max_rank=room.rank,
        )

    def _ties_head(self, manifest: Manifest) -> bool:
        return f"{self.base.head_name}.weight" not in manifest.unchanged

    def _load_bank(self, bank: ExpertBank, slot: int, entry: TensorEntry | None, bias: str, parts: Parts) -> int:
        name = entry.name if entry else ""

        def part(kind: str) -> Tensor | None:
            return parts.get((name, kind))

        codes, steps, bits = part("codes"), part("steps"), entry.bits if entry and entry.bits else 1
        if codes is None or steps is None:  # equal to the base's, apart from a bias or added rows
            words = -(-bank.in_features // 32)
            codes, steps = torch.zeros(bank.out_features, words, dtype=torch.int32), torch.zeros(bank.out_features, 1)
        missing = bank.out_features - codes.shape[0]
        salient_value = part("salient_value")
        if missing:  # the expert's vocabulary is shorter; the sampler refuses the rows that follow
            codes, steps = _pad_rows(codes, missing), _pad_rows(steps, missing)
            salient_value = None if salient_value is None else _pad_rows(salient_value, missing)
        bias_value = parts.get((bias, "value"))
        if bias_value is not None:
            if self.added_bias is not None and bias == f"{self.base.head_name}.bias":
                added = bias_value[bank.out_features :]
                self.added_bias[slot + 1, : added.shape[0]] = added
            bias_value = _resized(bias_value, bank.out_features)
            own = self.base.layer(bias.removesuffix(".bias")).bias
            bias_value = bias_value.float() - own.float().to(bias_value.device)
        left, right = self._factor(part, "left", bank.out_features), self._factor(part, "right", bank.in_features)
        loaded = [codes, steps, part("salient_index"), salient_value, part("channel_scale"), bias_value]
        loaded += [part(f"{side}_{kind}") for side in ("left", "right") for kind in ("codes", "steps")]
        bank.load(
            slot,
            codes,
            steps,
            part("salient_index"),
            salient_value,
            part("channel_scale"),
            bias_value,
            bits,
            group_size=entry.group_size if entry and entry.bits and steps.shape[1] > 1 else 0,
            added_rows=part("added_rows"),
            left=None if left is None else left.T,
            right=right,
        )
        loaded.append(part("added_rows"))
        return sum(tensor.nbytes for tensor in loaded if tensor is not None)

    def _factor(self, part: Callable[[str], Tensor | None], side: str, length: int) -> Tensor | None:
        """The vectors `[rank, length]` of one side of a low-rank part: they travel, and wait on host, as codes."""
        codes, steps = part(f"{side}_codes"), part(f"{side}_steps")
        if codes is None or steps is None:
            return None
        device = self.base.device
        return vectors_of(codes.to(device, non_blocking=True), steps.to(device, non_blocking=True), length)


def _resized(bias: Tensor, rows: int) -> Tensor:
    return bias[:rows] if bias.shape[0] >= rows else _pad_rows(bias, rows - bias.shape[0])


def _pad_rows(tensor: Tensor, rows: int) -> Tensor:
    return torch.cat([tensor, tensor.new_zeros(rows, *tensor.shape[1:])])


def read_parts(artifact: Artifact) -> Parts:
    """Read every tensor of an artifact into host memory.

    Raises:
        ArtifactError: a shard is damaged.
    """
    parts: Parts = {}
    for file in artifact.manifest.shards:
        parts |= artifact.shard(file.name).read_all()
    return parts
