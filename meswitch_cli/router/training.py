"""`meswitch train-router` as a whole: data dealt, backend fitted, model fitted, figures taken."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from meswitch_cli.engine.contract import BASE
from meswitch_cli.errors import RouterError, UsageError
from meswitch_cli.names import require_name
from meswitch_cli.router.backends.backend import Backend, Kind
from meswitch_cli.router.backends.tfidf import Tfidf
from meswitch_cli.router.data import Example, RoutingData
from meswitch_cli.router.evaluation import baseline, measure_features, measure_latency
from meswitch_cli.router.fitting import fit_model
from meswitch_cli.router.head import Head, Scaling
from meswitch_cli.router.manifest import RouterManifest
from meswitch_cli.router.names import check_fallback
from meswitch_cli.router.router import STICKY_MARGIN, Router
from meswitch_cli.router.split import PARTS, part_hash, split
from meswitch_cli.router.store import NULL, FeatureStore

#: Told of progress: what is being done, and how many of how many prompts.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class TrainingSettings:
    """How a router is trained.

    Attributes:
        layer: of the probe; None: chosen on validation.
        max_tokens: of a prompt that the router reads.
        target_precision: of what is routed; sets the confidence threshold.
        lm_steps, lm_learning_rate: of the lm backend's fine-tuning.
    """

    backend: Kind = "probe"
    layer: int | None = None
    max_tokens: int = 256
    fallback: str = BASE
    target_precision: float = 0.95
    sticky_margin: float = STICKY_MARGIN
    lm_steps: int = 60
    lm_learning_rate: float = 5e-5
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.5 <= self.target_precision < 1:
            raise UsageError(f"--target-precision must be from 0.5 to below 1, not {self.target_precision}")
        if not 16 <= self.max_tokens <= 8192:
            raise UsageError(f"--max-tokens must be from 16 to 8192, not {self.max_tokens}")
        if not 0 <= self.sticky_margin <= 1:
            raise UsageError(f"--sticky-margin must be from 0 to 1, not {self.sticky_margin}")


@dataclass(frozen=True)
class FittedBackend:
    """A backend with what its fitting left: a head where it trained one, how features are to be scaled, remarks."""

    backend: Backend
    features: dict[str, torch.Tensor]
    standardise: bool
    head: Head | None = None
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class TrainedRouter:
    """A router with everything that its folder will hold."""

    router: Router
    manifest: RouterManifest
    store: FeatureStore
    report: dict[str, Any]


def train_router(
    data: RoutingData,
    settings: TrainingSettings,
    *,
    base: str | None = None,
    model: Path | None = None,
    experts: Mapping[str, str | None] | None = None,
    on_progress: Progress = lambda what, done, total: None,
) -> TrainedRouter:
    """Train a router.

    Args:
        base: folder or Hub id; the probe needs it.
        model: folder of the encoder, or of the small causal LM; the lm backend takes the base where it is None.
        experts: label to SHA-256 of the artifact's manifest.

    Raises:
        RouterError, UsageError: the data cannot train a router, or what the backend needs is not there.
    """
    check_fallback(settings.fallback, data.labels)
    for name in experts or {}:
        if name not in data.labels:
            raise RouterError(f"expert {name!r} is given, but no prompt is of its domain ({', '.join(data.labels)})")
    started = time.perf_counter()
    parts = split(data.examples, settings.seed)
    identity = _identity(base) if settings.backend == "probe" else (None, None)
    if identity[0] is not None:
        require_name(identity[0], f"--base {base}", RouterError)
    fitted = _fit_backend(parts, data.labels, settings, base, model, on_progress)
    scaling, store = _store(parts, data.labels, fitted)
    router_model = fit_model(
        data.labels,
        scaling,
        store,
        target_precision=settings.target_precision,
        seed=settings.seed,
        head=fitted.head,
    )
    router = Router(
        fitted.backend,
        router_model,
        fallback=settings.fallback,
        experts={label: (experts or {}).get(label) for label in data.labels},
        base_fingerprint=identity[1],
        sticky_margin=settings.sticky_margin,
    )
    seconds = time.perf_counter() - started
    report = _report(router, parts, fitted, settings, seconds, on_progress)
    manifest = RouterManifest(
        labels=data.labels,
        experts=router.experts,
        fallback=settings.fallback,
        backend=settings.backend,
        settings=fitted.backend.settings(),
        base_id=identity[0],
        base_fingerprint=identity[1],
        numbers=router_model.numbers() | {"sticky_margin": settings.sticky_margin},
        split=describe_split(parts),
        training=dataclasses.asdict(settings) | {"duplicates": data.duplicates} | dict(fitted.notes),
        metrics=headline(report["test"]),
        files=(),
        created_with="",
    )
    return TrainedRouter(router, manifest, store, report)


def _identity(base: str | None) -> tuple[str, str]:
    from meswitch_cli.artifact.base import base_fingerprint
    from meswitch_cli.checkpoint.architecture import architecture
    from meswitch_cli.checkpoint.checkpoint import Checkpoint

    if base is None:
        raise UsageError("--base is needed: the probe reads the base's hidden states")
    checkpoint = Checkpoint.open(base)
    return checkpoint.source.id, base_fingerprint(checkpoint, architecture(checkpoint.config, base))


def _fit_backend(
    parts: Mapping[str, Sequence[Example]],
    labels: tuple[str, ...],
    settings: TrainingSettings,
    base: str | None,
    model: Path | None,
    on_progress: Progress,
) -> FittedBackend:
    # Imported late: only one of them is needed.
    if settings.backend == "probe":
        from meswitch_cli.router.backends.probe_fitting import fit_probe

        return fit_probe(parts, labels, str(base), settings, on_progress)
    if settings.backend == "tfidf":
        tfidf = Tfidf.fit([item.text for item in parts["train"]], max_tokens=settings.max_tokens)
        return FittedBackend(tfidf, all_features(tfidf, parts, on_progress), standardise=False)
    if settings.backend == "encoder":
        from meswitch_cli.router.backends.encoder import Encoder

        if model is None:
            raise UsageError("--model DIR is needed: the folder of the sentence encoder")
        encoder = Encoder(model, max_tokens=settings.max_tokens)
        return FittedBackend(encoder, all_features(encoder, parts, on_progress), standardise=True)
    from meswitch_cli.router.backends.lm_training import fit_letter_model

    if model is None and base is None:
        raise UsageError("--model DIR is needed: the folder of the small causal language model")
    return fit_letter_model(parts, labels, str(model or base), settings, on_progress)


def all_features(
    backend: Backend, parts: Mapping[str, Sequence[Example]], on_progress: Progress
) -> dict[str, torch.Tensor]:
    """Every part's features, by part."""
    total = sum(map(len, parts.values()))
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        on_progress("features", done, total)

    return {part: backend.features([item.text for item in members], advance) for part, members in parts.items()}


