"""`meswitch train-router` as a whole: data dealt, backend fitted, model fitted, figures taken."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from meswitch_cli.errors import RouterError, UsageError
from meswitch_cli.printable import require_name
from meswitch_cli.router.backends.base import FolderBase
from meswitch_cli.router.backends.contract import NULL, Backend, FitRequest, FittedBackend, LabelledTexts, Progress
from meswitch_cli.router.backends.registry import Kind, backend_class
from meswitch_cli.router.decide.head import Scaling
from meswitch_cli.router.decide.labels import check_fallback
from meswitch_cli.router.decide.router import Router
from meswitch_cli.router.store.features import PARTS, FeatureStore
from meswitch_cli.router.store.known import KnownPrompt
from meswitch_cli.router.store.manifest import RouterManifest
from meswitch_cli.router.train.data import Example, RoutingData
from meswitch_cli.router.train.doubts import doubts, twins
from meswitch_cli.router.train.evaluation import baseline, measure_features, measure_latency
from meswitch_cli.router.train.fitting import badness, fit_model
from meswitch_cli.router.train.general import General
from meswitch_cli.router.train.generalising import Known
from meswitch_cli.router.train.rewording import rewording_figures
from meswitch_cli.router.train.settings import TrainingSettings
from meswitch_cli.router.train.split import part_hash, split

#: The backend that every report compares with: it needs no model.
BASELINE: Kind = "tfidf"
#: What the prompts that come with the package are called among the parts of the data.
GENERAL_PART = "general"


@dataclass(frozen=True, kw_only=True)
class TrainedRouter:
    """A router with everything that its folder will hold."""

    router: Router
    backend: Backend
    manifest: RouterManifest
    store: FeatureStore
    known: tuple[KnownPrompt, ...]
    report: dict[str, Any]


def train_router(
    data: RoutingData,
    settings: TrainingSettings,
    *,
    base: str | None = None,
    model: Path | None = None,
    experts: Mapping[str, str | None] | None = None,
    read_ahead: Path | None = None,
    on_progress: Progress = lambda what, done, total: None,
) -> TrainedRouter:
    """Train a router.

    Args:
        base: folder or Hub id; the probe needs it.
        model: folder of the encoder, or of the small causal LM; the lm backend takes the base where it is None.
        experts: label to SHA-256 of the artifact's manifest.
        read_ahead: folder for the probe's hidden states; a training that was interrupted goes on from there. Whoever
            gives it removes it.

    Raises:
        RouterError, UsageError: the data cannot train a router, or what the backend needs is not there.
    """
    check_fallback(settings.fallback, data.labels)
    for name in experts or {}:
        if name not in data.labels:
            raise RouterError(f"expert {name!r} is given, but no prompt is of its domain ({', '.join(data.labels)})")
    started = time.perf_counter()
    parts = split(data.examples, settings.seed)
    general = General.without(data.examples)
    texts = {part: labelled(members, data.labels) for part, members in parts.items()}
    texts |= {GENERAL_PART: labelled(general.examples, data.labels)}
    request = FitRequest(
        parts=texts,
        labels=data.labels,
        settings=settings,
        base=FolderBase(base) if base is not None else None,
        model=model,
        read_ahead=read_ahead,
        badness=lambda features: badness(
            scaled_store(parts, texts, general, features, standardise=True)[1], data.labels
        ),
        on_progress=on_progress,
    )
    made = backend_class(settings.backend)
    base_id = fingerprint = None
    if made.needs_base:
        if request.base is None:
            raise UsageError(f"--base is needed: the {settings.backend} reads the base's hidden states")
        base_id = request.base.checkpoint.source.id
        require_name(base_id, f"--base {base}", RouterError)
        fingerprint = request.base.fingerprint
    fitted = made.fit(request)
    scaling, store = _fitted_store(parts, request, general, fitted)
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
        sticky_margin=settings.sticky_margin,
        gate=settings.gate,
    )
    seconds = time.perf_counter() - started
    report = _report(router, parts, general, fitted, request, settings, seconds)
    manifest = RouterManifest(
        labels=data.labels,
        experts={label: (experts or {}).get(label) for label in data.labels},
        fallback=settings.fallback,
        backend=settings.backend,
        settings=fitted.backend.settings(),
        base_id=base_id,
        base_fingerprint=fingerprint,
        numbers=router_model.numbers() | {"sticky_margin": settings.sticky_margin},
        split=describe_split(parts),
        training=dataclasses.asdict(settings) | {"duplicates": data.duplicates} | dict(fitted.notes),
        metrics=headline(report["test"]),
        files=(),
        created_with="",
    )
    known = known_prompts(store, len(data.labels), excerpts([*data.examples, *general.examples]))
    return TrainedRouter(
        router=router,
        backend=fitted.backend,
        manifest=manifest,
        store=store,
        known=known if settings.excerpts else (),
        report=report,
    )


def excerpts(examples: Sequence[Example]) -> dict[int, KnownPrompt]:
    """The beginnings of prompts, by digest."""
    return {
        item.digest: KnownPrompt.of(item.text, item.digest, item.domain or item.group or "no domain")
        for item in examples
    }


def known_prompts(store: FeatureStore, classes: int, found: Mapping[int, KnownPrompt]) -> tuple[KnownPrompt, ...]:
    """Those of the gate's points, in their order; none where not all are found."""
    digests = store.digests[Known.of(store, classes).points].tolist()
    return tuple(found[digest] for digest in digests) if all(digest in found for digest in digests) else ()


