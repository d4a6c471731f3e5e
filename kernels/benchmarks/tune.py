"""Measure launch settings on this card, and from how many tokens on merging pays, for `tuning.json`.

    python kernels/benchmarks/tune.py [--out FILE] [--jobs 12] [--seconds 420] [--only decode]

Candidates vary the default settings of a shape, one or two members at a time. Those of all shapes are compiled first,
in processes side by side, into Triton's cache; then each is timed from a CUDA graph over weights and banks too many for
the card's own cache. Each entry names the fastest; a candidate that the card refuses, or whose product is wrong, is
passed over. FILE, by default the package's tuning.json, is written after every entry, with what it held of other cards.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from itertools import combinations, product
from multiprocessing import get_context
from pathlib import Path

import torch
from common import SHAPES, TUNING, graph_seconds, load_experts, rotating, say, write_tuning
from torch import Tensor

from meswitch_kernels import Capacity, ExpertBank, expert_linear, group_tokens, triton_launch
from meswitch_kernels.groups import TokenGroups
from meswitch_kernels.prefill_plan import plan_prefill
from meswitch_kernels.testing import ERROR_BOUND, relative_error
from meswitch_kernels.tuning import LaunchSettings, card_of, default_settings, settings_key

SLOTS = 16
FORMAT = (2, 0)
"""Bits and rank of the experts that settings are tuned on."""
LAYERS = sorted(set(SHAPES["Mistral-7B"].values()))
BATCHES = (16, 64)
"""Tokens, spread over all slots."""
CACHE_BYTES = 256 << 20
"""Weights and banks together are at least so many bytes."""
GRID: dict[str, tuple[int, ...]] = {
    "block_out": (32, 64, 128),
    "block_k": (32, 64, 128),
    "splits": (1, 2, 4, 8),
    "delta_splits": (1, 2, 4, 8),
    "delta_programs": (1, 2, 4, 8, 16, 32, 64),
    "num_warps": (2, 4, 8),
    "num_stages": (2, 3, 4, 5),
}
MERGE_TOKENS = (32, 64, 96, 128, 256, 512)


def candidates(default: LaunchSettings) -> list[LaunchSettings]:
    """The default, and it with one member or two of its members changed."""
    found = [default]
    for names in (*combinations(GRID, 1), *combinations(GRID, 2)):
        for values in product(*(GRID[name] for name in names)):
            found.append(dataclasses.replace(default, **dict(zip(names, values, strict=True))))
    return list(dict.fromkeys(found))


@dataclasses.dataclass(frozen=True)
class Operands:
    """What calls of one shape and batch are made of; as many weights and banks as the card's cache does not hold."""

    x: Tensor
    weights: list[Tensor]
    banks: list[ExpertBank]
    slots: Tensor
    groups: TokenGroups

    def call(self, index: int) -> Callable[[], Tensor]:
        weight, bank = self.weights[index % len(self.weights)], self.banks[index % len(self.banks)]
        return lambda: expert_linear(self.x, weight, None, bank, self.slots, self.groups)


def operands(shape: tuple[int, int], tokens: int, slots: int = SLOTS, copies: int | None = None) -> Operands:
    """Random operands; `copies` None is as many as do not fit the cache."""
    out_features, in_features = shape
    bits, rank = FORMAT
    device = "cuda"
    capacity = Capacity(bits=bits, salient=8, rank=rank)

    def bank() -> ExpertBank:
        made = ExpertBank(slots, in_features, out_features, capacity, device=device)
        load_experts(made, slots, in_features, out_features, bits)
        return made

    banks = [bank()]
    weights = [torch.randn(out_features, in_features, device=device, dtype=torch.bfloat16)]
    copies = copies or max(2, -(-CACHE_BYTES // (banks[0].nbytes + weights[0].nbytes)))
    for _ in range(copies - 1):
        banks.append(bank())
        weights.append(torch.randn_like(weights[0]))
    slot_of_token = torch.arange(tokens, dtype=torch.int32, device=device) % slots
    x = torch.randn(tokens, in_features, device=device, dtype=torch.bfloat16)
    return Operands(x, weights, banks, slot_of_token, group_tokens(slot_of_token, slots))


class Chosen:
    """Has every launch use one setting, within a block."""

    def __init__(self, settings: LaunchSettings) -> None:
        self.settings, self.usual = settings, triton_launch.launch_settings

    def __enter__(self) -> None:
        triton_launch.launch_settings = lambda *_, **__: self.settings

    def __exit__(self, *_: object) -> None:
        triton_launch.launch_settings = self.usual


@functools.lru_cache(maxsize=1)
def _small_operands(tokens: int) -> tuple[Operands, Tensor]:
    """Operands of the smallest layer, and their product by default settings."""
    held = operands(LAYERS[0], tokens, copies=1)
    return held, held.call(0)().double().cpu()


def compile_one(tokens: int, settings: LaunchSettings) -> str | None:
    """Compile a candidate into Triton's cache by running it once; why it cannot serve, or None.

    A kernel is compiled for blocks and types, not for a layer's shape, so the smallest layer will do.
    """
    held, expected = _small_operands(tokens)
    try:
        with Chosen(settings):
            error = relative_error(held.call(0)(), expected)
    except Exception as refusal:  # too much shared memory, too many registers: the card's word on this candidate
        return f"{type(refusal).__name__}: {str(refusal).splitlines()[0] if str(refusal) else ''}"
    return None if error <= 2 * ERROR_BOUND[held.x.dtype] else f"its product is {error:.2g} off"


def compiled(found: dict[int, list[LaunchSettings]], jobs: int, seconds: float) -> dict[int, set[LaunchSettings]]:
    """The candidates of each number of tokens that run on this card, of those that compile in so many seconds."""
    usable: dict[int, set[LaunchSettings]] = {tokens: set() for tokens in found}
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))
    work = {
        pool.submit(compile_one, tokens, settings): (tokens, settings)
        for tokens, candidates_of in found.items()
        for settings in candidates_of
    }
    done, late = wait(work, timeout=seconds)
    pool.shutdown(wait=False, cancel_futures=True)
    refused = 0
    for future in done:
        tokens, settings = work[future]
        problem = str(future.exception()) if future.exception() else future.result()
        if problem is None:
            usable[tokens].add(settings)
        else:
            refused += 1
            print(f"{tokens} tokens, {settings}: {problem}", file=sys.stderr)
    say("compiled", candidates=len(work), refused=refused, late=len(late))
    return usable


