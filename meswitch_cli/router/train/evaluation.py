"""A router's figures on labelled prompts."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from meswitch_cli.checkpoint.source import resolve
from meswitch_cli.errors import RouterError
from meswitch_cli.estimates import percentiles
from meswitch_cli.names import BASE
from meswitch_cli.router.decide.backend import FeatureSource
from meswitch_cli.router.decide.gates import risk_coverage
from meswitch_cli.router.decide.model import RouterModel
from meswitch_cli.router.decide.router import Router
from meswitch_cli.router.store.artifact import RouterArtifact
from meswitch_cli.router.train import measures
from meswitch_cli.router.train.data import Example
from meswitch_cli.router.train.losses import downstream, expert_losses
from meswitch_cli.router.train.rewording import rewording_figures

#: Prompt lengths, in words, at which latency is measured.
LENGTHS = (16, 64, 256)
REPEATS = 20
#: Points of the risk-coverage curve that a report keeps.
_CURVE_POINTS = 60


def measure_features(
    model: RouterModel, features: torch.Tensor, truth: Sequence[str | None], target_precision: float
) -> dict[str, Any]:
    """Every figure that follows from features `[n, d]` as the backend gives them; None is the truth of a null prompt.

    Accuracy and calibration are of the domains' prompts before the gates; precision, coverage and the confusion
    matrix are after them.
    """
    inside = [index for index, label in enumerate(truth) if label is not None]
    outside = [index for index, label in enumerate(truth) if label is None]
    scores = model.scores(features)
    raw = torch.softmax(scores, dim=1).double().numpy()
    calibrated = model.probabilities(scores).double().numpy()
    distances = model.distances(features).double().numpy()
    judged = model.judge(features)
    went = [item.label if item.verdict == "routed" else "fallback" for item in judged]
    result: dict[str, Any] = {
        "prompts": len(inside),
        "null_prompts": len(outside),
        "confusion": measures.confusion(went, truth, model.labels),
        "target_precision": target_precision,
    }
    if inside:
        known = [str(truth[index]) for index in inside]
        index_of = np.array([model.labels.index(label) for label in known])
        best = [judged[index].label for index in inside]
        right = sum(mine == true for mine, true in zip(best, known, strict=True))
        labels = measures.per_label(best, known, model.labels)
        result |= {
            "accuracy": measures.proportion(right, len(inside)),
            "macro_f1": float(np.mean([item["f1"] for item in labels.values()])),
            "majority_accuracy": max(Counter(known).values()) / len(known),
            "per_domain": labels,
            "before_calibration": _calibration(raw[inside], index_of),
            "after_calibration": _calibration(calibrated[inside], index_of),
            "at_the_gates": _gated(went, truth, inside),
            "risk_coverage": _curve(calibrated[inside], index_of),
        }
        result["coverage_at_target"] = max(
            (point["coverage"] for point in result["risk_coverage"] if point["precision"] >= target_precision),
            default=0.0,
        )
    if inside and outside:
        result["out_of_domain"] = {
            "auroc": measures.auroc(distances[inside], distances[outside]),
            "fpr_at_95_tpr": measures.false_positive_rate(distances[inside], distances[outside]),
            "auroc_by_confidence": measures.auroc(-calibrated[inside].max(1), -calibrated[outside].max(1)),
            "refused": measures.proportion(sum(went[index] == "fallback" for index in outside), len(outside)),
        }
    return result


def _calibration(probabilities: measures.Array, truth: Any) -> dict[str, float]:
    return {
        "ece": measures.calibration_error(probabilities, truth),
        "brier": measures.brier_score(probabilities, truth),
        "nll": measures.negative_log_likelihood(probabilities, truth),
    }


def _gated(went: Sequence[str], truth: Sequence[str | None], inside: Sequence[int]) -> dict[str, Any]:
    """Of the domains' prompts: how many were routed, and how many of those rightly."""
    routed = [index for index in inside if went[index] != "fallback"]
    right = sum(went[index] == truth[index] for index in routed)
    return {
        "coverage": measures.proportion(len(routed), len(inside)),
        "precision": measures.proportion(right, len(routed)),
    }


