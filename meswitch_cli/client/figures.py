"""What a load showed: percentiles of latency, and throughput by expert."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from meswitch_cli.client.client import Outcome
from meswitch_cli.errors import MeswitchError, UsageError
from meswitch_cli.estimates import percentiles
from meswitch_cli.plot_labels import plain_label

PERCENTILES = (50, 90, 99)


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Percentiles in milliseconds of times in seconds; None without any."""
    if not values:
        return None
    return {name: round(1000 * value, 3) for name, value in percentiles(values, PERCENTILES).items()}


def figures(outcomes: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    """Everything `meswitch bench` reports of a load that took `seconds`.

    TTFT is from sending a request to the first piece of its answer, ITL between two pieces; milliseconds.
    """
    experts: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        experts[outcome.expert].append(outcome)
    errors = Counter(outcome.error for outcome in outcomes if outcome.error)
    return _summary(outcomes, seconds) | {
        "seconds": round(seconds, 3),
        "errors": dict(errors.most_common(5)),
        "experts": {name: _summary(experts[name], seconds) for name in sorted(experts)},
    }


def _summary(outcomes: Iterable[Outcome], seconds: float) -> dict[str, Any]:
    done = [outcome for outcome in outcomes if outcome.error is None]
    failed = sum(outcome.error is not None for outcome in outcomes)
    tokens = sum(outcome.completion_tokens for outcome in done)
    return {
        "requests": len(done),
        "failed": failed,
        "prompt_tokens": sum(outcome.prompt_tokens for outcome in done),
        "completion_tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 2),
        "requests_per_second": round(len(done) / seconds, 3),
        "ttft_ms": spread([outcome.first_token for outcome in done if outcome.first_token is not None]),
        "itl_ms": spread([gap for outcome in done for gap in outcome.gaps]),
        "request_ms": spread([outcome.seconds for outcome in done]),
    }


def check_plot(path: Path) -> None:
    """Refuse a picture that could not be drawn, before the load that it is to show.

    Raises:
        UsageError: another kind of file is asked for, or one in no folder.
        MeswitchError: matplotlib is not installed.
    """
    if path.suffix.lower() not in (".png", ".svg"):
        raise UsageError(f"--plot {path}: the file must end in .png or .svg")
    if not path.parent.is_dir():
        raise UsageError(f"--plot {path}: there is no folder {path.parent}")
    if find_spec("matplotlib") is None:
        raise MeswitchError("--plot needs matplotlib: pip install 'meswitch[plot]'")


def plot(outcomes: Sequence[Outcome], path: Path) -> None:
    """Distributions of first-token and inter-token times by expert, as PNG or SVG.

    Raises:
        UsageError, MeswitchError: as `check_plot`, or no request succeeded.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    done = [outcome for outcome in outcomes if outcome.error is None and outcome.first_token is not None]
    if not done:
        raise MeswitchError("nothing to draw: no request succeeded")
    figure = Figure(figsize=(9, 4), layout="constrained")
    first, between = figure.subplots(1, 2, sharey=True)
    for name in sorted({outcome.expert for outcome in done}):
        mine = [outcome for outcome in done if outcome.expert == name]
        for axes, times in (
            (first, [outcome.first_token or 0.0 for outcome in mine]),
            (between, [gap for outcome in mine for gap in outcome.gaps]),
        ):
            ordered = sorted(1000 * time for time in times)
            shares = [100 * (index + 1) / len(ordered) for index in range(len(ordered))]
            axes.step(ordered, shares, where="post", label=plain_label(name))
    for axes, label in ((first, "time to first token, ms"), (between, "between tokens, ms")):
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
        axes.set_xscale("log")
    first.set_ylabel("% of requests, of tokens")
    first.legend(fontsize="small")
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise MeswitchError(f"--plot {path}: {error.strerror}") from error
