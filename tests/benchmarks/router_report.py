"""docs/results/router.md from the figures of benchmarks.router."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from meswitch_cli.router.train.report import interval, percent, rewording

RESULTS = Path(__file__).parents[2] / "docs" / "results"
#: docs/results/scale.md: a Mistral-7B-shaped model and its 2-bit artifact, bytes.
MISTRAL, MISTRAL_DELTA = 14_480_000_000, 1_839_000_000
METHODS = {
    "before": "head of own prompts, Mahalanobis distance, line from own prompts (format version 1)",
    "mahalanobis": "head with adopted prompts, Mahalanobis distance, line from general prompts",
    "without adoption": "no field adopted",
    "neighbours": "the two nearest prompts alone, a tenth of other fields passes (format version 2)",
    "product": "**the whole method, one layer chosen in training**",
}


def write_report(figures: Mapping[str, Any], machines: Sequence[str]) -> None:
    """Write the page from the figures by stage; what was not measured is left out."""
    intro = (Path(__file__).parent / "router_intro.md").read_text()
    product = figures["product"]
    parts = [
        _methods(figures["methods"]),
        _gates(figures["gates"]) if "gates" in figures else [],
        _modes(product["modes"]),
        ["## By length, characters", "", *HEAD, *(_row(name, item) for name, item in product["bands"].items())],
        ["## In other words", "", *rewording(product["rewording"])] if "rewording" in product else [],
        _by_set(product["by_set"]),
        _curve(figures["curve"]) if "curve" in figures else [],
        _domains(figures["more_domains"]) if "more_domains" in figures else [],
        _choice(product["choice"]),
        _costs(figures["timing"]) if "timing" in figures else [],
        _lm(figures["lm"], product["sets"]) if "lm" in figures else [],
        _bytes(figures),
        ["## Machine", "", *(f"- {machine}" for machine in machines)],
    ]
    for name, value in _headline(figures["methods"]["product"]["report"]).items():
        intro = intro.replace(f"@{name}@", value)
    lines = [intro.rstrip(), ""]
    for part in filter(None, parts):
        lines += [*part, ""]
    (RESULTS / "router.md").write_text("\n".join(lines).rstrip() + "\n")


def _headline(item: Mapping[str, Any]) -> dict[str, str]:
    """What the introduction's table says of the product."""
    gates, outside = item["at_the_gates"], item["out_of_domain"]
    shares = {"accuracy": item["accuracy"], "routed": gates["coverage"], "right": gates["precision"]}
    shares |= {"refused": outside["refused"]}
    numbers = {"auroc": outside["auroc"], "ece": item["after_calibration"]["ece"]}
    return {name: interval(share) for name, share in shares.items()} | {
        name: f"{number:.3f}" for name, number in numbers.items()
    }


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
            shown = METHODS[name]
            layers = ", ".join(map(str, item["layers"]))
            lines.append(_row(f"{shown} ({layers})" if name in ("before", "product") else shown, item[key]))
    lines += ["", "## Held-out prompts like those trained on", "", *HEAD]
    lines += [_row(METHODS[name], methods[name]["siblings"]) for name in ("before", "product")]
    return lines[1:]


def _curve(curve: Mapping[str, Any]) -> list[str]:
    rows = [_row(f"{count} prompts", item) for count, item in curve.items()]
    return ["## Training prompts of each expert", "", *HEAD, *rows]


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


def _share(item: Mapping[str, Any]) -> str:
    return f"{100 * item['right'] / item['prompts']:.1f} % of {item['prompts']}"


def _lm(item: Mapping[str, Any], sets: Mapping[str, Any]) -> list[str]:
    course, latency = item["course"], item["latency"]
    losses = ", ".join(f"{loss:.4f} after {step}" for step, loss in course["validation"].items())
    ended = "it could fall no further" if course["converged"] else "the steps were over"
    names = [name for name in sets if name in item["sets"]["report"]["by_domain"]]
    lines = [
        "## The paper's own router",
        "",
        "SmolLM2-135M is asked which domain a prompt is of, as a question with lettered options, and trained on the "
        f"same prompts ({item['prompts']} of them; the rest are validation), cut to 64 tokens. Its validation loss, "
        f"nats: {losses} steps of 8 prompts; then training ended, because {ended}. Before training "
        f"{_share(item['untrained'])} of other people's prompts were answered rightly. Without any gate; the likeliest "
        "expert is right:",
        "",
        f"| router | prompts like those trained on | other people's | {' | '.join(names)} | ECE there | bytes |",
        "|---" * (len(names) + 5) + "|",
    ]
    report = item["sets"]["report"]
    cells = ["lm", _share(item["sets"]["siblings"]), _share(report)]
    cells += [_share(report["by_domain"][name]) for name in names]
    cells += [f"{report['ece']:.3f}", f"{item['bytes']:,}"]
    lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"A decision beside the base's own prefill of the same {latency['tokens']} tokens, taking turns in one "
        f"process ({latency['dtype']}; the machine did other work, medians of ratios): the probe "
        f"{latency['share_of_prefill']['probe']:.2f} of a prefill (layer {latency['layer']} of {latency['layers']}), "
        f"the language model {latency['share_of_prefill']['lm']:.2f}. Least milliseconds: prefill "
        f"{latency['least_ms']['prefill']:.0f}, probe {latency['least_ms']['probe']:.0f}, language model "
        f"{latency['least_ms']['lm']:.0f}.",
    ]
    return lines


def _bytes(figures: Mapping[str, Any]) -> list[str]:
    """What three Mistral-7B experts come to with a router beside them."""
    if "timing" not in figures or "lm" not in figures:
        return []
    rows = {"probe": sum(figures["timing"]["bytes"].values()), "language model": figures["lm"]["bytes"]}
    lines = [
        "## Bytes",
        "",
        "Three Mistral-7B experts with 2-bit deltas ([2.172 times smaller](scale.md) than three full models) and a "
        "router. The paper's ratio falls from 2.04 to 1.74 with its router of 1.8 B parameters.",
        "",
        "| router | bytes | ratio with it |",
        "|---|---|---|",
    ]
    for name, size in rows.items():
        lines.append(f"| {name} | {size:,} | {3 * MISTRAL / (MISTRAL + 3 * MISTRAL_DELTA + size):.3f} |")
    return lines
