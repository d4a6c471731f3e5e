"""docs/results/router.md from the figures of benchmarks.router."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from meswitch_cli.router.train.report import interval, percent

RESULTS = Path(__file__).parents[2] / "docs" / "results"
NAMES = {"probe": "probe", "encoder": "encoder (MiniLM)", "tfidf": "TF-IDF", "lm": "lm (SmolLM2-135M)"}
#: docs/results/scale.md: a Mistral-7B-shaped model and its 2-bit artifact, bytes.
MISTRAL, MISTRAL_DELTA = 14_480_000_000, 1_839_000_000


def write_report(figures: Mapping[str, Any]) -> None:
    """Write the page; stages that were not run leave their part out."""
    intro = (Path(__file__).parent / "router_intro.md").read_text()
    lines = [intro, *_main_table(figures), "", *_other_sources(figures), ""]
    for stage, part in (("latency", _latency), ("fourth", _fourth), ("downstream", _downstream)):
        if stage in figures:
            lines += [*part(figures[stage]), ""]
    lines += [*_bytes(figures), "", *_confusion(figures), "", *_machines(figures)]
    (RESULTS / "router.md").write_text("\n".join(lines).rstrip() + "\n")


def _backends(figures: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    return ((name, figures[name]) for name in NAMES if name in figures)


def _main_table(figures: Mapping[str, Any]) -> list[str]:
    lines = [
        "## Held-out prompts of the three domains, and of other fields",
        "",
        "| router | accuracy, % | macro-F1 | ECE before, after | Brier | NLL | OOD AUROC | FPR at 95 % TPR "
        "| null refused, % "
        "| coverage at 95 % precision, % | routed at the gates, % | right of those, % | trained in, s |",
        "|---" * 13 + "|",
    ]
    for name, stage in _backends(figures):
        test = stage["test"]
        outside, gates, after = test["out_of_domain"], test["at_the_gates"], test["after_calibration"]
        cells = [
            NAMES[name],
            interval(test["accuracy"]),
            f"{test['macro_f1']:.3f}",
            f"{test['before_calibration']['ece']:.4f}, {after['ece']:.4f}",
            f"{after['brier']:.4f}",
            f"{after['nll']:.4f}",
            f"{outside['auroc']:.4f}",
            percent(outside["fpr_at_95_tpr"]),
            interval(outside["refused"]),
            f"{100 * test['coverage_at_target']:.1f}",
            interval(gates["coverage"]),
            interval(gates["precision"]),
            f"{stage['seconds']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    missing = [title for name, title in NAMES.items() if name not in figures]
    if missing:
        lines += ["", f"Not measured yet: {', '.join(missing)}."]
    if "untrained" in figures:
        item = figures["untrained"]
        share = 100 * item["right"] / item["prompts"]
        lines += [
            "",
            f"The letters of SmolLM2-135M before fine-tuning: {share:.1f} % of {item['prompts']} prompts right.",
        ]
    return lines


def _other_sources(figures: Mapping[str, Any]) -> list[str]:
    lines = [
        "## The same domains from other sources",
        "",
        "| router | accuracy before the gates, % | maths | code | logic | ECE before, after "
        "| routed at the gates, % | right of those, % |",
        "|---" * 8 + "|",
    ]
    for name, stage in _backends(figures):
        test = stage["other_sources"]
        recalls = [percent(test["per_domain"][label]["recall"]) for label in ("maths", "code", "logic")]
        gates = test["at_the_gates"]
        cells = [NAMES[name], interval(test["accuracy"]), *recalls]
        cells += [", ".join(f"{test[f'{when}_calibration']['ece']:.3f}" for when in ("before", "after"))]
        cells += [interval(gates["coverage"]), interval(gates["precision"])]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _latency(stage: Mapping[str, Any]) -> list[str]:
    lines = [
        "## Latency",
        "",
        f"One decision on a prompt of about {stage['tokens']} tokens beside the base's own prefill of it "
        f"({stage['dtype'].removeprefix('torch.')}), taking turns; the share is the median of the pairs' ratios.",
        "",
        "| | median, ms | least, ms | share of prefill |",
        "|---|---|---|---|",
    ]
    for name, median in stage["median_ms"].items():
        share = stage["share_of_prefill"].get(name)
        shown = "" if share is None else f"{share:.3f}"
        lines.append(f"| {NAMES.get(name, 'prefill')} | {median:.1f} | {stage['least_ms'][name]:.1f} | {shown} |")
    return lines


def _fourth(stage: Mapping[str, Any]) -> list[str]:
    lines = [
        "## Adding a fourth expert to the probe",
        "",
        f"`{stage['name']}` (radio amateurs' examination questions), {stage['prompts']} prompts, "
        f"{stage['held_out']} held out. Their features took {stage['feature_seconds']:.1f} s, the refit "
        f"{stage['refit_seconds']:.2f} s. Share of held-out prompts whose highest score is their own expert's:",
        "",
        "| expert | before | after |",
        "|---|---|---|",
    ]
    for label, after in stage["after"].items():
        before = stage["before"].get(label)
        lines.append(f"| {label} | {'' if before is None else percent(before)} | {percent(after)} |")
    return lines


def _downstream(stage: Mapping[str, Any]) -> list[str]:
    lines = [
        "## What routing is worth",
        "",
        f"Loss of the chosen expert (full precision) on {stage['items']} held-out responses, nats a token.",
        "",
        "| chosen by | loss |",
        "|---|---|",
    ]
    return lines + [f"| {name} | {value:.4f} |" for name, value in stage["loss"].items()]


def _bytes(figures: Mapping[str, Any]) -> list[str]:
    full = 3 * MISTRAL
    ours = MISTRAL + 3 * MISTRAL_DELTA
    lines = [
        "## Bytes",
        "",
        "What routing needs on disk, and what three Mistral-7B experts with 2-bit deltas "
        f"([{full / ours:.3f} times smaller](scale.md) than three full models) come to with that router beside them. "
        "The paper's ratio falls from 2.04 to 1.74 with its router of 1.8 B parameters.",
        "",
        "| router | bytes | ratio with it |",
        "|---|---|---|",
    ]
    for name, stage in _backends(figures):
        lines.append(f"| {NAMES[name]} | {stage['bytes']:,} | {full / (ours + stage['bytes']):.3f} |")
    if "probe" in figures:
        probe = figures["probe"]
        hidden = 4096 / probe["settings"]["size"]
        wide = round(probe["bytes"] * hidden)
        ratio = full / (ours + wide)
        lines.append(f"| probe at Mistral's width of 4096, in proportion | {wide:,} | {ratio:.3f} |")
    return lines


def _confusion(figures: Mapping[str, Any]) -> list[str]:
    if "probe" not in figures:
        return []
    rows = figures["probe"]["test"]["confusion"]
    columns = list(next(iter(rows.values())))
    lines = ["## Where the probe sends prompts", "", f"| truth | {' | '.join(columns)} |", "|---" * 5 + "|"]
    for label, row in rows.items():
        lines.append(f"| {label} | {' | '.join(str(row[column]) for column in columns)} |")
    notes = figures["probe"]["notes"]
    tried = ", ".join(f"{layer}: {value:.3f}" for layer, value in notes["badness_by_layer"].items())
    layer = figures["probe"]["settings"]["layer"]
    return [
        *lines,
        "",
        f"It reads layer {layer} of {notes['layers']}; errors of head and gate in training: {tried}.",
    ]


def _machines(figures: Mapping[str, Any]) -> list[str]:
    stages = {name: item["machine"] for name, item in figures.items() if isinstance(item, dict) and "machine" in item}
    lines = ["## Machine", ""]
    for machine in dict.fromkeys(stages.values()):
        names = ", ".join(name for name, found in stages.items() if found == machine)
        lines.append(f"- {machine}: {names}")
    return lines
