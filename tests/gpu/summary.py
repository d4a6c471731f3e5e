"""summary.md: what was run on what, how each part ended, and its figures as tables."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from gpu.goals import goals
from gpu.process import Outcome, Part

PACKAGES = ("torch", "triton", "transformers", "accelerate", "numba", "fastapi", "xgrammar", "flash-attn", "kernels")
#: Lines of the log of a part that failed.
LAST = 12
#: The tables in order: figure, title, columns (all where there are none given), a line of explanation.
TABLES: tuple[tuple[str, str, tuple[str, ...], str], ...] = (
    ("card", "The card", (), "copies count what is read and what is written; products are bfloat16, through cuBLAS"),
    (
        "decode",
        "Generation",
        (
            "what",
            "experts",
            "requests",
            "tokens_per_second",
            "step_ms_p50",
            "step_ms_p99",
            "prompt_tokens_per_second",
            "first_token_ms_p50",
            "errors",
        ),
        "requests begin together; tokens a second count prompt and generation; steps are those without a prompt; "
        "LoRA: all adapters stacked, one product for each factor; attention, cache and loop are the same for all",
    ),
    ("prefill", "Reading prompts", (), "four at once, in batches of at most 1,024 tokens"),
    ("dense", "One dense model per expert", (), "in turn: one request after another, each on its own model"),
    ("start", "Start", (), ""),
    ("memory", "Memory", (), ""),
    (
        "profile",
        "What a decode step launches",
        ("what", "steps", "kernels_per_step", "kernels_of_32_layers", "launches_per_step", "device_ms_per_step"),
        "launches are calls on the host, a replayed graph being one",
    ),
    ("switch", "Switching under load", (), "gaps lie between the tokens of steady requests, without and beside loads"),
    ("serve", "Server over HTTP", (), ""),
    ("ready", "Start of the server", (), ""),
    ("stop", "Stop", (), ""),
    ("compress", "Compression", (), "the command as a whole, from process start to exit"),
    (
        "smoke",
        "`expert_linear` against float64",
        (),
        "‖y − truth‖ / ‖truth‖, the worst of 1, 16, 64 and 200 tokens, with "
        "and without a low-rank part, of x and x + 0.5; what is further off than its bound has a row of its own",
    ),
    ("linear_decode", "One linear, decode", (), "from a CUDA graph, weights and banks out of the cache"),
    ("linear_prefill", "One linear, prefill of one expert", (), ""),
    ("decoder", "A whole decoder without attention", (), "one step from a CUDA graph; linears, norms and head"),
)


@dataclass(frozen=True)
class Heading:
    """What was run, on what."""

    command: str
    commit: str
    date: str
    device: str
    driver: str
    versions: Mapping[str, str]
    tiny: bool

    @classmethod
    def of(cls, command: str, tiny: bool, commit: str | None, root: Path) -> Heading:
        """Of this machine, now; `commit` where the checkout does not say."""
        found = {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}
        card = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
        query = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
        return cls(
            command,
            commit or _said("git", "-C", str(root), "describe", "--always", "--dirty") or "unknown",
            time.strftime("%Y-%m-%d"),
            card,
            (_said(*query) or "none").splitlines()[0],
            {name: found for name, found in found.items() if found},
            tiny,
        )


def summary(heading: Heading, parts: Sequence[Part], outcomes: Mapping[str, Outcome]) -> str:
    """The page, as Markdown."""
    versions = ", ".join(f"{name} {number}" for name, number in heading.versions.items())
    lines = [
        "# Proof on a GPU" if heading.device != "none" else "# Proof without a GPU",
        "",
        f"Card: {heading.device}. Driver, power limit, highest clock: {heading.driver}. {heading.date}.",
        f"Commit {heading.commit}; {versions}.",
        "",
        f"    {heading.command}",
        "",
    ]
    if heading.tiny:
        lines += ["Tiny shapes: this shows that the parts run. No figure below says anything of a real model.", ""]
    rows = [_part_row(part, outcomes[part.name]) for part in parts if part.name in outcomes]
    lines += [table(("part", "what", "result", "seconds", "limit"), rows), ""]
    for part in parts:
        outcome = outcomes.get(part.name)
        if outcome is None:
            continue
        failures = [name for row in outcome.figures for name in row.get("failures", ())]
        lines += [f"- `{name}`" for name in failures[:20]] + ([""] if failures else [])
        if not outcome.passed and outcome.last:
            lines += [f"Last of {part.name}.log:", "", *(f"    {line[:200]}" for line in outcome.last[-LAST:]), ""]
    found = [row for part in parts if part.name in outcomes for row in outcomes[part.name].figures]
    if not heading.tiny and (reached := goals(found)):
        lines += ["## Goals", "", table(("goal", "bound", "measured", "met"), reached), ""]
    for figure, title, columns, note in TABLES:
        own = [row for row in found if row["figure"] == figure]
        own = _worst(own) if figure == "smoke" else own
        if own:
            lines += [
                f"## {title}",
                "",
                *([note[0].upper() + note[1:] + ".", ""] if note else []),
                _figures(own, columns),
                "",
            ]
    lines += _top_kernels([row for row in found if row["figure"] == "profile"])
    return "\n".join(lines).rstrip() + "\n"


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "/") for cell in line) + " |" for line in lines)


def _figures(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    names = list(columns) or list(dict.fromkeys(name for row in rows for name in row if name != "figure"))
    used = [name for name in names if any(row.get(name) not in (None, [], "") for row in rows)]
    return table((name.replace("_", " ") for name in used), ([_cell(row.get(name)) for name in used] for row in rows))


def _worst(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of each dtype the row that is furthest off, after those that are too far."""
    wrong = [row for row in rows if not row["right"]]
    right: dict[object, Mapping[str, Any]] = {}
    for row in rows:
        if row["right"] and row["error"] >= right.get(row["dtype"], row)["error"]:
            right[row["dtype"]] = row
    return [*wrong, *right.values()]


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, list | tuple):
        return "; ".join(map(str, value))
    return str(value)


def _part_row(part: Part, outcome: Outcome) -> list[object]:
    counts = [row for row in outcome.figures if row["figure"] == "tests"]
    tests = "".join(
        f", {row[name]} {name}"
        for row in counts
        for name in ("passed", "failed", "skipped", "error", "not begun")
        if name in row
    )
    result = outcome.status if outcome.passed else f"**{outcome.status}**"
    return [part.name, part.title, result + tests, outcome.seconds, round(part.limit)]


def _top_kernels(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for row in rows:
        lines += [f"### Kernels of a step: {row['what']}", ""]
        lines += [_figures(row["top"], ("kernel", "per_step", "us_per_step")), ""]
    return lines


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _said(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""
