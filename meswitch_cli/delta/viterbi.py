"""The search for a row's best message, in PyTorch: all rows of a block at once, on any device.

The slow twin of `viterbi_cpu`, whose messages are the same: see there for the algorithm's own words.
"""

from __future__ import annotations

import torch

from meswitch_cli.delta.codes import WORD_BITS, TrellisCode
from meswitch_cli.delta.trellis import Branches


def best_messages(
    values: torch.Tensor, costs: torch.Tensor, code: TrellisCode, found: Branches, seam: int
) -> torch.Tensor:
    """The messages `[rows, words]` int32 that win most.

    Args:
        values: int16 `[rows, channels]`, filled up to whole words.
        costs: int16 `[channels]`, what an outer level costs beside its product.
        seam: steps on either side of the row's ends that decide the state in which it begins and ends.
    """
    values, costs = (_by_step(item.to(torch.int32), code) for item in (values, costs))
    rows, steps, _ = values.shape
    labels = found.labels.to(values.device)
    around = [step % steps for step in range(steps - seam, steps + seam)]
    none = torch.zeros(rows, code.states, dtype=torch.int32, device=values.device)
    metrics, taken = _survivors(none, around, values, costs, code, labels)
    state = _traced(_best(metrics), taken[seam:], code)[0]
    start = torch.full_like(none, -found.handicap).scatter_(1, state[:, None], 0)
    _, taken = _survivors(start, list(range(steps)), values, costs, code, labels)
    _, bits = _traced(state, taken, code)
    shifts = torch.arange(WORD_BITS, device=values.device)
    return (bits.view(rows, -1, WORD_BITS) << shifts).sum(-1).to(torch.int32)


def _by_step(row: torch.Tensor, code: TrellisCode) -> torch.Tensor:
    """`[..., channels]` as `[..., steps, channels_a_bit]`: with each bit of a word the channels that it stands for."""
    words = row.view(*row.shape[:-1], -1, code.channels_a_bit, WORD_BITS)
    return words.transpose(-1, -2).reshape(*row.shape[:-1], -1, code.channels_a_bit)


def _survivors(
    metrics: torch.Tensor,
    path: list[int],
    values: torch.Tensor,
    costs: torch.Tensor,
    code: TrellisCode,
    labels: torch.Tensor,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The metrics `[rows, states]` at the end of some steps, and which predecessor every state took in each of them,
    8 states a byte, `[rows, states / 8]`."""
    rows, half = len(values), code.states // 2
    places = 1 << torch.arange(8, dtype=torch.uint8, device=values.device)
    taken = []
    for step in path:
        won = _label_table(values[:, step], costs[step], code)
        low = metrics[:, :half, None] + won[:, labels[..., 0]]
        high = metrics[:, half:, None] + won[:, labels[..., 1]]
        metrics = torch.maximum(low, high).flatten(1)
        chosen = (low < high).view(rows, -1, 8)
        taken.append((chosen * places).sum(-1, dtype=torch.uint8))
    return metrics, taken


def _label_table(values: torch.Tensor, costs: torch.Tensor, code: TrellisCode) -> torch.Tensor:
    """What each label of a step wins, `[rows, labels]`."""
    table = torch.zeros(len(values), 1, dtype=torch.int32, device=values.device)
    for value, cost in zip(values.unbind(1), costs.unbind(0), strict=True):
        own = value[:, None]
        levels = (-own, own) if code.width == 1 else (-3 * own - cost, -own, own, 3 * own - cost)
        table = torch.cat([table + level for level in levels], dim=1)
    return table


def _best(metrics: torch.Tensor) -> torch.Tensor:
    """The state `[rows]` with the largest metric, the first of several."""
    states = metrics.shape[1]
    order = torch.arange(states - 1, -1, -1, device=metrics.device)
    return states - 1 - (metrics.long() * states + order).amax(1) % states


def _traced(state: torch.Tensor, taken: list[torch.Tensor], code: TrellisCode) -> tuple[torch.Tensor, torch.Tensor]:
    """Follow the survivor that ends in `state` `[rows]` back: where it came from, and its bits `[rows, steps]`."""
    bits = []
    for step in reversed(taken):
        bits.append(state & 1)
        byte = step.gather(1, state[:, None] >> 3)[:, 0].long()
        state = (state >> 1) | ((byte >> (state & 7) & 1) * (code.states // 2))
    return state, torch.stack(bits[::-1], dim=1)
