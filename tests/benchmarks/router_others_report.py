"""docs/results/router_others.md from the figures of benchmarks.router_others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from meswitch_cli.router.train.report import interval, percent, rewording

RESULTS = Path(__file__).parents[2] / "docs" / "results"
METHODS = {
    "before": "head of own prompts, Mahalanobis distance, line from own prompts (format version 1)",
    "mahalanobis": "head with adopted prompts, Mahalanobis distance, line from general prompts",
    "without adoption": "no field adopted",
    "neighbours": "the two nearest prompts alone, a tenth of other fields passes (format version 2)",
    "several layers": "the whole method, three layers side by side",
    "product": "**the whole method, one layer chosen in training**",
}


def write_report(figures: Mapping[str, Any], machines: Sequence[str]) -> None:
    """Write the page from the figures by stage; what was not measured is left out."""
    intro = (Path(__file__).parent / "router_others_intro.md").read_text()
    product = figures["product"]
    parts = [
        _methods(figures["methods"]),
        _gates(figures["gates"]) if "gates" in figures else [],
        _modes(product["modes"]),
        ["## By length, characters", "", *HEAD, *(_row(name, item) for name, item in product["bands"].items())],
        ["## In other words", "", *rewording(product["rewording"])] if "rewording" in product else [],
        _by_set(product["by_set"]),
        ["## Training prompts of each expert", "", *HEAD]
        + [_row(f"{count} prompts", item) for count, item in figures["curve"].items()],
        _domains(figures["more_domains"]),
        _choice(product["choice"]),
        _costs(figures["timing"]) if "timing" in figures else [],
        ["## Machine", "", *(f"- {machine}" for machine in machines)],
    ]
    lines = [intro.rstrip(), ""]
    for part in filter(None, parts):
        lines += [*part, ""]
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


def _methods(methods: Mapping[str, Any]) -> list[str]:
    lines = []
    for key, title in (
        ("report", "## Other people's prompts that nothing was chosen by"),
        ("development", "## The sets that gate and lines were chosen on"),
        ("chosen_on", "## The sets that the rest of the method was chosen on"),
    ):
        lines += ["", title, "", *HEAD]
        for name, item in methods.items():
            if key not in item:
                continue
            shown = METHODS.get(name, f"the whole method, {name}")
            layers = ", ".join(map(str, item["layers"]))
            lines.append(_row(f"{shown} ({layers})" if name in ("before", "product") else shown, item[key]))
    lines += ["", "## Held-out prompts like those trained on", "", *HEAD]
    lines += [_row(METHODS[name], methods[name]["siblings"]) for name in ("before", "product")]
    return lines[1:]


def _gates(gates: Mapping[str, Any]) -> list[str]:
    lines = [
        "## Gates compared, on the sets that they were chosen on",
        "",
        "At the layer that training chose, without any line: AUROC, and other fields' prompts that pass where 95 and "
        "90 % of the experts' do.",
        "",
        "| the distance | development: AUROC | passed at 95 % | at 90 % | earlier sets: AUROC | passed at 95 % |",
        "|---|---|---|---|---|---|",
    ]
    for name, item in gates.items():
        new, old = item["development"], item["chosen_on"]
        cells = [name, f"{new['auroc']:.3f}", *(percent(share) for share in new["passed"]), f"{old['auroc']:.3f}"]
        lines.append(f"| {' | '.join([*cells, percent(old['passed'][0])])} |")
    return lines


def _modes(modes: Mapping[str, Any]) -> list[str]:
    lines = ["## The gate's modes", "", "| `--gate` | routed | right of those | null refused |", "|---|---|---|---|"]
    for mode, item in modes.items():
        lines.append(f"| {mode} | {percent(item['routed'])} | {percent(item['right'])} | {percent(item['refused'])} |")
    return lines


def _choice(choice: Mapping[str, Any]) -> list[str]:
    lines = [
        "## Which layer",
        "",
        "| layer | errors on general prompts left out, of answers and of the gate | Fisher ratio of own prompts |",
        "|---|---|---|",
    ]
    return lines + [f"| {layer} | {item['badness']:.3f} | {item['fisher']:.3f} |" for layer, item in choice.items()]


def _by_set(sets: Mapping[str, Any]) -> list[str]:
    lines = [
        "## By question set",
        "",
        "| set | domain | prompts | likeliest is right, % | routed, % |",
        "|---|---|---|---|---|",
    ]
    for name, item in sets.items():
        count = item["prompts"]
        right = "" if item["domain"] is None else f"{100 * item['right'] / count:.0f}"
        lines.append(
            f"| {name} | {item['domain'] or 'none'} | {count} | {right} | {100 * item['routed'] / count:.0f} |"
        )
    return lines


def _domains(figures: Mapping[str, Any]) -> list[str]:
    item = figures["held_out"]
    columns = list(next(iter(item["confusion"].values())))
    lines = [
        "## Eight domains",
        "",
        f"80 prompts each to learn from; held out 40 each: {interval(item['accuracy'])} % have their own expert as the "
        "likeliest. Of other people's maths, code and logic prompts it is "
        f"{interval(figures['others']['accuracy'])} %. After the gates:",
        "",
        f"| truth | {' | '.join(columns)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    return lines + [
        f"| {label} | {' | '.join(str(row[column]) for column in columns)} |"
        for label, row in item["confusion"].items()
    ]


def _costs(item: Mapping[str, Any]) -> list[str]:
    sizes = ", ".join(f"{name} {size:,}" for name, size in item["bytes"].items())
    return [
        "## What it costs",
        "",
        f"Without the hidden states, a fit takes {item['fit_seconds']:.1f} s of one processor (five layers tried) and "
        f"a judgement "
        f"{item['judge_ms']:.2f} ms. Bytes: {sum(item['bytes'].values()):,} ({sizes}).",
    ]
