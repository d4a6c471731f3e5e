"""docs/results/engine.md from the figures of benchmarks.engine."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

INTRO = Path(__file__).parent / "engine_intro.md"


def write_report(figures: Mapping[str, Any], path: Path) -> None:
    """Write the page: one row for each number of new tokens that was measured."""
    measured = sorted((int(name.split()[1]), part) for name, part in figures.items() if name.startswith("throughput"))
    sections = [INTRO.read_text()]
    if measured:
        sections += [_mixed(measured), _alone(measured)]
    if "rest" in figures:
        sections.append(_rest(figures["rest"]))
    path.write_text("\n".join(sections))


def rates(new: int, part: Mapping[str, Any]) -> dict[str, float]:
    """Tokens a second of each measure, from the median of its runs."""
    middle = {name: statistics.median(values) for name, values in part["seconds"].items()}
    return {name: (1 if name.endswith(", 1") else part["requests"]) * new / value for name, value in middle.items()}


def _mixed(measured: list[tuple[int, Mapping[str, Any]]]) -> str:
    first = measured[0][1]
    lines = [
        "## Mixed against separate\n",
        f"{first['requests']} requests, a quarter for each of base and experts, after prompts of {first['prompt']:.0f} "
        "tokens on average; tokens generated a second, prefill included.\n",
        "| new tokens a request | mixed, in one engine | four full models, one after another | ratio | runs |",
        "|---|---|---|---|---|",
    ]
    for new, part in measured:
        rate = rates(new, part)
        pairs = zip(part["seconds"]["separate"], part["seconds"]["mixed"], strict=True)
        each = sorted(separate / mixed for separate, mixed in pairs)
        lines.append(
            f"| {new} | {rate['mixed']:.1f} | {rate['separate']:.1f} | **{rate['mixed'] / rate['separate']:.2f}** | "
            f"{len(each)}: {', '.join(f'{ratio:.2f}' for ratio in each)} |"
        )
    return "\n".join(lines) + "\n"


def _alone(measured: list[tuple[int, Mapping[str, Any]]]) -> str:
    lines = [
        "## One model alone, in the same engine\n",
        "| new tokens a request | requests | base, tokens/s | expert, tokens/s | ratio |",
        "|---|---|---|---|---|",
    ]
    for new, part in measured:
        rate = rates(new, part)
        for count in (1, part["requests"]):
            base, expert = rate[f"base, {count}"], rate[f"expert, {count}"]
            lines.append(f"| {new} | {count} | {base:.1f} | {expert:.1f} | {expert / base:.2f} |")
    lines += ["", *(f"{new} new tokens: {part['machine']}." for new, part in measured)]
    return "\n".join(lines) + "\n"


def _rest(part: Mapping[str, Any]) -> str:
    prefix, load, copies = part["prefix"], part["load bandwidth"], part["copy bandwidth"]
    megabytes = {side: (value["after"] - value["before"]) / 1e6 for side, value in part["memory"].items()}
    return f"""## Memory, prefixes, loads

Memory beyond the interpreter's, after the same requests: {megabytes["mixed"]:,.0f} MB for base and experts in one
engine, {megabytes["separate"]:,.0f} MB for four full models ({megabytes["mixed"] / megabytes["separate"]:.2f}).

Twelve requests to base and experts after one system prompt of {part["system tokens"]} tokens, 2 tokens each, keys of
the cache salted by artifact: {prefix["sharing"]:.2f} s with prefix sharing, {prefix["not sharing"]:.2f} s without \
({prefix["not sharing"] / prefix["sharing"]:.1f} times).

An expert is put into a slot, read from disk (the page cache) and checked, at {load / 1e9:.2f} GB/s; memory is copied at
{copies / 1e9:.2f} GB/s here, so that is {100 * load / copies:.0f} % of it ({part["load bytes"] / 1e6:.0f} MB moved).

{part["machine"]}.
"""
