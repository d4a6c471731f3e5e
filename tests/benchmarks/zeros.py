"""Codes with a zero beside those without, on real deltas, at equal bytes: docs/results/data/trellis/zeros.json.

    python tests bench zeros [--rows 64] [--tensors 14]

Rows of linears of the zoo's experts, those of natural size and the quick ones, of which half the weights do not move.
A *ternary* code is -1, 0 or 1 times a step, by a threshold that is the best for the rows together; stored in 1.6 bits
(five in a byte), or, at best, in as many bits as its entropy. A *dead zone* has four levels, one of them zero, set by
Lloyd's iteration. What trellis codes have at as many bits is read off between their rates, on a logarithmic scale.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from benchmarks.machine import describe
from benchmarks.trellis import DATA
from meswitch_cli.delta.codes import TRELLIS_CODES
from meswitch_cli.delta.quantize import quantize
from meswitch_cli.delta.settings import QuantizerSettings
from zoo.cache import folder_at

PACKED_TERNARY = 1.6
THRESHOLDS = torch.linspace(0.05, 1.6, 32)
LLOYD_ROUNDS = 40
#: Rows of a tensor by which thresholds and levels are chosen.
FITTED_ROWS = 64


def rows_of(zoo: Path, expert: str, tensors: int, rows: int) -> list[torch.Tensor]:
    """Evenly spread rows of evenly spread linears' deltas, fp32."""
    base, tuned = (
        safetensors.torch.load_file(folder / "model.safetensors") for folder in (zoo / "base", zoo / "experts" / expert)
    )
    names = [name for name in sorted(base) if name.endswith("_proj.weight")]
    found = []
    for name in names[:: max(1, len(names) // tensors)]:
        delta = tuned[name].float() - base[name].float()
        found.append(delta[:: max(1, len(delta) // rows)])
    return found


def unbiased_values(levels: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Levels times the steps that make them unbiased, <d, d> / <q, d> a row; 0 where nothing is coded."""
    steps = rows.square().sum(1, keepdim=True) / (levels * rows).sum(1, keepdim=True)
    return levels * torch.nan_to_num(steps, posinf=0.0)


def unbiased_noise(levels: torch.Tensor, rows: torch.Tensor) -> float:
    """Noise of the rows' codes with unbiased steps, over the rows' energy."""
    return float((unbiased_values(levels, rows) - rows).square().sum() / rows.square().sum())


def entropy(levels: torch.Tensor) -> float:
    shares = torch.unique(levels, return_counts=True)[1].double() / levels.numel()
    return float(-(shares * shares.log2()).sum())


def ternary_levels(rows: torch.Tensor) -> torch.Tensor:
    """The best ternary code of rows."""
    size = rows / rows.square().mean(1, keepdim=True).sqrt()
    some, their = size[:: _stride(rows)], rows[:: _stride(rows)]
    best = min(THRESHOLDS, key=lambda least: unbiased_noise(some.sign() * (some.abs() > least), their))
    return size.sign() * (size.abs() > best)


def dead_zone_levels(rows: torch.Tensor) -> torch.Tensor:
    """Four levels of which one is zero."""
    size = rows / rows.square().mean(1, keepdim=True).sqrt()
    some = size[:: _stride(rows)]
    levels = torch.tensor([-1.2, 0.0, 0.9, 2.0])
    for _ in range(LLOYD_ROUNDS):
        nearest = _nearest(some, levels)
        means = [float(some[nearest == place].mean()) if (nearest == place).any() else 0.0 for place in range(4)]
        levels = torch.tensor([means[0], 0.0, means[2], means[3]])
    return levels[_nearest(size, levels)]


def _nearest(size: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Places of the nearest of ascending levels."""
    return torch.bucketize(size, (levels[1:] + levels[:-1]) / 2)


def _stride(rows: torch.Tensor) -> int:
    return max(1, len(rows) // FITTED_ROWS)


def of_settings(rows: torch.Tensor, bits: float, code: str) -> float:
    settings = QuantizerSettings(bits, 0, code=code)  # type: ignore[arg-type]
    result = quantize(torch.zeros_like(rows), rows, settings)
    assert result is not None
    return result[1].weight_error


def between(points: list[tuple[float, float]], bits: float) -> float:
    """Noise at some bits, of points (bits, noise) in ascending order of bits."""
    for (low, first), (high, second) in itertools.pairwise(points):
        if bits <= high:
            share = (bits - low) / (high - low)
            return math.exp((1 - share) * math.log(first) + share * math.log(second))
    raise ValueError(f"{bits} bits are beyond {points[-1][0]}")


def measure(zoo: Path, expert: str, tensors: int, rows: int) -> dict[str, Any]:
    """Means over tensors, each counted by its rows' energy."""
    totals: dict[str, float] = {}
    weight = 0.0
    for delta in rows_of(zoo, expert, tensors, rows):
        delta = delta[delta.square().sum(1) > 0]
        energy = float(delta.square().sum())
        found = {f"trellis {bits}": of_settings(delta, bits, "trellis") for bits in TRELLIS_CODES}
        found |= {f"scalar {bits}": of_settings(delta, bits, "scalar") for bits in (1, 2)}
        levels = ternary_levels(delta)
        found |= {"ternary": unbiased_noise(levels, delta), "entropy": entropy(levels)}
        found["dead zone"] = unbiased_noise(dead_zone_levels(delta), delta)
        found["zeros"] = float((delta == 0).float().mean())
        points = [(bits, found[f"trellis {bits}"]) for bits in sorted(TRELLIS_CODES)] + [(2, found["scalar 2"])]
        found["trellis at packed ternary"] = between(points, PACKED_TERNARY)
        found["trellis at entropy"] = between(points, found["entropy"])
        for name, value in found.items():
            totals[name] = totals.get(name, 0.0) + energy * value
        weight += energy
    return {name: total / weight for name, total in totals.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tensors", type=int, default=14)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"machine": describe(), "experts": {}}
    for group in ("strong", "quick"):
        zoo = folder_at(group)
        for expert in sorted(path.name for path in (zoo / "experts").iterdir()):
            result["experts"][f"{expert}, {group}"] = measure(zoo, expert, options.tensors, options.rows)
            print(group, expert, result["experts"][f"{expert}, {group}"], flush=True)
    DATA.mkdir(parents=True, exist_ok=True)
    (DATA / "zeros.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
