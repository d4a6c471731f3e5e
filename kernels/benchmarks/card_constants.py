"""Make a card's constants for `meswitch plan` from the figures of a proof run, and put them into `tuning.json`.

    python kernels/benchmarks/card_constants.py build/gpu/results.json [more/results.json ...] [--out FILE]

Needs no card. The parts probe, decoder and engine must have run, and switch for loads, together or in several runs on
one kind of card, of which a later one's parts count. Prints the constants, and beside each measured step of the engine
what they make of it: they are taken at 16 requests, and the host's share of a step grows with those.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from common import TUNING, parse_bits, table, write_tuning

from meswitch_kernels.cards import CardConstants, card_constants

HIDDEN, VOCABULARY = 4096, 32000
HEAD_GB = 2 * HIDDEN * VOCABULARY / 1e9
"""Of the decoder's base; its layers are the rest."""


class Run:
    """The figures of a proof run, by table."""

    def __init__(self, runs: list[dict[str, Any]]) -> None:
        """`runs` are what results.json held of each, of one kind of card."""
        self.commit, self.card = runs[-1]["commit"], runs[-1]["device"]
        self.rows: dict[str, list[dict[str, Any]]] = {}
        parts = {name: part for run in runs for name, part in run["parts"].items() if part["figures"]}
        for part in parts.values():
            for row in part["figures"]:
                self.rows.setdefault(row["figure"], []).append(row)

    def of(self, figure: str, **wanted: object) -> list[dict[str, Any]]:
        """Rows of a table with these values.

        Raises:
            SystemExit: there are none.
        """
        found = [
            row for row in self.rows.get(figure, []) if all(row.get(name) == value for name, value in wanted.items())
        ]
        if not found:
            raise SystemExit(f"the run has no figure {figure!r} with {wanted}: run its part again")
        return found

    @property
    def decoded_bits(self) -> list[float]:
        return sorted({row["bits"] for row in self.of("decoder") if row["experts"] == 1})


def constants(run: Run) -> dict[str, Any]:
    """Constants of the run's card, as `CardConstants` names them.

    A step of the decoder is base bytes over `base`, delta bytes over `experts`, and a time a layer. What the engine's
    step takes beyond that on the device is attention's, by layer; what it takes beyond the device is the host's.
    """
    card = run.of("card")[0]
    decoder = run.of("decoder")
    base = statistics.median(1e12 * row["base_gb"] / row["base_ms"] for row in decoder)
    experts, layer_seconds = {}, []
    for bits in run.decoded_bits:
        slots = min(row["slots"] for row in run.of("decoder", bits=bits))
        rows = run.of("decoder", bits=bits, slots=slots)
        one, all_of_them = (
            next(row for row in rows if row["experts"] == row["tokens"] == count) for count in (1, slots)
        )
        more_ms = max(all_of_them["ms"] - one["ms"], 1e-3)
        experts[str(bits)] = 1e12 * (all_of_them["delta_gb"] - one["delta_gb"]) / more_ms
        beside = one["ms"] / 1e3 - 1e9 * one["base_gb"] / base - 1e9 * one["delta_gb"] / experts[str(bits)]
        layer_seconds.append(max(beside, 0.0) / one["layers"])
    found = {
        "commit": run.commit,
        "copy": 1e9 * card["copy_gb_per_s"],
        "base": base,
        "experts": experts,
        "layer_seconds": statistics.mean(layer_seconds),
        "step_seconds": 0.0,
    }
    attention, host = [], []
    for profile in run.of("profile"):
        if profile.get("experts") and profile["bits"] in experts:
            step = engine_row(run, profile["bits"], profile["experts"], profile["requests"])
            linears = predicted(card_constants({**found, "prompt_operations": 0, "load": 0}), run, step)
            attention.append((profile["device_ms_per_step"] / 1e3 - linears) / step["layers"])
            host.append((step["step_ms_p50"] - profile["device_ms_per_step"]) / 1e3)
    if attention:
        found["layer_seconds"] += max(statistics.mean(attention), 0.0)
        found["step_seconds"] = max(statistics.mean(host), 0.0)
    prompts = run.of("prefill", experts=1)
    weights = (gigabytes(run, prompts[0]["layers"], 0, 0)) * 1e9 / 2
    found["prompt_operations"] = 2 * weights * max(row["prompt_tokens_per_second"] for row in prompts)
    loads = [row["gb_per_second"] for row in run.rows.get("switch", [])]
    found["load"] = 1e9 * max(loads) if loads else None
    return found


def gigabytes(run: Run, layers: int, bits: float, experts: int) -> float:
    """What a step of so many layers reads: base alone with 0 experts, else the experts' deltas alone."""
    row = run.of("decoder")[0]
    if not experts:
        return float(HEAD_GB + (row["base_gb"] - HEAD_GB) * layers / row["layers"])
    one = run.of("decoder", bits=bits, experts=1)[0]
    head = one["delta_head_gb"]  # of few layers it is not little
    return float(experts * (head + (one["delta_gb"] - head) * layers / one["layers"]))


def engine_row(run: Run, bits: str, experts: int, requests: int) -> dict[str, Any]:
    return run.of("decode", bits=bits, experts=experts, requests=requests)[0]


def predicted(held: CardConstants, run: Run, step: dict[str, Any]) -> float:
    """Seconds of one of the engine's steps, by constants."""
    bits, experts, layers = parse_bits(step["bits"]), step["experts"], step["layers"]
    seconds = 1e9 * gigabytes(run, layers, bits, 0) / held.base + layers * held.layer_seconds + held.step_seconds
    if experts:
        seconds += 1e9 * gigabytes(run, layers, bits, experts) / held.experts[str(bits)]
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", help="results.json of a proof run")
    parser.add_argument("--out", type=Path, default=TUNING)
    options = parser.parse_args()
    runs = [json.loads(file.read_text()) for file in options.results]
    cards = {run["device"] for run in runs}
    if len(cards) > 1 or "none" in cards or any(run["tiny"] for run in runs):
        print(f"not runs on one card: {', '.join(sorted(cards))}", file=sys.stderr)
        return 1
    run = Run(runs)
    found = constants(run)
    write_tuning(options.out, run.card, constants=found)
    print(json.dumps({run.card: found}, indent=1))
    held = card_constants(found)
    rows = []
    for step in run.of("decode"):
        if step["bits"] in held.experts:
            reckoned = 1e3 * predicted(held, run, step)
            off = reckoned / step["step_ms_p50"] - 1
            rows.append(
                (
                    step["what"],
                    step["experts"],
                    step["requests"],
                    f"{step['step_ms_p50']:.2f}",
                    f"{reckoned:.2f}",
                    f"{off:+.0%}",
                )
            )
    print(table(("engine", "experts", "requests", "step, ms", "by constants", "off"), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
