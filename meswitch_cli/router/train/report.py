"""The report as people read it: Markdown tables and four pictures."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from meswitch_cli.errors import MeswitchError
from meswitch_cli.router.backends.registry import backend_class


def markdown(report: Mapping[str, Any]) -> str:
    """The report of a router as Markdown."""
    test, labels = report["test"], report["labels"]
    lines = [f"# Router: {', '.join(labels)}", "", *_headline(report), "", *_domains(test), "", *_confusion(test)]
    if "after_calibration" in test:
        lines += ["", *_calibration(test)]
    if "rewording" in report:
        lines += ["", *rewording(report["rewording"])]
    lines += ["", *_latency(report)]
    if report.get("downstream"):
        lines += ["", *_downstream(report["downstream"])]
    return "\n".join(lines) + "\n"


def _headline(report: Mapping[str, Any]) -> list[str]:
    lines = [
        "| router | accuracy [95 %] | macro-F1 | ECE | coverage at the gates | precision there | OOD AUROC | "
        "FPR at 95 % TPR |",
        "|---|---|---|---|---|---|---|---|",
        _row(backend_class(report["backend"]).title, report["test"]),
    ]
    for kind, figures in report.get("baselines", {}).items():
        name = f"baseline: {backend_class(kind).title}"
        lines.append(f"| {name} | {figures['failed']} | | | | | | |" if "failed" in figures else _row(name, figures))
    if "majority_accuracy" in report["test"]:
        lines.append(f"| baseline: majority | {percent(report['test']['majority_accuracy'])} | | | | | | |")
    return lines


def _row(name: str, figures: Mapping[str, Any]) -> str:
    cells = [name, interval(figures["accuracy"]), f"{figures['macro_f1']:.3f}"]
    cells += [f"{figures['after_calibration']['ece']:.3f}"]
    cells += [interval(figures["at_the_gates"][key]) for key in ("coverage", "precision")]
    outside = figures.get("out_of_domain")
    cells += [f"{outside['auroc']:.3f}", percent(outside["fpr_at_95_tpr"])] if outside else ["", ""]
    return f"| {' | '.join(cells)} |"


def _domains(test: Mapping[str, Any]) -> list[str]:
    lines = ["| domain | prompts | precision | recall | F1 |", "|---|---|---|---|---|"]
    for label, item in test.get("per_domain", {}).items():
        shares = " | ".join(percent(item[key]) for key in ("precision", "recall", "f1"))
        lines.append(f"| {label} | {item['prompts']:.0f} | {shares} |")
    return lines


def _confusion(test: Mapping[str, Any]) -> list[str]:
    columns = list(next(iter(test["confusion"].values())))
    lines = ["Where prompts go, after both gates:", "", f"| truth | {' | '.join(columns)} |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for label, row in test["confusion"].items():
        lines.append(f"| {label} | {' | '.join(str(row[column]) for column in columns)} |")
    return lines


def _calibration(test: Mapping[str, Any]) -> list[str]:
    lines = ["| probabilities | ECE | Brier | NLL, nats |", "|---|---|---|---|"]
    for name in ("before", "after"):
        item = test[f"{name}_calibration"]
        lines.append(f"| {name} calibration | {item['ece']:.4f} | {item['brier']:.4f} | {item['nll']:.4f} |")
    return lines


def rewording(figures: Mapping[str, Any]) -> list[str]:
    """The table of how often a decision stays when a prompt is reworded."""
    lines = [
        f"The same decision where {figures['prompts']} prompts are put in other words, %:",
        "",
        "| rewording, or characters of the prompt | same decision |",
        "|---|---|",
    ]
    rows = figures["by_rewording"] | figures["by_length"] | {"**all**": figures["same"]}
    return lines + [f"| {name} | {interval(item)} |" for name, item in rows.items()]


def _latency(report: Mapping[str, Any]) -> list[str]:
    lines = ["| words of the prompt | p50, ms | p95, ms | p99, ms |", "|---|---|---|---|"]
    for words, item in report["latency_ms"].items():
        lines.append(f"| {words} | {item['p50']:.1f} | {item['p95']:.1f} | {item['p99']:.1f} |")
    return lines


def _downstream(downstream: Mapping[str, Any]) -> list[str]:
    lines = [
        f"Loss of the chosen expert on {downstream['items']} held-out responses, nats a token:",
        "",
        "| chosen by | loss |",
        "|---|---|",
    ]
    return lines + [f"| {name} | {value:.4f} |" for name, value in downstream["loss"].items()]


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def interval(item: Mapping[str, float]) -> str:
    """A proportion with its interval, in percent."""
    return f"{100 * item['value']:.1f} [{100 * item['low']:.1f}, {100 * item['high']:.1f}]"


def plots(report: Mapping[str, Any]) -> dict[str, bytes]:
    """`report.png` and `report.svg`: risk and coverage, confusion, latency, calibration.

    Raises:
        MeswitchError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MeswitchError("plots need matplotlib: pip install 'meswitch[plot]'") from error
    test = report["test"]
    figure = Figure(figsize=(10, 8), layout="constrained")
    ((curve, matrix), (latency, calibration)) = figure.subplots(2, 2)
    points = test["risk_coverage"]
    curve.plot([item["coverage"] for item in points], [item["precision"] for item in points], marker=".")
    curve.axhline(test["target_precision"], color="grey", linestyle="--", label="target precision")
    curve.set(xlabel="coverage", ylabel="precision", title="precision and coverage as the threshold falls")
    curve.legend()
    rows = test["confusion"]
    columns = list(next(iter(rows.values())))
    matrix.imshow([[row[column] for column in columns] for row in rows.values()], cmap="Blues")
    matrix.set(xticks=range(len(columns)), xticklabels=columns, yticks=range(len(rows)), yticklabels=list(rows))
    matrix.set(xlabel="sent to", ylabel="truth", title="prompts")
    for y, row in enumerate(rows.values()):
        for x, column in enumerate(columns):
            matrix.text(x, y, str(row[column]), ha="center", va="center", color="black")
    for name in ("p50", "p95", "p99"):
        lengths = [int(words) for words in report["latency_ms"]]
        latency.plot(lengths, [item[name] for item in report["latency_ms"].values()], marker="o", label=name)
    latency.set(xlabel="words of the prompt", ylabel="ms", title="one decision", ylim=(0, None))
    latency.legend()
    names = ("ece", "brier", "nll")
    for offset, when in ((-0.2, "before"), (0.2, "after")):
        heights = [test[f"{when}_calibration"][name] for name in names]
        calibration.bar([index + offset for index in range(len(names))], heights, width=0.4, label=when)
    calibration.set(xticks=range(len(names)), xticklabels=["ECE", "Brier", "NLL"], title="calibration")
    calibration.legend()
    result = {}
    for kind in ("png", "svg"):
        stream = io.BytesIO()
        figure.savefig(stream, format=kind, dpi=120)
        result[f"report.{kind}"] = stream.getvalue()
    return result
