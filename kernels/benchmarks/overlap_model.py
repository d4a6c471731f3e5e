"""How far programs of base and deltas overlap on a card, by the order in which a launch starts them. Needs no GPU.

    python kernels/benchmarks/overlap_model.py [--json]

A launch's programs are started in their order wherever a processor has room, and share its issue rate and the card's
bandwidth: each advances at the slower of the two. Everything else is as in step_model.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from common import HEAD, MISTRAL_LAYERS, SHAPES, code_number, delta_bytes, table
from machine_code import launch_of, measure
from numpy.typing import NDArray
from step_model import ARCH, BANDWIDTH_SHARE, ISSUE_SHARE, LANES, PROCESSORS, RANK, TILE_TOKENS

from meswitch_kernels.cards import DATA_SHEETS
from meswitch_kernels.tuning import Card, default_settings

CARD = "NVIDIA H100 80GB HBM3"
RATES = (0.25, 1, 2)
EXPERTS = (1, 4, 16)
TOKENS = 16
RESIDENT = 4
"""Programs of two warps and 255 registers a thread that fit a processor's 65,536 registers."""
BASE_INSTRUCTIONS = 110 / 64
"""For a weight of the base: the loop of 16 tokens over 64 x 64 weights, two warps, sm_90."""
SCHEDULERS, WARPS = 4, 2
LAUNCHES = (("q, o", "k, v", "k, v"), ("q, o",), ("gate, up", "gate, up"), ("down",))
"""Of a layer, each with its linears."""

Programs = NDArray[np.float64]
"""`[programs, 2]`: bytes and instructions of a warp of each, in the order in which they start."""


@dataclass(frozen=True)
class Rates:
    """Of a card: bytes a second of all, instructions a second of a processor and of one of its programs."""

    bandwidth: float
    issue: float
    of_program: float
    processors: int


def programs(out: int, width: int, bits: float, experts: int, instructions: float, rows_first: bool) -> Programs:
    """One linear's: `rows_first`, of all blocks of rows for the base before any for the deltas, else block by block."""
    settings = default_settings(out, width, TOKENS, Card(CARD, PROCESSORS[CARD].count, True))
    blocks = -(-out // settings.block_out)
    weights = settings.block_out * width
    base = [2 * weights / settings.splits, BASE_INSTRUCTIONS * weights / LANES / settings.splits]
    share = delta_bytes(width, out, bits, rank=RANK) / blocks / settings.delta_splits
    delta = [share, instructions * weights / LANES / settings.delta_splits]
    own = np.array([base] * settings.splits + [delta] * (min(experts, settings.delta_programs) * settings.delta_splits))
    own[settings.splits :] *= max(1, experts / settings.delta_programs)
    repeated: Programs = np.repeat(own, blocks, 0) if rows_first else np.tile(own, (blocks, 1))
    return repeated


def seconds(work: Programs, rates: Rates) -> float:
    """Until the last program of a launch has ended."""
    slots = rates.processors * RESIDENT
    following, now = 0, 0.0
    whole, part = np.ones((slots, 2)), np.zeros(slots)  # of each slot's program, all, and which part of it is left
    while True:
        # Slot i is of processor i % processors: neighbours start side by side.
        free = np.flatnonzero(part <= 0)[: len(work) - following]
        whole[free], part[free] = work[following : following + len(free)], 1.0
        following += len(free)
        running = part > 0
        if not running.any():
            return now
        speed = _speeds(whole, running, rates)
        took = (part[running] / speed[running]).min()
        part[running] -= took * speed[running]
        part[part < 1e-9] = 0.0
        now += took


def _speeds(work: Programs, running: NDArray[np.bool_], rates: Rates) -> NDArray[np.float64]:
    """Programs a second of each slot: memory and issue are shared fairly, and what one cannot use goes to others."""
    nbytes, count = work[:, 0], work[:, 1]
    asked = np.where(running, rates.of_program / count, 0.0)
    for _ in range(3):
        issued = _fair((asked * count).reshape(-1, rates.processors), rates.issue).reshape(-1) / count
        read = _fair((issued * nbytes).reshape(-1, 1), rates.bandwidth).reshape(-1) / nbytes
        asked = np.where(read < 0.999 * issued, read, asked)
    return np.where(running, np.minimum(read, issued), 1.0)


def _fair(wanted: NDArray[np.float64], most: float) -> NDArray[np.float64]:
    """What each of a column gets of `most`: all that it wants, or the same as the others that want more."""
    given = np.sort(wanted, 0)
    before = np.cumsum(given, 0) - given
    others = np.arange(len(given), 0, -1)[:, None]
    short = before + given * others > most
    level = np.where(short, (most - before) / others, -np.inf).max(0)
    result: NDArray[np.float64] = np.where(short.any(0), np.minimum(wanted, level), wanted)
    return result


def step_seconds(bits: float, experts: int, instructions: float, rates: Rates, rows_first: bool) -> float:
    """Linears of all layers, and the head at 1 bit, or 2."""
    shapes = SHAPES["Mistral-7B"]

    def launch(linears: Sequence[tuple[int, int]], rate: float) -> float:
        each = [programs(*linear, rate, experts, instructions, rows_first) for linear in linears]
        return seconds(np.concatenate(each), rates)

    layer = sum(launch([shapes[name] for name in names], bits) for names in LAUNCHES)
    return MISTRAL_LAYERS * layer + launch([HEAD], 1 if bits < 1 else max(2, bits))


def table_rows(figures: list[dict[str, float]]) -> Iterator[list[str]]:
    for row in figures:
        times = [f"{row[name]:.1f} ({row[name] / row['base']:.2f})" for name in ("rows_first", "block_by_block")]
        yield [f"{row['bits']:g}", f"{row['experts']:g}", *times]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    processors = PROCESSORS[CARD]
    issue = ISSUE_SHARE * SCHEDULERS * processors.clock
    rates = Rates(DATA_SHEETS[CARD].memory * BANDWIDTH_SHARE, issue, issue * WARPS / SCHEDULERS, processors.count)
    base = step_seconds(1, 0, 1.0, rates, True)
    figures = []
    for bits in RATES:
        loop = measure(launch_of(ARCH, "bf16", code_number(bits), TILE_TOKENS))
        for experts in EXPERTS:
            found = {
                name: 1e3 * step_seconds(bits, experts, loop.instructions / loop.weights, rates, rows_first)
                for name, rows_first in (("rows_first", True), ("block_by_block", False))
            }
            figures.append({"bits": bits, "experts": experts, "base": 1e3 * base, **found})
    if options.json:
        print(json.dumps(figures))
        return 0
    print(f"{CARD}; the base alone {1e3 * base:.2f} ms\n")
    print(table(["bits", "experts", "the base first, ms", "block by block of rows, ms"], list(table_rows(figures))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
