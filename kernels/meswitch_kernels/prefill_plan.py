"""How the tokens of a step that reads prompts are shared between kernels, where the host knows their slots."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .groups import TokenGroups, group_tokens

PREFILL_TOKENS = 128
"""Fewer tokens go through the decode kernel as they are, unless one slot has enough to be merged."""
BASE_TOKENS = 64
"""Tokens of the base from which its weights are multiplied alone: they need no merging."""
DECODE_TOKENS = 256
"""Tokens that go through the decode kernel together, if no slot has more: its partial sums take memory by the token."""

Run = tuple[int, int]
"""A slot, and how many neighbouring tokens have it."""
Rows = slice | Tensor
"""Tokens as an index: a slice where they are neighbours, so that nothing is copied; else int64 on the device."""


@dataclass(frozen=True)
class Part:
    """Tokens that go through the decode kernel together; `groups` counts them from the first of these."""

    rows: Rows
    groups: TokenGroups


@dataclass(frozen=True)
class PrefillPlan:
    """`merged`: slots whose weights are merged, or the base, each with all its tokens; `parts`: all other tokens."""

    merged: tuple[tuple[int, Rows], ...]
    parts: tuple[Part, ...]


def plan_prefill(groups: TokenGroups, runs: Sequence[Run], merge_tokens: int) -> PrefillPlan | None:
    """The plan of a step whose tokens are `runs`, in order; None where they are few enough for the decode kernel.

    A slot with `merge_tokens` tokens and more is merged. All others go through the decode kernel, so that none pays for
    a merge or a tile of many tokens because another's prompt is read.

    Raises:
        ValueError: `runs` are not the tokens of `groups`.
        IndexError: a slot is outside [-1, slots).
    """
    tokens, spans = 0, dict[int, list[range]]()
    for slot, length in runs:
        if not -1 <= slot < groups.slots:
            raise IndexError(f"runs hold slot {slot}; the slots are -1 (base) to {groups.slots - 1}")
        if length:
            spans.setdefault(slot, []).append(range(tokens, tokens + length))
        tokens += length
    if tokens != groups.slot_of_token.shape[0]:
        raise ValueError(f"runs have {tokens} tokens, the groups {groups.slot_of_token.shape[0]}")
    if tokens < min(merge_tokens, PREFILL_TOKENS):
        return None
    counts = {slot: sum(map(len, spans[slot])) for slot in sorted(spans)}
    merged = [slot for slot, count in counts.items() if count >= (BASE_TOKENS if slot < 0 else merge_tokens)]
    starts, place = dict[int, int](), 0
    for slot, count in counts.items():
        starts[slot], place = place, place + count

    def rows_of(slots: Sequence[int]) -> Rows:
        if whole := _joined(span for slot in slots for span in spans[slot]):
            return slice(whole.start, whole.stop)
        places = [groups.order[starts[slot] : starts[slot] + counts[slot]] for slot in slots]
        return (torch.cat(places) if len(places) > 1 else places[0]).long()

    def part(slots: Sequence[int]) -> Part:
        rows = rows_of(slots)
        return Part(rows, group_tokens(groups.slot_of_token[rows], groups.slots))

    few: list[list[int]] = []
    held = DECODE_TOKENS
    for slot in counts:
        if slot not in merged:
            if held + counts[slot] > DECODE_TOKENS:
                few.append([])
                held = 0
            few[-1].append(slot)
            held += counts[slot]
    parts = tuple(part(slots) for slots in few)
    return PrefillPlan(tuple((slot, rows_of([slot])) for slot in merged), parts)


def plan_unknown(groups: TokenGroups) -> PrefillPlan | None:
    """The plan of a step whose slots the host does not know, as a captured graph's; None where it needs none.

    Nothing is merged, and the tokens go through the decode kernel in their order, so many at once.
    """
    tokens = groups.slot_of_token.shape[0]
    if tokens <= DECODE_TOKENS:
        return None
    spans = [slice(first, min(first + DECODE_TOKENS, tokens)) for first in range(0, tokens, DECODE_TOKENS)]
    return PrefillPlan((), tuple(Part(span, group_tokens(groups.slot_of_token[span], groups.slots)) for span in spans))


def _joined(spans: Iterable[range]) -> range | None:
    """The spans as one, where they follow one another in some order."""
    ordered = sorted(spans, key=lambda span: span.start)
    together = all(span.stop == following.start for span, following in itertools.pairwise(ordered))
    return range(ordered[0].start, ordered[-1].stop) if together else None
