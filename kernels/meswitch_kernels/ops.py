"""The public operators: a call is checked, a backend chosen, and the backend called.

They are for users of the package, its tests and benchmarks, and for a model that torch.compile traces, as vLLM's
compiled mode does: there a call goes through `torch.ops.meswitch`, which `registration` defines with fake
implementations. The engines, which run eagerly, call the backends themselves: they have checked the slots once a step,
and checks and dispatcher would cost as much as a small layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import registration  # noqa: F401 (defines torch.ops.meswitch)
from .bank import ExpertBank
from .dispatch import backend_module, checked_backend, default_backend
from .groups import TokenGroups, check_slot_tensor


def expert_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bank: ExpertBank,
    slot_of_token: Tensor,
    groups: TokenGroups | None = None,
    backend: str | None = None,
) -> Tensor:
    """y = x·Wᵀ + bias with the delta of each token's slot added to W; float32 accumulation. Inference only.

    `x` `[tokens, in]`, `weight` `[out, in]` and `bias` `[out]` share a dtype (float32, bfloat16, float16;
    float64 in the naive backend) and a device with `bank`; `slot_of_token` int32 `[tokens]`, -1 for the base.
    `groups`, from `group_tokens(slot_of_token, bank.slots)`, saves grouping the tokens again in every layer.
    Raises ValueError, TypeError or IndexError for a bad call before any kernel runs. On the CPU a slot that
    is empty or outside the bank is such an error; on another device its tokens come out as NaN.
    """
    _check_call(x, bank, slot_of_token)
    if tuple(weight.shape) != (bank.out_features, bank.in_features):
        raise ValueError(f"weight is {tuple(weight.shape)}; the bank is for {(bank.out_features, bank.in_features)}")
    _check_matches(x, weight, "weight")
    if bias is not None:
        if tuple(bias.shape) != (bank.out_features,):
            raise ValueError(f"bias is {tuple(bias.shape)}; expected ({bank.out_features},)")
        _check_matches(x, bias, "bias")
    if groups is not None:
        _check_groups(groups, len(x), bank.slots)
    name = _choose(backend, x)
    if torch.compiler.is_compiling():
        packed, tile_size = _pack_groups(groups)
        result: Tensor = torch.ops.meswitch.expert_linear(
            x, weight, bias, *bank.tensors, slot_of_token, packed, tile_size, name
        )
        return result
    bank.check_slots(slot_of_token)
    y: Tensor = backend_module(name).expert_linear(x, weight, bias, bank.tensors, slot_of_token, groups)
    return y


def expert_embedding(
    ids: Tensor, weight: Tensor, bank: ExpertBank, slot_of_token: Tensor, backend: str | None = None
) -> Tensor:
    """Embedding rows `[tokens, hidden]`: row `ids[t]` of `weight` plus the delta row of token t's slot.

    `ids` int32 or int64 `[tokens]`; `weight` `[vocab, hidden]`; `bank` has out = vocab, in = hidden. Ids from
    `vocab` on are rows the expert added. Raises as `expert_linear` does, IndexError for an id outside the
    vocabulary of its token's slot.
    """
    if ids.ndim != 1 or ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ids are {ids.dtype} {tuple(ids.shape)}; expected int32 or int64 [tokens]")
    _check_slot_count(slot_of_token, len(ids), ids.device)
    if tuple(weight.shape) != (bank.out_features, bank.in_features):
        raise ValueError(f"weight is {tuple(weight.shape)}; the bank is for {(bank.out_features, bank.in_features)}")
    if weight.device != bank.device or ids.device != bank.device:
        raise ValueError(f"ids are on {ids.device}, weight on {weight.device}, the bank on {bank.device}")
    name = _choose(backend, weight)
    if torch.compiler.is_compiling():
        result: Tensor = torch.ops.meswitch.expert_embedding(
            ids, weight, *bank.tensors, bank.added_rows, slot_of_token, name
        )
        return result
    bank.check_slots(slot_of_token)
    _check_ids(ids, bank, slot_of_token)
    y: Tensor = backend_module(name).expert_embedding(ids, weight, bank.tensors, bank.added_rows, slot_of_token)
    return y


def expert_head(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bank: ExpertBank,
    slot_of_token: Tensor,
    groups: TokenGroups | None = None,
    backend: str | None = None,
) -> Tensor:
    """Logits `[tokens, vocab + bank.capacity.added_rows]`: `expert_linear`, then the slot's added vocabulary rows.

    A logit is -inf where the token's slot has no such row, so that it is never sampled.
    """
    logits = expert_linear(x, weight, bias, bank, slot_of_token, groups, backend)
    if not bank.capacity.added_rows:
        return logits
    name = _choose(backend, x)
    if torch.compiler.is_compiling():
        added: Tensor = torch.ops.meswitch.added_logits(x, bank.added_rows, bank.added_counts, slot_of_token, name)
    else:
        added = backend_module(name).added_logits(x, bank.added_rows, bank.added_counts, slot_of_token)
    return torch.cat([logits, added], 1)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _resolve(backend: str | None, device_type: str) -> str:
    return checked_backend(backend, device_type) if backend else default_backend(device_type)


def _choose(backend: str | None, x: Tensor) -> str:
    name: str = _resolve(backend, x.device.type)
    if name != "naive" and (x.dtype == torch.float64 or (name == "cpu" and x.dtype == torch.float16)):
        if backend:
            raise TypeError(f"the {name} backend does not take {x.dtype}; the naive one does")
        return "naive"
    return name


def _check_call(x: Tensor, bank: ExpertBank, slot_of_token: Tensor) -> None:
    if x.ndim != 2 or x.shape[1] != bank.in_features:
        raise ValueError(f"x is {tuple(x.shape)}; expected [tokens, in_features] with in_features {bank.in_features}")
    if not x.is_floating_point():
        raise TypeError(f"x is {x.dtype}; expected a floating-point dtype")
    if x.device != bank.device:
        raise ValueError(f"x is on {x.device}, the bank on {bank.device}")
    _check_slot_count(slot_of_token, x.shape[0], x.device)


def _check_slot_count(slot_of_token: Tensor, tokens: int, device: torch.device) -> None:
    check_slot_tensor(slot_of_token)
    if slot_of_token.shape[0] != tokens:
        raise ValueError(f"slot_of_token has {slot_of_token.shape[0]} entries for {tokens} tokens")
    if slot_of_token.device != device:
        raise ValueError(f"slot_of_token is on {slot_of_token.device}, the tokens on {device}")


def _check_matches(x: Tensor, other: Tensor, name: str) -> None:
    if other.dtype != x.dtype:
        raise TypeError(f"{name} is {other.dtype} but x is {x.dtype}")
    if other.device != x.device:
        raise ValueError(f"{name} is on {other.device} but x on {x.device}")


def _check_groups(groups: TokenGroups, tokens: int, slots: int) -> None:
    if groups.slot_of_token.shape[0] != tokens:
        raise ValueError(f"groups were made for {groups.slot_of_token.shape[0]} tokens, x has {tokens}")
    if groups.slots != slots:
        raise ValueError(f"groups were made for {groups.slots} slots, the bank has {slots}")


def _check_ids(ids: Tensor, bank: ExpertBank, slot_of_token: Tensor) -> None:
    if ids.device.type != "cpu" or not len(ids):
        return
    limit = torch.full_like(ids, bank.out_features)
    own = slot_of_token >= 0
    limit[own] += bank.added_counts[slot_of_token[own].long()].to(ids.dtype)
    bad = (ids < 0) | (ids >= limit)
    if bad.any():
        token = int(bad.nonzero()[0])
        raise IndexError(f"id {int(ids[token])} of token {token} is outside [0, {int(limit[token])})")


def _pack_groups(groups: TokenGroups | None) -> tuple[list[Tensor], int]:
    if groups is None:
        return [], 0
    return [groups.order, groups.tile_slot, groups.tile_start, groups.tile_count], groups.tile_size
