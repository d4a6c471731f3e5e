"""Search the taps of the trellis codes: the least noise on Gaussian rows.

    python tests/benchmarks/trellis_taps.py --bits 0.25

Noise is that of unbiased steps over the rows' energy, 1 / cos² - 1, with cos the angle between a row and its code.
Candidates are ranked on few weights, the best again on more, and the best of those on many. Every mask of a sign code
has the newest and the oldest bit, and no two are equal; where there are too many sets to try all, the best known one is
changed, mask by mask, until nothing helps, from several random starts.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Iterable

import torch

from meswitch_cli.delta.codes import TrellisCode, unpack
from meswitch_cli.delta.steps import multiples_of
from meswitch_cli.delta.trellis import decode
from meswitch_cli.delta.trellis_encoder import encode

COLUMNS = 4096
#: Rows of each round, and how many candidates it keeps.
ROUNDS = ((32, 60), (256, 8), (2048, 3))
ALL = 60_000


def noise(code: TrellisCode, rows: torch.Tensor) -> float:
    """Mean energy of the unbiased code's error over that of its row."""
    everything = torch.ones(rows.shape[1], dtype=torch.bool)
    packed = decode(encode(rows, code, everything), code, rows.shape[1])
    values = multiples_of(unpack(packed, code.width, rows.shape[1]), code.width)
    projection = (values * rows).sum(1).double()
    energies = values.square().sum(1).double() * rows.square().sum(1).double()
    return float((energies / projection.square() - 1).mean())


def gaussian(rows: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(seed))


def ranked(codes: Iterable[TrellisCode], rows: int, seed: int) -> list[tuple[float, TrellisCode]]:
    """Codes by their noise on the same rows, the least first."""
    sample = gaussian(rows, seed)
    return sorted((noise(code, sample), code) for code in codes)


def reversed_taps(taps: tuple[int, ...], length: int) -> tuple[int, ...]:
    """The masks read from the other end, whose code is as good."""
    return tuple(sorted(int(f"{mask:0{length}b}"[::-1], 2) for mask in taps))


def candidates(bits: float, states: int) -> list[TrellisCode]:
    """All sets of taps worth a look, or none where there are too many."""
    length = states.bit_length()
    if bits == 1:
        masks = range(1, 1 << length)
        return [TrellisCode(bits, pair, states) for pair in itertools.permutations(masks, 2) if (pair[0] | pair[1]) & 1]
    ends = [1 | inner << 1 | 1 << (length - 1) for inner in range(1 << (length - 2))]
    count = round(1 / bits)
    total = 1
    for index in range(count):
        total = total * (len(ends) - index) // (index + 1)
    if total > ALL:
        return []
    sets = itertools.combinations(ends, count)
    return [TrellisCode(bits, taps, states) for taps in sets if taps <= reversed_taps(taps, length)]


def climbed(bits: float, states: int, starts: int, seed: int) -> list[TrellisCode]:
    """The best neighbours of random sets of taps, one mask changed at a time."""
    length, generator, sample = states.bit_length(), random.Random(seed), gaussian(ROUNDS[0][0], seed)
    ends = [1 | inner << 1 | 1 << (length - 1) for inner in range(1 << (length - 2))]
    found: dict[tuple[int, ...], float] = {}

    def measured(taps: tuple[int, ...]) -> float:
        taps = tuple(sorted(taps))
        if taps not in found:
            found[taps] = noise(TrellisCode(bits, taps, states), sample)
        return found[taps]

    for _ in range(starts):
        taps = tuple(generator.sample(ends, round(1 / bits)))
        best, improved = measured(taps), True
        while improved:
            improved = False
            for place in range(len(taps)):
                for mask in generator.sample(ends, min(len(ends), 16)):
                    if mask not in taps:
                        changed = (*taps[:place], mask, *taps[place + 1 :])
                        if measured(changed) < best:
                            taps, best, improved = changed, measured(changed), True
    return [TrellisCode(bits, taps, states) for taps in sorted(found, key=lambda taps: found[taps])[: ROUNDS[0][1]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=float, required=True, choices=(0.125, 0.25, 0.5, 1.0))
    parser.add_argument("--states", type=int, default=64)
    parser.add_argument("--starts", type=int, default=6, help="random starts where not all sets are tried")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    codes = candidates(options.bits, options.states)
    codes = codes or climbed(options.bits, options.states, options.starts, options.seed)
    print(f"{len(codes)} sets of taps")
    for rows, kept in ROUNDS:
        best = ranked(codes, rows, options.seed + rows)[:kept]
        codes = [code for _, code in best]
    for found, code in best:
        print(f"{found:.4f}  {', '.join(f'{mask:#x}' for mask in code.taps)}")


if __name__ == "__main__":
    main()
