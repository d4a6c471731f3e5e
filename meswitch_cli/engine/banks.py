"""Every expert's deltas, slot by slot, for every layer that some expert changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from meswitch_cli.artifact.manifest import Manifest
from meswitch_cli.delta.stored import StoredDelta
from meswitch_cli.engine.bank_layout import Layers, Layout, known_message
from meswitch_cli.engine.base_model import effective_gain
from meswitch_kernels import Capacity, ExpertBank, ExpertDelta, GainBank

#: What is stored of an expert, by parameter name.
Stored = Mapping[str, StoredDelta]


class Banks:
    """The banks of a layout, with `slots` places each, put into the base's layers.

    Attributes:
        nbytes: of device memory, whatever is loaded.
    """

    def __init__(self, base: Layers, layout: Layout, slots: int) -> None:
        self.base, self.layout, self.slots = base, layout, slots
        self.banks = {name: self._bank(name, capacity) for name, capacity in layout.capacities.items()}
        self.added_bias: Tensor | None = None
        head = layout.capacities.get(base.head_name)
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
        #: `[slots + 1, ...]`, the base's first.
        self.tables = {
            name: torch.stack([self._base_value(name)] * (slots + 1)).contiguous()
            for name in (sorted(layout.whole) if base.own_parameters is None else ())
        }

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
        for name, router in base.routers.items():
            leaves = (leaf for leaf, _ in router.base.named_parameters())
            router.tables = {leaf: self.tables[full] for leaf in leaves if (full := f"{name}.{leaf}") in self.tables}

    @property
    def nbytes(self) -> int:
        gains = (*self.gains.values(), *self.shifts.values())
        tables = [*self.tables.values(), *([] if self.added_bias is None else [self.added_bias])]
        own = self.base.own_parameters
        nbytes = sum(bank.nbytes for bank in self.banks.values()) + (own.nbytes if own is not None else 0)
        return nbytes + sum(item.nbytes for item in gains) + sum(table.nbytes for table in tables)

    @property
    def slot_nbytes(self) -> int:
        return self.nbytes // self.slots

    def load(self, slot: int, manifest: Manifest, stored: Stored) -> int:
        """Put an expert into a slot that no token uses; return the bytes copied."""
        return self._load(slot, stored, ties_head=f"{self.base.head_name}.weight" not in manifest.unchanged)

    def load_base(self, slot: int) -> int:
        """Put an expert that changes nothing into a slot; return the bytes copied."""
        return self._load(slot, {}, ties_head=False)

    def _load(self, slot: int, stored: Stored, *, ties_head: bool) -> int:
        moved = 0
        if self.added_bias is not None:
            self.added_bias[slot + 1] = 0
        for name, bank in self.banks.items():
            weight = stored.get(f"{name}.weight")
            if name == self.base.head_name and weight is None and ties_head:
                weight = stored.get(f"{self.base.embedding_name}.weight")
            bias = _value(stored, f"{name}.bias")
            if bias is not None and self.added_bias is not None and name == self.base.head_name:
                added = bias[bank.out_features :]
                self.added_bias[slot + 1, : added.shape[0]] = added
            bank.load(slot, self._delta(name, weight or StoredDelta(), bias))
            moved += sum(item.nbytes for item in (weight, bias) if item is not None)
        for name, gains in self.gains.items():
            norm = self.base.norms[name]
            value = _value(stored, f"{name}.weight", norm.base.weight)
            gains.load(slot, effective_gain(norm, value.to(gains.table.device)).to(gains.table.dtype))
            moved += gains.table[0].nbytes
        for name, shifts in self.shifts.items():
            shift = _value(stored, f"{name}.bias", self.base.norms[name].base.bias)
            shifts.load(slot, shift.to(shifts.table.dtype))
            moved += shifts.table[0].nbytes
        for name, table in self.tables.items():
            table[slot + 1] = _value(stored, name, table[0])
            moved += table[0].nbytes
        if self.base.own_parameters is not None:
            moved += self.base.own_parameters.load(slot, stored)
        if self.base.device.type == "cuda":
            torch.cuda.current_stream(self.base.device).synchronize()
        return moved

    def clear(self, slot: int) -> None:
        for bank in self.banks.values():
            bank.clear(slot)
        for gains in (*self.gains.values(), *self.shifts.values()):
            gains.clear(slot)
        for table in self.tables.values():
            table[slot + 1] = table[0]
        if self.base.own_parameters is not None:
            self.base.own_parameters.clear(slot)

    def _base_value(self, name: str) -> Tensor:
        """The base's own value of a parameter of which slots hold copies."""
        router = next(router for router in self.base.routers if name.startswith(f"{router}."))
        value: Tensor = self.base.routers[router].base.get_parameter(name.removeprefix(f"{router}."))
        return value.detach()

    def _bank(self, name: str, capacity: Capacity) -> ExpertBank:
        out_features, in_features = self.base.layer(name).weight.shape
        return ExpertBank(self.slots, in_features, out_features, capacity, self.base.dtype, self.base.device)

    def _delta(self, name: str, weight: StoredDelta, bias: Tensor | None) -> ExpertDelta:
        """What a layer's bank is given of an expert."""
        layer = self.base.layer(name)
        messages = self.banks[name].capacity.messages
        delta = expert_delta(weight, layer.weight.shape, self.base.device, messages)
        return delta if bias is None else replace(delta, bias_delta=bias_delta(bias, layer.bias))


def expert_delta(
    weight: StoredDelta, shape: Sequence[int], device: torch.device, messages: Sequence[int] = ()
) -> ExpertDelta:
    """A stored delta of a weight `[out, in]`, as kernels take it; factors are decoded on `device`.

    So are trellis codes, but for those whose numbers are in `messages`.
    """
    out_features, in_features = shape
    left, right = weight.factors(device) or (None, None)
    left = None if left is None else _resized(left, out_features)
    if not weight.bits:  # equal to the base's, apart from a low-rank part or added rows
        delta = ExpertDelta.of_nothing(in_features, out_features)
        return replace(delta, added_rows=weight.added_rows, left=left, right=right)
    message = known_message(weight.trellis)
    if message and message.number not in messages:
        message = None
    if message is None:
        weight = weight.scalar(device)
    codes, steps = weight.coded
    return ExpertDelta(
        bits=message.width if message else int(weight.bits),
        message=message.channels_a_bit if message else 0,
        # Where the expert's vocabulary is shorter, the sampler refuses the rows that follow.
        codes=_resized(codes, out_features),
        steps=_resized(steps, out_features),
        group_size=weight.group_size if steps.shape[1] > 1 else 0,
        salient_index=weight.salient_index,
        salient_value=None if weight.salient_value is None else _resized(weight.salient_value, out_features),
        channel_scale=weight.channel_scale,
        added_rows=weight.added_rows,
        left=left,
        right=right,
    )


def bias_delta(bias: Tensor, own: Tensor) -> Tensor:
    """What an expert's bias adds to the base's `own` `[out]`, in fp32."""
    return _resized(bias, own.shape[0]).float() - own.float().to(bias.device)


def _value(stored: Stored, name: str, otherwise: Any = None) -> Any:
    """A parameter that is stored whole, or what there is in its place."""
    found = stored.get(name)
    return otherwise if found is None else found.value


def _resized(tensor: Tensor, rows: int) -> Tensor:
    """The first rows, or zeros after the last."""
    missing = rows - tensor.shape[0]
    return tensor[:rows] if missing <= 0 else torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])
