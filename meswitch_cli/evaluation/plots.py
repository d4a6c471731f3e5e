"""A report's plots as SVG text, drawn by matplotlib and holding everything that they need."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from meswitch_cli.estimates import Z_95
from meswitch_cli.plot_labels import plain_label


def figures(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(caption, SVG) of every plot that the report has data for; none where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return []
    found = []
    for expert, name in dict.fromkeys((row["expert"], row["set"]) for row in report["fidelity"]):
        rows = [row for row in report["fidelity"] if row["expert"] == expert and row["set"] == name]
        found.append((f"Size against KL to {expert} on {name}; bars: 95 % by document", frontier(rows)))
    for model in dict.fromkeys(row["model"] for row in report["tensors"]):
        rows = [row for row in report["tensors"] if row["model"] == model and row["layer"] is not None]
        if rows:
            found.append((f"Error of {model} by layer and projection", error_by_layer(rows)))
    for model in dict.fromkeys(row["model"] for row in report["saliency"]):
        rows = [row for row in report["saliency"] if row["model"] == model]
        caption = f"Part of {model}'s rounding error in its worst input channels; the mark: the channels kept in 16 bit"
        found.append((caption, saliency_profile(rows)))
    pairs = [row for row in report["comparisons"] if row["role"] == "full expert"]
    if pairs:
        caption = "Documents that a model lost (left) and gained (right) against its full expert"
        found.append((caption, flips(pairs)))
    return found


def frontier(rows: Sequence[Mapping[str, Any]]) -> str:
    """Megabytes against mean KL, with the base's KL as a line."""
    figure, axes = _axes(7.5, 4.2)
    for row in rows:
        ours = row["kind"] == "artifact"
        error = Z_95 * (row["kl_mean_se"] or 0.0)
        low = min(error, 0.99 * row["kl_mean"])  # the axis is logarithmic
        axes.errorbar(
            row["nbytes"] / 1e6,
            row["kl_mean"],
            yerr=[[low], [error]],
            marker="o" if ours else "s",
            color="#1f5fa8" if ours else "#888888",
            capsize=2,
        )
        axes.annotate(
            plain_label(row["model"]),
            (row["nbytes"] / 1e6, row["kl_mean"]),
            (4, 4),
            textcoords="offset points",
            fontsize=7,
        )
    if rows[0].get("base_kl_mean"):
        axes.axhline(rows[0]["base_kl_mean"], color="#b03030", linestyle="--", linewidth=1, label="base")
        axes.legend(fontsize="small")
    axes.set_yscale("log")
    axes.margins(x=0.2)  # room for the names
    axes.set_xlabel("size, MB")
    axes.set_ylabel("KL to the full expert, nats a token")
    return _svg(figure)


def error_by_layer(rows: Sequence[Mapping[str, Any]]) -> str:
    """Relative error of each projection over the layers, of the outputs where it was measured."""
    figure, axes = _axes(7.5, 3.6)
    measured = any(row["output_error"] is not None for row in rows)
    name = "output_error" if measured else "weight_error"
    for kind in dict.fromkeys(row["projection"] for row in rows):
        part = sorted((row for row in rows if row["projection"] == kind), key=lambda row: row["layer"])
        values = [100 * (row[name] or 0.0) for row in part]
        axes.plot([row["layer"] for row in part], values, marker="o", markersize=3, label=kind)
    axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    axes.set_xlabel("decoder layer")
    axes.set_ylabel(f"relative {'output' if measured else 'weight'} error, %")
    axes.legend(fontsize="x-small", ncols=4)
    return _svg(figure)


def saliency_profile(rows: Sequence[Mapping[str, Any]]) -> str:
    """Cumulative share of the rounding error over input channels, worst first."""
    figure, axes = _axes(7.5, 3.6)
    for row in rows:
        (line,) = axes.plot(row["channels"], [100 * share for share in row["share"]], label=row["projection"])
        if row["kept"]:
            axes.plot([row["kept"]], [100 * row["kept_share"]], marker="x", color=line.get_color())
    axes.set_xscale("log", base=2)
    axes.set_xlabel("input channels, worst first")
    axes.set_ylabel("part of the error, %")
    axes.legend(fontsize="x-small", ncols=2)
    return _svg(figure)


def flips(rows: Sequence[Mapping[str, Any]]) -> str:
    """Documents lost and gained in each comparison, with the verdict beside them."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _axes(7.5, 1.2 + 0.32 * len(rows))
    places = range(len(rows))
    lost, gained = ([row[name] for row in rows] for name in ("lost", "gained"))
    axes.barh(places, [-count for count in lost], color="#b03030", label="lost")
    axes.barh(places, gained, color="#2f7d4f", label="gained")
    reach = max(1, *lost, *gained)
    axes.set_xlim(-1.15 * reach, 2.2 * reach)  # room for the verdicts
    for place, row in zip(places, rows, strict=True):
        text = f"−{row['lost']} +{row['gained']} of {row['documents']}: {row['verdict']}"
        axes.annotate(text, (row["gained"], place), (4, 0), textcoords="offset points", va="center", fontsize=7)
    axes.axvline(0, color="#444444", linewidth=0.8)
    axes.set_yticks(places, [plain_label(f"{row['model']}: {row['task']}") for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    axes.set_xlabel("documents")
    return _svg(figure)


def _axes(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    return figure, axes


def _svg(figure: Any) -> str:
    """SVG without date and with fixed ids, so that two runs draw the same bytes."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "meswitch", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
