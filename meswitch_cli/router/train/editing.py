"""Adding and removing experts: head, temperature and gates are refitted on stored features, in seconds."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from meswitch_cli.errors import RouterError
from meswitch_cli.router.backends.registry import backend_class
from meswitch_cli.router.decide.backend import FeatureSource
from meswitch_cli.router.decide.labels import check_label
from meswitch_cli.router.decide.model import RouterModel
from meswitch_cli.router.store.artifact import RouterArtifact
from meswitch_cli.router.store.features import FeatureStore
from meswitch_cli.router.store.known import KnownPrompt
from meswitch_cli.router.store.manifest import RouterManifest
from meswitch_cli.router.train import measures
from meswitch_cli.router.train.data import MIN_PROMPTS, Example, only_known_domains, without_duplicates
from meswitch_cli.router.train.fitting import fit_model
from meswitch_cli.router.train.split import split
from meswitch_cli.router.train.training import describe_split, excerpts, known_prompts, labelled, store_of


@dataclass(frozen=True, kw_only=True)
class Edit:
    """A router with one expert more or less, not yet written.

    Attributes:
        before, after: the other experts' recall on the test part, each with its interval.
        seconds: of the new prompts' features, and of the refit.
    """

    manifest: RouterManifest
    model: RouterModel
    store: FeatureStore
    known: tuple[KnownPrompt, ...]
    before: dict[str, dict[str, Any]]
    after: dict[str, dict[str, Any]]
    added: dict[str, Any] | None
    feature_seconds: float
    refit_seconds: float

    def refuse_regression(self, limit: float) -> None:
        """Check that no expert lost more than allowed.

        Raises:
            RouterError: one did.
        """
        for label, old in self.before.items():
            lost = old["value"] - self.after[label]["value"]
            if lost > limit + 1e-9:
                raise RouterError(
                    f"expert {label!r} would lose {100 * lost:.1f} points of recall ({100 * old['value']:.1f} to "
                    f"{100 * self.after[label]['value']:.1f} %), more than --max-regression {limit} allows; "
                    "nothing was changed. Give data that is further from its domain, or raise --max-regression"
                )


def add_expert(
    artifact: RouterArtifact,
    backend: FeatureSource,
    name: str,
    examples: Sequence[Example],
    *,
    digest: str | None = None,
) -> Edit:
    """Add an expert from its prompts; the other experts' prompts are not needed again.

    Raises:
        RouterError: the name is taken or impossible, the prompts are too few or known under another domain, or the
            backend cannot be extended.
    """
    check_label(name, "--expert")
    manifest = artifact.manifest
    if name in manifest.labels:
        raise RouterError(f"expert {name!r} is in the router already; remove it first: meswitch router remove")
    _require_extendable(manifest)
    store = artifact.store()
    kept = _new_examples(manifest, store, name, examples)
    parts = split(kept, int(manifest.training.get("seed", 0)))
    labels = tuple(sorted((*manifest.labels, name)))
    started = time.perf_counter()
    joined = store.relabelled(manifest.labels, labels)
    for part, members in parts.items():
        if members:
            texts = labelled(members, labels)
            features = backend.features(texts.texts)
            joined = joined.joined(store_of(members, texts, part, features, artifact.model.scaling))
    feature_seconds = time.perf_counter() - started
    experts = dict(manifest.experts) | {name: digest}
    added = describe_split(parts)
    edit = _refit(artifact, labels, joined, experts, feature_seconds, kept)
    return replace(
        edit,
        added=_recalls(edit.model, joined, labels)[name],
        manifest=replace(edit.manifest, split=dict(manifest.split) | {f"added {name}": added}),
    )


def learn(artifact: RouterArtifact, backend: FeatureSource, examples: Sequence[Example]) -> Edit:
    """Learn from prompts whose right expert somebody said: of experts that are in the router, or of no domain.

    What was said last of a prompt counts, and more than what the router knew of it. All of them train: the figures
    stay those of the data that the router was made from.

    Raises:
        RouterError: a prompt is of an expert that the router does not have, there is none, or the backend cannot be
            refitted.
    """
    manifest = artifact.manifest
    _require_extendable(manifest)
    only_known_domains(examples, manifest.labels)
    latest = list({example.digest: example for example in examples}.values())
    if not latest:
        raise RouterError("there is no prompt to learn from")
    started = time.perf_counter()
    texts = labelled(latest, manifest.labels)
    features = backend.features(texts.texts)
    store = artifact.store().without([example.digest for example in latest])
    store = store.joined(store_of(latest, texts, "train", features, artifact.model.scaling))
    seconds = time.perf_counter() - started
    edit = _refit(artifact, manifest.labels, store, manifest.experts, seconds, latest)
    taught = describe_split({"train": latest})["train"]
    split_now = dict(manifest.split) | {f"learned {len(manifest.split)}": taught}
    return replace(edit, manifest=replace(edit.manifest, split=split_now))


def remove_expert(artifact: RouterArtifact, name: str) -> Edit:
    """Remove an expert and its prompts.

    Raises:
        RouterError: there is no such expert, it is the fallback, or fewer than two would be left.
    """
    manifest = artifact.manifest
    if name not in manifest.labels:
        raise RouterError(f"expert {name!r} is not in the router ({', '.join(manifest.labels)})")
    if manifest.fallback == name:
        raise RouterError(f"expert {name!r} is the router's fallback; train a router with another fallback")
    if len(manifest.labels) == 2:
        raise RouterError(f"without {name!r} one expert would be left, and nothing to route")
    _require_extendable(manifest)
    labels = tuple(label for label in manifest.labels if label != name)
    experts = {label: manifest.experts[label] for label in labels}
    store = artifact.store().relabelled(manifest.labels, labels)
    edit = _refit(artifact, labels, store, experts, 0.0, ())
    return replace(edit, manifest=replace(edit.manifest, split=dict(manifest.split) | {f"removed {name}": {}}))


def _require_extendable(manifest: RouterManifest) -> None:
    if not backend_class(manifest.backend).extendable:
        raise RouterError(
            f"the {manifest.backend} backend itself learns which experts there are: a router with it must be trained "
            "anew for others: meswitch train-router"
        )


def _new_examples(
    manifest: RouterManifest, store: FeatureStore, name: str, examples: Sequence[Example]
) -> list[Example]:
    """The new expert's prompts without duplicates; none may be in the router under another domain."""
    kept, _ = without_duplicates([replace(example, domain=name) for example in examples])
    if len(kept) < MIN_PROMPTS:
        raise RouterError(f"domain {name!r} has {len(kept)} different prompts; at least {MIN_PROMPTS} are needed")
    known = {int(digest): int(label) for digest, label in zip(store.digests, store.labels, strict=True)}
    for example in kept:
        if example.digest in known:
            label = known[example.digest]
            other = repr(manifest.labels[label]) if label >= 0 else "of no domain"
            raise RouterError(f"{example.where}: this prompt is in the router already, as {other}; delete the line")
    return kept


