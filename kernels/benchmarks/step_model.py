"""A decode step of Mistral-7B on a card, reckoned from bytes and machine code, beside the goals. Needs no GPU.

    python kernels/benchmarks/step_model.py [--card "NVIDIA H100 80GB HBM3"] [--json]

Decode's inner loops are compiled for sm_90 and counted, as machine_code.py does. Bytes take the share of the card's
bandwidth, and instructions the share of its issue rate, that are written below; nothing is measured on a card.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context

from common import HEAD, MISTRAL_LAYERS, SHAPES, code_number, delta_bytes, table
from machine_code import Loop, launch_of, measure

from meswitch_kernels.cards import DATA_SHEETS

ARCH, TILE_TOKENS, RANK = 90, 8, 16
RATES = (0.25, 1, 2, 4)
EXPERTS = (1, 4, 16)
#: Times the step of the base alone, by bits a weight and experts. There is no other goal.
GOALS = {**{(bits, 1): 1.2 for bits in RATES}, (0.25, 16): 1.5, (1, 16): 2.5, (2, 16): 3.5}
BANDWIDTH_SHARE = 0.85
"""Of the data sheet's, that kernels reach which wait for memory: an estimate, whose lower end was 0.75."""
ISSUE_SHARE = 0.7
"""Of a scheduler's one instruction a cycle."""
HMMA_CYCLES = 6
"""Of a scheduler's tensor core for one m16n8k16 by `mma.sync` on Hopper, from published rates."""
LANES = 32


@dataclass(frozen=True)
class Processors:
    """Streaming multiprocessors of a card, four schedulers each, and their clock in Hz."""

    count: int
    clock: float

    @property
    def cycles(self) -> float:
        """Cycles of schedulers in a second."""
        return 4 * self.count * self.clock


PROCESSORS: Mapping[str, Processors] = {
    "NVIDIA H100 80GB HBM3": Processors(132, 1.755e9),
    "NVIDIA H200": Processors(132, 1.755e9),
}


@dataclass(frozen=True)
class Step:
    """One step, in milliseconds; each expert has one tile of tokens."""

    bits: float
    experts: int
    gigabytes: float
    floor: float
    """Every byte once at the data sheet's full bandwidth."""
    by_bytes: float
    by_instructions: float
    """Of the deltas alone, as the next two."""
    by_tensor_cores: float
    by_shared_memory: float
    base: float
    goal: float | None

    @property
    def unpacking(self) -> float:
        """Of the deltas, whatever their bytes take."""
        return max(self.by_instructions, self.by_tensor_cores, self.by_shared_memory)

    @property
    def together(self) -> float:
        """Where programs that wait for memory and those that unpack run side by side."""
        return max(self.by_bytes, self.unpacking)

    @property
    def in_turn(self) -> float:
        """Where they do not: the base by its bytes, then the deltas by what bounds them."""
        return self.base + max(self.by_bytes - self.base, self.unpacking)

    @property
    def verdict(self) -> str:
        """Whether the goal is met by this reckoning."""
        if self.goal is None:
            return ""
        met = [time / self.base <= self.goal for time in (self.together, self.in_turn)]
        return {(True, True): "yes", (True, False): "if they overlap", (False, False): "**no**"}[met[0], met[1]]


def weights() -> int:
    """Weights that a step multiplies: linears of all layers, and the head."""
    return MISTRAL_LAYERS * sum(count * out * width for count, out, width in layer_shapes()) + HEAD[0] * HEAD[1]


def layer_shapes() -> Iterator[tuple[int, int, int]]:
    """How many linears of a layer have a shape, and their (out, in)."""
    for names, (out, width) in SHAPES["Mistral-7B"].items():
        yield len(names.split(", ")), out, width


def expert_bytes(bits: float) -> int:
    """What a step reads of one expert as `meswitch compress` makes it: rank 16, the head at 2 bits at least, or 1."""
    head_bits = 1 if bits < 1 else max(2, bits)
    layer = sum(count * delta_bytes(width, out, bits, rank=RANK) for count, out, width in layer_shapes())
    return MISTRAL_LAYERS * layer + delta_bytes(HEAD[1], HEAD[0], head_bits, rank=RANK)


def step(card: str, loop: Loop, bits: float, experts: int) -> Step:
    """A step on a card, by the loop that unpacks and multiplies codes of so many bits."""
    memory, processors = DATA_SHEETS[card].memory, PROCESSORS[card]
    base_bytes, delta_bytes_ = 2 * weights(), experts * expert_bytes(bits)
    # A warp's instruction serves a weight of each lane.
    unpacked = experts * weights() / LANES
    return Step(
        bits,
        experts,
        gigabytes=(base_bytes + delta_bytes_) / 1e9,
        floor=1e3 * (base_bytes + delta_bytes_) / memory,
        by_bytes=1e3 * (base_bytes + delta_bytes_) / (memory * BANDWIDTH_SHARE),
        by_instructions=1e3 * unpacked * loop.instructions / loop.weights / (processors.cycles * ISSUE_SHARE),
        by_tensor_cores=1e3 * unpacked * loop.tensor / loop.weights * HMMA_CYCLES / processors.cycles,
        by_shared_memory=1e3 * unpacked * loop.shared_cycles / loop.weights / (processors.count * processors.clock),
        base=1e3 * base_bytes / (memory * BANDWIDTH_SHARE),
        goal=GOALS.get((bits, experts)),
    )


def rows(steps: list[Step]) -> Iterator[list[str]]:
    for one in steps:
        times = [f"{ms:.1f} ({ms / one.base:.2f})" for ms in (one.by_bytes, one.together, one.in_turn)]
        yield [
            f"{one.bits:g}", str(one.experts), f"{one.gigabytes:.1f}", f"{one.floor:.1f}", times[0],
            f"{one.by_instructions:.1f}", f"{one.by_tensor_cores:.1f}", f"{one.by_shared_memory:.1f}", *times[1:],
            f"{one.goal:g}" if one.goal else "", one.verdict,
        ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--card", default="NVIDIA H100 80GB HBM3", choices=PROCESSORS)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--jobs", type=int, help="processes that compile; as many as processors without it")
    options = parser.parse_args()
    launches = [launch_of(ARCH, "bf16", code_number(bits), TILE_TOKENS) for bits in RATES]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        loops = dict(zip(RATES, pool.map(measure, launches), strict=True))
    steps = [step(options.card, loops[bits], bits, experts) for bits in RATES for experts in EXPERTS]
    if options.json:
        print(json.dumps([asdict(one) for one in steps]))
        return 0
    print(f"{options.card}; the base alone {steps[0].base:.2f} ms\n")
    header = (
        "bits, experts, GB, floor ms, by bytes, deltas by instructions, by tensor cores, by shared memory, "
        "side by side, in turn"
    )
    print(table([*header.split(", "), "goal", "met"], list(rows(steps))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