def targets_of(examples: Sequence[Example], labels: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """`[n, labels]` probabilities, and `[n]` indices of certain labels with `NULL` for the others."""
    targets = torch.zeros(len(examples), len(labels))
    indices = torch.full((len(examples),), NULL)
    for row, example in enumerate(examples):
        if example.soft is not None:
            targets[row] = torch.tensor([example.soft.get(label, 0.0) for label in labels])
        elif example.domain is not None:
            targets[row, labels.index(example.domain)] = 1.0
        if example.domain is not None:
            indices[row] = labels.index(example.domain)
    return targets, indices


def _store(
    parts: Mapping[str, Sequence[Example]], labels: tuple[str, ...], fitted: FittedBackend
) -> tuple[Scaling, FeatureStore]:
    train = fitted.features["train"]
    if fitted.head is not None:
        scaling = Scaling.identity(train.shape[1])
    else:
        scaling = Scaling.standard(train) if fitted.standardise else Scaling.overall(train)
    stores = [store_of(parts[part], part, labels, fitted.features[part], scaling) for part in PARTS if parts[part]]
    whole = stores[0]
    for store in stores[1:]:
        whole = whole.joined(store)
    return scaling, whole


def store_of(
    examples: Sequence[Example], part: str, labels: tuple[str, ...], features: torch.Tensor, scaling: Scaling
) -> FeatureStore:
    """The examples of one part, scaled and rounded as they will be stored."""
    targets, indices = targets_of(examples, labels)
    return FeatureStore(
        scaling(features).clamp(-6e4, 6e4).half().float(),
        targets,
        indices,
        torch.full((len(examples),), PARTS.index(part), dtype=torch.uint8),
        torch.tensor([example.digest for example in examples]),
    )


def _report(
    router: Router,
    parts: Mapping[str, Sequence[Example]],
    fitted: FittedBackend,
    settings: TrainingSettings,
    seconds: float,
    on_progress: Progress,
) -> dict[str, Any]:
    test = parts["test"]
    on_progress("report", 0, 1)
    report = {
        "backend": settings.backend,
        "labels": list(router.labels),
        "seconds": seconds,
        "split": describe_split(parts),
        "notes": dict(fitted.notes),
        "thresholds": router.model.numbers(),
        "test": measure_features(
            router.model, fitted.features["test"], [item.domain for item in test], settings.target_precision
        ),
        "latency_ms": measure_latency(router, [item.text for item in test]),
        "cut_prompts": sum(router.is_cut(item.text) for members in parts.values() for item in members),
        "baselines": {"tfidf": _tfidf_baseline(parts, router.labels, settings)},
    }
    on_progress("report", 1, 1)
    return report


def _tfidf_baseline(
    parts: Mapping[str, Sequence[Example]], labels: tuple[str, ...], settings: TrainingSettings
) -> dict[str, Any]:
    """The same data through counted words; a reason instead of figures where that cannot be fitted."""
    backend = Tfidf.fit([item.text for item in parts["train"]], max_tokens=settings.max_tokens)
    features = all_features(backend, parts, lambda what, done, total: None)
    scaling, store = _store(parts, labels, FittedBackend(backend, features, standardise=False))
    try:
        model = fit_model(labels, scaling, store, target_precision=settings.target_precision, seed=settings.seed)
    except RouterError as error:
        return {"failed": str(error)}
    return baseline(backend, model, parts["test"], settings.target_precision)


def describe_split(parts: Mapping[str, Sequence[Example]]) -> dict[str, Any]:
    """Prompts and hash of every part."""
    return {
        part: {
            "prompts": sum(item.domain is not None for item in members),
            "null_prompts": sum(item.domain is None and item.soft is None for item in members),
            "sha256": part_hash(members),
        }
        for part, members in parts.items()
    }


def headline(test: Mapping[str, Any]) -> dict[str, Any]:
    """The few figures that router.json itself carries."""
    kept = ("accuracy", "macro_f1", "after_calibration", "at_the_gates", "coverage_at_target", "out_of_domain")
    return {key: test[key] for key in kept if key in test}