def _refit(
    artifact: RouterArtifact,
    labels: tuple[str, ...],
    store: FeatureStore,
    experts: Mapping[str, str | None],
    feature_seconds: float,
    new: Sequence[Example],
) -> Edit:
    manifest = artifact.manifest
    before = _recalls(artifact.model, artifact.store(), manifest.labels)
    started = time.perf_counter()
    model = fit_model(
        labels,
        artifact.model.scaling,
        store,
        target_precision=float(manifest.training.get("target_precision", 0.95)),
        seed=int(manifest.training.get("seed", 0)),
    )
    seconds = time.perf_counter() - started
    after = _recalls(model, store, labels)
    return Edit(
        manifest=replace(
            manifest,
            labels=labels,
            experts=dict(experts),
            numbers=model.numbers() | {"sticky_margin": manifest.numbers["sticky_margin"]},
            metrics={"recall": after},
        ),
        model=model,
        store=store,
        known=known_prompts(store, len(labels), {item.digest: item for item in artifact.known()} | excerpts(new)),
        before={label: before[label] for label in labels if label in before},
        after={label: after[label] for label in labels if label in before},
        added=None,
        feature_seconds=feature_seconds,
        refit_seconds=seconds,
    )


def _recalls(model: RouterModel, store: FeatureStore, labels: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Each expert's share of its test prompts whose highest score is its own."""
    rows = store.rows("test")
    # The store's features are scaled already.
    best = model.head(store.features[rows]).argmax(1)
    truth = store.labels[rows]
    return {
        label: measures.proportion(int(((best == index) & (truth == index)).sum()), int((truth == index).sum()))
        for index, label in enumerate(labels)
    }