def fastest(
    held: Operands, chosen: Iterable[LaunchSettings], deadline: float
) -> tuple[LaunchSettings | None, float, int]:
    """The candidate with the lowest median, its seconds, and how many were timed before the deadline."""
    winner, least, timed = None, float("inf"), 0
    for settings in chosen:
        if timed and time.monotonic() > deadline:
            break
        try:
            with Chosen(settings):
                copies = len(held.banks)
                seconds = graph_seconds(rotating(held.call, copies), replays=max(10, copies), repeats=3)
        except Exception as error:  # as in `compile_one`: another shape may need what the smallest did not
            print(f"{settings}: {type(error).__name__}", file=sys.stderr)
            continue
        timed += 1
        if seconds < least:
            winner, least = settings, seconds
    return winner, least, timed


def launch_entries(jobs: int, deadline: float) -> Iterator[tuple[str, dict[str, int]]]:
    """Key and settings of every layer and batch, as `launch_settings` looks them up."""
    card = card_of(torch.device("cuda", torch.cuda.current_device()))
    defaults = {(tokens, shape): default_settings(*shape, tokens, card) for tokens in BATCHES for shape in LAYERS}
    found = {
        tokens: list(dict.fromkeys(s for shape in LAYERS for s in candidates(defaults[tokens, shape])))
        for tokens in BATCHES
    }
    usable = compiled(found, jobs, 0.6 * (deadline - time.monotonic()))
    left = len(defaults)
    for (tokens, shape), default in defaults.items():
        chosen = [s for s in candidates(default) if s in usable[tokens]]
        held = operands(shape, tokens)
        with torch.no_grad():
            _, before, _ = fastest(held, [default], deadline)
            share = (deadline - time.monotonic()) / left
            winner, seconds, timed = fastest(held, chosen, time.monotonic() + share)
        left -= 1
        key = settings_key(*shape, tokens)
        say("tuned", key=key, us=seconds * 1e6, default_us=before * 1e6, timed=timed, candidates=len(chosen))
        if winner is not None and seconds < before:
            yield key, dataclasses.asdict(winner)
        del held
        torch.cuda.empty_cache()


def merge_crossover() -> int:
    """The least number of tokens of a slot from which merging for cuBLAS takes less time, over the four layers."""
    for tokens in MERGE_TOKENS:
        seconds = {True: 0.0, False: 0.0}
        for shape in LAYERS:
            held = operands(shape, tokens, slots=1)
            for merged in seconds:
                least = tokens if merged else tokens + 1
                plan = plan_prefill(held.groups, [(0, tokens)], least)
                own = dataclasses.replace(held, groups=dataclasses.replace(held.groups, plan=plan))
                seconds[merged] += graph_seconds(rotating(own.call, len(held.banks)), replays=10, repeats=3)
        say("merge", tokens=tokens, merged_us=seconds[True] * 1e6, unmerged_us=seconds[False] * 1e6)
        if seconds[True] < seconds[False]:
            return tokens
    return 2 * MERGE_TOKENS[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=TUNING)
    parser.add_argument("--jobs", type=int, default=12, help="processes that compile")
    parser.add_argument("--seconds", type=float, default=420, help="in all, but for what has begun")
    parser.add_argument("--only", choices=["decode", "merge"], help="one part of it")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("tune needs a CUDA device", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    deadline, card = time.monotonic() + options.seconds, torch.cuda.get_device_name()
    if options.only in (None, "merge"):
        write_tuning(options.out, card, merge_tokens=merge_crossover())
    for key, settings in launch_entries(options.jobs, deadline) if options.only != "merge" else ():
        write_tuning(options.out, card, cards={key: settings})
    return 0


if __name__ == "__main__":
    sys.exit(main())
