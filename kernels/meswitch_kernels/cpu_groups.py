"""Tokens by slot as the CPU kernels take them: made once per step, read by every layer."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PREFILL_TOKENS = 16
"""Tokens of one slot from which merging W + Δ̂ for BLAS pays; see docs/results/kernels-cpu.md."""

Rows = slice | Tensor
"""Tokens as an index: a slice where they are neighbours, so that nothing is copied."""


@dataclass(frozen=True)
class Few:
    """Tokens of slots that have few of them, as the decode kernel reads them.

    `numbers` int32: `tokens` places in the batch, group by group; then each one's slot; then each group's slot,
    first token and number of tokens.
    """

    numbers: array[int]
    tokens: int
    groups: int


@dataclass(frozen=True)
class CpuGroups:
    """The slots of a batch, those with many tokens apart from those with few."""

    slots: tuple[int, ...]
    many: tuple[tuple[int, Rows], ...]
    few: Few | None


def group_tokens(
    slot_of_token: Tensor,
    slots: int | None = None,
    runs: Sequence[tuple[int, int]] | None = None,
    *,
    left_out: Collection[int] = (),
) -> CpuGroups:
    """Group `slot_of_token` (int32 `[tokens]`, -1 for the base), less the tokens of some slots.

    How many slots there are, and the `runs` that the Triton backend plans prefill by, do not matter here.
    """
    tokens_of: dict[int, list[int]] = {}
    for token, slot in enumerate(slot_of_token.tolist()):
        if slot not in left_out:
            tokens_of.setdefault(slot, []).append(token)
    many = tuple((slot, _rows(tokens)) for slot, tokens in tokens_of.items() if len(tokens) >= PREFILL_TOKENS)
    few = [(slot, tokens) for slot, tokens in tokens_of.items() if len(tokens) < PREFILL_TOKENS]
    return CpuGroups(tuple(tokens_of), many, _few(few) if few else None)


def _few(tokens_of_slot: Sequence[tuple[int, list[int]]]) -> Few:
    order: list[int] = []
    slots: list[int] = []
    table: list[int] = []
    for slot, tokens in tokens_of_slot:
        table += (slot, len(order), len(tokens))
        order += tokens
        slots += [slot] * len(tokens)
    return Few(array("i", order + slots + table), len(order), len(tokens_of_slot))


def _rows(tokens: list[int]) -> Rows:
    if tokens[-1] - tokens[0] + 1 == len(tokens):
        return slice(tokens[0], tokens[-1] + 1)
    return torch.tensor(tokens)
