"""docs/results/router_others.md from the figures of benchmarks.router_others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meswitch_cli.router.train.report import interval, percent

RESULTS = Path(__file__).parents[2] / "docs" / "results"
METHODS = {
    "before": "head of own prompts, Mahalanobis distance, line from own prompts (format version 1)",
    "mahalanobis": "head with adopted prompts, Mahalanobis distance, line from general prompts",
    "without adoption": "neighbours' gate, no field adopted",
    "several layers": "the whole method, three layers side by side",
    "product": "**the whole method, one layer chosen in training**",
}


def write_report(figures: Mapping[str, Any]) -> None:
    """Write the page."""
    intro = (Path(__file__).parent / "router_others_intro.md").read_text()
    parts = (_methods, _modes, _bands, _by_set, _curve, _domains, _costs)
    lines = [intro.rstrip(), ""]
    for part in parts:
        lines += [*part(figures), ""]
    lines += ["## Machine", "", f"- {figures['machine']}"]
    (RESULTS / "router_others.md").write_text("\n".join(lines).rstrip() + "\n")


def _row(name: str, item: Mapping[str, Any]) -> str:
    gates, outside = item["at_the_gates"], item.get("out_of_domain")
    cells = [name, interval(item["accuracy"]), interval(gates["coverage"]), interval(gates["precision"])]
    cells += [interval(outside["refused"]), f"{outside['auroc']:.3f}"] if outside else ["", ""]
    cells += [f"{item['after_calibration']['ece']:.3f}"]
    return f"| {' | '.join(cells)} |"


HEAD = [
    "| | accuracy before the gates, % | routed, % | right of those, % | null refused, % | AUROC | ECE |",
    "|---|---|---|---|---|---|---|",
]


def _methods(figures: Mapping[str, Any]) -> list[str]:
    lines = []
    for key, title in (
        ("report", "## Other people's prompts that nothing was chosen by"),
        ("chosen_on", "## The sets that the method was chosen on"),
    ):
        lines += ["", title, "", *HEAD]
        for name, item in figures["methods"].items():
            shown = METHODS.get(name, f"the whole method, {name}")
            layers = ", ".join(map(str, item["layers"]))
            lines.append(_row(f"{shown} ({layers})" if name in ("before", "product") else shown, item[key]))
    lines += ["", "## Held-out prompts like those trained on", "", *HEAD]
    lines += [_row(METHODS[name], figures["methods"][name]["siblings"]) for name in ("before", "product")]
    return lines[1:]


def _modes(figures: Mapping[str, Any]) -> list[str]:
    lines = ["## The gate's modes", "", "| `--gate` | routed | right of those | null refused |", "|---|---|---|---|"]
    for mode, item in figures["modes"].items():
        lines.append(f"| {mode} | {percent(item['routed'])} | {percent(item['right'])} | {percent(item['refused'])} |")
    return lines


def _bands(figures: Mapping[str, Any]) -> list[str]:
    return ["## By length, characters", "", *HEAD, *(_row(name, item) for name, item in figures["bands"].items())]


def _by_set(figures: Mapping[str, Any]) -> list[str]:
    lines = [
        "## By question set",
        "",
        "| set | domain | prompts | likeliest is right, % | routed, % |",
        "|---|---|---|---|---|",
    ]
    for name, item in figures["by_set"].items():
        count = item["prompts"]
        right = "" if item["domain"] is None else f"{100 * item['right'] / count:.0f}"
        lines.append(
            f"| {name} | {item['domain'] or 'none'} | {count} | {right} | {100 * item['routed'] / count:.0f} |"
        )
    return lines


def _curve(figures: Mapping[str, Any]) -> list[str]:
    lines = ["## Training prompts of each expert", "", *HEAD]
    return lines + [_row(f"{count} prompts", item) for count, item in figures["curve"].items()]


def _domains(figures: Mapping[str, Any]) -> list[str]:
    item = figures["more_domains"]
    columns = list(next(iter(item["confusion"].values())))
    lines = [
        "## Eight domains",
        "",
        f"80 prompts each to learn from; held out 40 each: {interval(item['accuracy'])} % have their own expert as the "
        "likeliest. Of other people's maths, code and logic prompts it is "
        f"{interval(figures['more_domains_others']['accuracy'])} %. After the gates:",
        "",
        f"| truth | {' | '.join(columns)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    return lines + [
        f"| {label} | {' | '.join(str(row[column]) for column in columns)} |"
        for label, row in item["confusion"].items()
    ]


def _costs(figures: Mapping[str, Any]) -> list[str]:
    item = figures["timing"]
    sizes = ", ".join(f"{name} {size:,}" for name, size in item["bytes"].items())
    return [
        "## What it costs",
        "",
        f"Without the hidden states, a fit takes {item['fit_seconds']:.1f} s (five layers tried) and a judgement "
        f"{item['judge_ms']:.2f} ms. Bytes: {sum(item['bytes'].values()):,} ({sizes}).",
    ]
