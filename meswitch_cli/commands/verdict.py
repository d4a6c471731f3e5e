"""Whether an artifact's errors are as they should be, and what they will do to answers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from meswitch_cli.artifact.manifest import Manifest

#: By code and bits, the weight error of unbiased steps on a Laplacian delta, whose tails are heavier than a real one's.
#: docs/results/trellis.md has the figures, and those of real deltas, which lie below.
NORMAL_ERROR = {
    ("scalar", 1): 1.0,
    ("scalar", 2): 0.2448,
    ("scalar", 4): 0.034,
    ("trellis", 0.125): 6.45,
    ("trellis", 0.25): 3.14,
    ("trellis", 0.5): 1.55,
    ("trellis", 1): 0.58,
}
#: By code, bits and whether a low-rank part is there: least and most KL that fine-tunes of two small models had with
#: output-unbiased steps and 8 salient channels, as a share of the base's (docs/results/compression.md,
#: without fine-tunes of other kinds).
MEASURED_KL = {
    ("scalar", 2, False): (2.9e-7, 3.0e-4),
    ("scalar", 2, True): (6.7e-8, 1.4e-4),
    ("scalar", 1, False): (2.3e-4, 2.8e-3),
    ("scalar", 1, True): (1.1e-7, 2.1e-4),
    ("trellis", 1, True): (2.0e-6, 1.5e-5),
    ("trellis", 0.25, True): (2.1e-7, 7e-5),
}

#: A weight error below which factors were rounded to 16 bits: that leaves 1e-7 (fp16) to 1e-5 (bf16), 8 bits 1e-4.
EXACT_ERROR = 5e-5


def verdict(manifest: Manifest) -> list[str]:
    """What the errors of an artifact's linears mean, a sentence each; nothing where none was measured."""
    entries = [item for item in manifest.tensors if item.kind == "linear" and item.bits and item.delta_energy]
    known = [item for item in entries if item.weight_error is not None and (item.code, item.bits) in NORMAL_ERROR]
    energy = sum(item.delta_energy or 0.0 for item in known)
    if not energy:
        return _of_adapter(manifest)
    error = sum((item.weight_error or 0.0) * (item.delta_energy or 0.0) for item in known) / energy
    normal = sum(NORMAL_ERROR[item.code, item.bits] * (item.delta_energy or 0.0) for item in known) / energy
    rates = sorted({item.bits for item in known})
    at = " and ".join(f"{rate:g}" for rate in rates) + (" bit" if rates[-1] <= 1 else " bits")
    if error > normal:
        return [
            f"weight error {_percent(error)} of the delta: more than usual at {at} (up to {_percent(normal)}); "
            "more bits lower it, and meswitch eval says what it does to answers"
        ]
    told = [
        f"weight error {_percent(error)} of the delta: usual at {at} (up to {_percent(normal)}); "
        "such errors have no common direction, and most of them cancel in the outputs"
    ]
    expected = MEASURED_KL.get((known[0].code, known[0].bits, bool(known[0].rank))) if len(rates) == 1 else None
    given = manifest.settings
    alike = given.get("steps") == "output-unbiased" and given.get("salient", 0) >= 8 and not given.get("group_size")
    if expected and alike:
        low, high = (_plain(100 * share) for share in expected)
        told.append(
            f"expect a KL to the full expert of {low} to {high} % of the base's: what fine-tunes of small models had "
            "at this setting; meswitch eval measures yours"
        )
    return told


def _of_adapter(manifest: Manifest) -> list[str]:
    """Of low-rank parts that stand alone: an adapter's own factors, or a delta's leading directions."""
    alone = [item for item in manifest.tensors if item.rank and not item.bits and item.weight_error is not None]
    energy = sum(item.delta_energy or 0.0 for item in alone)
    if not energy:
        return []
    error = sum((item.weight_error or 0.0) * (item.delta_energy or 0.0) for item in alone) / energy
    if manifest.settings.get("bits") == 0:
        return [
            f"weight error {_percent(error)} of the delta, which is what its leading directions leave: rounding, of a "
            "merged LoRA; of another fine-tune meswitch eval says what it does to answers"
        ]
    told = f"weight error {_percent(error)} of the update"
    if error < EXACT_ERROR:
        return [f"{told}: these are the adapter's own factors, rounded to what they are stored in; nothing was coded"]
    return [
        f"{told}: the adapter's factors lost digits; --factor-bits 16 keeps them, and meswitch eval says if you need to"
    ]


def _percent(share: float) -> str:
    return f"{_plain(100 * share) if share < 0.1 else round(100 * share)} %"


def _plain(value: float) -> str:
    """Two digits of a small number, without an exponent."""
    return f"{value:.{1 - math.floor(math.log10(value))}f}".rstrip("0").rstrip(".") if value else "0"