def _curve(probabilities: measures.Array, truth: Any) -> list[dict[str, float]]:
    confidence, correct = probabilities.max(1), probabilities.argmax(1) == truth
    points = risk_coverage(confidence.tolist(), correct.tolist())
    step = max(1, len(points) // _CURVE_POINTS)
    kept = [*points[:-1:step], points[-1]]
    return [
        {"confidence": point.confidence, "coverage": point.coverage, "precision": point.precision} for point in kept
    ]


def evaluate(
    router: Router,
    examples: Sequence[Example],
    target_precision: float,
    on_done: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Route examples and measure."""
    features = router.backend.features([example.text for example in examples], on_done)
    truth = [example.domain for example in examples]
    return measure_features(router.model, features, truth, target_precision)


def measure_latency(router: Router, texts: Sequence[str], lengths: Sequence[int] = LENGTHS) -> dict[str, Any]:
    """Milliseconds of whole decisions, one prompt at a time, by words of the prompt."""
    words = itertools.cycle(word for text in texts for word in text.split())
    result = {}
    for length in lengths:
        took = []
        for _ in range(REPEATS + 2):
            prompt = " ".join(itertools.islice(words, length))
            started = time.perf_counter()
            router.route(prompt)
            took.append(1000 * (time.perf_counter() - started))
        result[str(length)] = percentiles(took[2:], (50, 95, 99))  # the first ones warm up
    return result


def baseline(backend: FeatureSource, model: RouterModel, examples: Sequence[Example], target: float) -> dict[str, Any]:
    """The figures of another router on the same examples, shortened to what a comparison shows."""
    whole = measure_features(
        model, backend.features([item.text for item in examples]), [item.domain for item in examples], target
    )
    kept = ("accuracy", "macro_f1", "after_calibration", "at_the_gates", "coverage_at_target", "out_of_domain")
    return {key: whole[key] for key in kept if key in whole}


def evaluation_report(
    artifact: RouterArtifact,
    router: Router,
    examples: Sequence[Example],
    experts: Mapping[str, Path],
    base: str | None,
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, Any]:
    """The report of `meswitch router eval`: figures, latency, and with experts given their loss on the responses.

    Raises:
        RouterError: an expert of the router is not given, or an example has no response where experts are.
    """
    target = float(artifact.manifest.training.get("target_precision", 0.95))
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        on_progress("routing", done, len(examples))

    report: dict[str, Any] = {
        "backend": artifact.manifest.backend,
        "labels": list(router.labels),
        "thresholds": router.model.numbers(),
        "test": evaluate(router, examples, target, advance),
        "rewording": rewording_figures(router.backend, router.model, [item.text for item in examples]),
        "latency_ms": measure_latency(router, [item.text for item in examples]),
        "bytes": artifact.nbytes,
    }
    if experts:
        report["downstream"] = _downstream(router, examples, experts, base)
    return report


def _downstream(
    router: Router, examples: Sequence[Example], experts: Mapping[str, Path], base: str | None
) -> dict[str, Any]:
    if base is None:
        raise RouterError("the experts' losses are compared with the base's: give --base")
    missing = [label for label in router.labels if label not in experts]
    if missing:
        raise RouterError(f"no expert is given for {', '.join(missing)}: --artifact NAME=DIR")
    inside = [item for item in examples if item.domain is not None]
    folder = resolve(base).path
    chosen = {label: experts[label] for label in router.labels}
    losses = expert_losses(chosen | {BASE: folder}, inside, base)
    base_losses = losses.pop(BASE)
    routed = [router.route(item.text).expert for item in inside]
    return downstream(losses, base_losses, [str(item.domain) for item in inside], routed)