def labelled(examples: Sequence[Example], labels: tuple[str, ...]) -> LabelledTexts:
    """Examples as backends and heads see them."""
    targets = torch.zeros(len(examples), len(labels))
    indices = torch.full((len(examples),), NULL)
    for row, example in enumerate(examples):
        if example.soft is not None:
            targets[row] = torch.tensor([example.soft.get(label, 0.0) for label in labels])
        elif example.domain is not None:
            targets[row, labels.index(example.domain)] = 1.0
        if example.domain is not None:
            indices[row] = labels.index(example.domain)
    return LabelledTexts(tuple(example.text for example in examples), targets, indices)


def _fitted_store(
    parts: Mapping[str, Sequence[Example]], request: FitRequest, general: General, fitted: FittedBackend
) -> tuple[Scaling, FeatureStore]:
    standardise = None if fitted.head is not None else fitted.standardise
    return scaled_store(parts, request.parts, general, fitted.features, standardise=standardise)


def scaled_store(
    parts: Mapping[str, Sequence[Example]],
    texts: Mapping[str, LabelledTexts],
    general: General,
    features: Mapping[str, torch.Tensor],
    *,
    standardise: bool | None,
) -> tuple[Scaling, FeatureStore]:
    """The scaling, and every example scaled by it; `standardise` None: a head is given, for features as they are."""
    known = torch.cat([features["train"], features[GENERAL_PART]])
    if standardise is None:
        scaling = Scaling.identity(known.shape[1])
    else:
        scaling = Scaling.standard(known) if standardise else Scaling.overall(known)
    whole = general.store(texts[GENERAL_PART], features[GENERAL_PART], scaling)
    for part in PARTS:
        if parts[part]:
            whole = whole.joined(store_of(parts[part], texts[part], part, features[part], scaling))
    return scaling, whole


def store_of(
    examples: Sequence[Example], texts: LabelledTexts, part: str, features: torch.Tensor, scaling: Scaling
) -> FeatureStore:
    """The examples of one part, scaled and rounded as they will be stored."""
    return FeatureStore(
        scaling(features).clamp(-6e4, 6e4).half().float(),
        texts.targets,
        texts.labels,
        torch.full((len(examples),), PARTS.index(part), dtype=torch.uint8),
        torch.tensor([example.digest for example in examples]),
        torch.tensor([len(example.text) for example in examples]),
        *(torch.full((len(examples),), -1) for _ in ("fields", "groups")),
    )


def _report(
    router: Router,
    parts: Mapping[str, Sequence[Example]],
    general: General,
    fitted: FittedBackend,
    request: FitRequest,
    settings: TrainingSettings,
    seconds: float,
) -> dict[str, Any]:
    test = parts["test"]
    request.on_progress("report", 0, 1)
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
        "doubts": doubts(router.model, fitted.features["test"], test) if settings.excerpts else None,
        "twins": twins(router.model, fitted.features["test"], test),
        "rewording": rewording_figures(router.backend, router.model, [item.text for item in test]),
        "latency_ms": measure_latency(router, [item.text for item in test]),
        "cut_prompts": sum(router.is_cut(item.text) for members in parts.values() for item in members),
        "baselines": {BASELINE: _baseline(parts, general, request, settings)},
    }
    request.on_progress("report", 1, 1)
    return report


def _baseline(
    parts: Mapping[str, Sequence[Example]], general: General, request: FitRequest, settings: TrainingSettings
) -> dict[str, Any]:
    """The same data through `BASELINE`; a reason instead of figures where that cannot be fitted."""
    fitted = backend_class(BASELINE).fit(dataclasses.replace(request, on_progress=lambda what, done, total: None))
    scaling, store = _fitted_store(parts, request, general, fitted)
    precision = settings.target_precision
    try:
        model = fit_model(request.labels, scaling, store, target_precision=precision, seed=settings.seed)
    except RouterError as error:
        return {"failed": str(error)}
    return baseline(fitted.backend, model, parts["test"], precision)


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
