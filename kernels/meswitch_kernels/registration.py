"""The one torch.library registration behind the operators, so that torch.compile and export trace them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .bank import BankTensors
from .dispatch import backend_module
from .groups import TokenGroups

#: The bank's fields as arguments, in its order.
_PLAIN = {"bits": "int", "messages": "int[]", "group_size": "int", "scaled": "bool", "planes": "bool"}
_BANK = ", ".join(f"{_PLAIN.get(name, 'Tensor')} {name}" for name in BankTensors._fields)
_BANK_FIELDS = len(BankTensors._fields)


def _unpack_groups(packed: Sequence[Tensor], tile_size: int, slot_of_token: Tensor, slots: int) -> TokenGroups | None:
    if not packed:
        return None
    order, tile_slot, tile_start, tile_count = packed
    return TokenGroups(slot_of_token, order, tile_slot, tile_start, tile_count, tile_size, slots)


def _linear_op(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    bank, (slot_of_token, groups, tile_size, backend) = BankTensors(*rest[:_BANK_FIELDS]), rest[_BANK_FIELDS:]
    unpacked = _unpack_groups(groups, tile_size, slot_of_token, len(bank.slot_bits))
    y: Tensor = backend_module(backend).expert_linear(x, weight, bias, bank, slot_of_token, unpacked)
    return y


def _embedding_op(ids: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    bank, (added_rows, slot_of_token, backend) = BankTensors(*rest[:_BANK_FIELDS]), rest[_BANK_FIELDS:]
    y: Tensor = backend_module(backend).expert_embedding(ids, weight, bank, added_rows, slot_of_token)
    return y


def _added_op(x: Tensor, added_rows: Tensor, added_counts: Tensor, slot_of_token: Tensor, backend: str) -> Tensor:
    y: Tensor = backend_module(backend).added_logits(x, added_rows, added_counts, slot_of_token)
    return y


def _linear_fake(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _embedding_fake(ids: Tensor, weight: Tensor, *_: object) -> Tensor:
    return weight.new_empty(ids.shape[0], weight.shape[1])


def _added_fake(x: Tensor, added_rows: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], added_rows.shape[1])


_OPERATORS = (
    (
        f"expert_linear(Tensor x, Tensor weight, Tensor? bias, {_BANK}, Tensor slot_of_token, Tensor[] groups, "
        "int tile_size",
        _linear_op,
        _linear_fake,
    ),
    (
        f"expert_embedding(Tensor ids, Tensor weight, {_BANK}, Tensor added_rows, Tensor slot_of_token",
        _embedding_op,
        _embedding_fake,
    ),
    ("added_logits(Tensor x, Tensor added_rows, Tensor added_counts, Tensor slot_of_token", _added_op, _added_fake),
)
_library: Any = torch.library.Library("meswitch", "DEF")  # type: ignore[no-untyped-call]
for _arguments, _operator, _fake in _OPERATORS:
    _name = _arguments.partition("(")[0]
    _library.define(f"{_arguments}, str backend) -> Tensor")
    _library.impl(_name, _operator, "CompositeExplicitAutograd")
    torch.library.register_fake(f"meswitch::{_name}", _fake, lib=_library)
