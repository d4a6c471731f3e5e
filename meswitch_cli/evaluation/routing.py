"""What a router is worth: the mixed set under its choices, beside the right choice, a random one, the base and the
full experts.

Every compressed expert answers everything once; a choice then only picks whose result counts.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np

from meswitch_cli.errors import MeswitchError, UsageError
from meswitch_cli.evaluation.fidelity import EncodedItem
from meswitch_cli.evaluation.job import Evaluation, OnStep
from meswitch_cli.evaluation.passes import Arithmetic, logits_of
from meswitch_cli.evaluation.statistics import Array, ratio_of_sums
from meswitch_cli.evaluation.subjects import BASE, Candidate
from meswitch_cli.evaluation.task_job import Runs
from meswitch_cli.evaluation.tasks import wilson
from meswitch_cli.model.weights import Weights
from meswitch_cli.router.backends.base import FolderBase
from meswitch_cli.router.decide.router import Router
from meswitch_cli.router.store import Policy, RouterArtifact, check_membership, open_router
from meswitch_cli.router.store.manifest import MANIFEST_FILE

#: An artifact that was made anew would be measured under choices that were learned for another one.
POLICY = Policy(
    "this evaluation", "give --expert {name}=FOLDER and its --artifact too", UsageError, another_artifact="error"
)
FULL = "full experts"
CHOICES = ("base", "random", "routed", "oracle", FULL)


def check_router(evaluation: Evaluation) -> None:
    """Refuse, before anything is measured, a router that does not go with the base and the artifacts.

    Raises:
        RouterError: it is for another base or another artifact of an expert.
        UsageError: no expert's own texts or tasks are given, or an artifact is missing.
    """
    path = evaluation.request.router
    if path is not None:
        owners = [item.owner for item in evaluation.sets] + [item.owner for item in evaluation.tasks]
        if not any(owners):
            raise UsageError(f"--router {path}: no mixed set; label texts or tasks with their experts: LABEL=FILE")
        manifest = RouterArtifact.open(path).manifest
        check_membership(manifest.trained_for, _base(evaluation), _digests(routed_artifacts(evaluation)), POLICY)


def routed_artifacts(evaluation: Evaluation) -> dict[str, Candidate]:
    """The artifact of each expert, the first where it has several; as it is served, where that is something else."""
    found: dict[str, Candidate] = {}
    for item in evaluation.candidates:
        first = found.setdefault(item.expert, item) if item.kind == "artifact" else None
        if first and item.served and item.facts is first.facts:
            found[item.expert] = item
    return found


def _base(evaluation: Evaluation) -> FolderBase:
    return FolderBase(evaluation.request.base, evaluation.base.fingerprint)


def _digests(artifacts: Mapping[str, Candidate]) -> dict[str, str | None]:
    return {label: item.facts["manifest_sha256"] for label, item in artifacts.items()}


def measure_router(evaluation: Evaluation, runs: Runs, on_step: OnStep = lambda what: None) -> None:
    """Fill the report's `router` from the labelled sets and tasks."""
    request, report = evaluation.request, evaluation.report
    if request.router is None:
        return
    try:
        artifacts = routed_artifacts(evaluation)
        router = open_router(request.router, _base(evaluation), _digests(artifacts), POLICY)
        artifacts = {label: artifacts[label] for label in router.labels}
        on_step("router: losses of every compressed expert on the mixed set")
        loss, decisions = _losses(evaluation, router, artifacts)
        tasks = _task_scores(evaluation, router, artifacts, runs)
    except MeswitchError as error:
        report.fail("router", str(error))
        return
    if loss is None and not tasks:
        report.fail("router", "no mixed set: label texts or tasks with their experts, --text LABEL=FILE")
        return
    right = np.array([float(chosen == owner) for owner, chosen in decisions])
    accuracy = asdict(wilson(right)) if decisions else None
    report.router = {
        "router": request.router.resolve().name,
        "manifest_sha256": hashlib.sha256((request.router / MANIFEST_FILE).read_bytes()).hexdigest(),
        "labels": list(router.labels),
        "loss": loss,
        "tasks": tasks,
        "accuracy": accuracy,
        "decisions": [
            {"owner": owner, "chosen": chosen, "count": count}
            for (owner, chosen), count in sorted(Counter(decisions).items())
        ],
        "note": _note(decisions, accuracy),
    }
    evaluation.save()


def _note(decisions: Sequence[tuple[str, str]], accuracy: Mapping[str, float] | None) -> str:
    text = (
        "Base: every prompt to the base. Random: the mean over the compressed experts. Routed: the router's choice, "
        "the base included. Oracle: the compressed expert whose own prompts they are. Full experts: that expert before "
        "compression. [ ]: 95 %, by document."
    )
    if accuracy is None:
        return text
    return text + (
        f" {len(decisions)} prompts, routed to their own expert: {100 * accuracy['value']:.1f} "
        f"[{100 * accuracy['low']:.1f}, {100 * accuracy['high']:.1f}] %."
    )


def _losses(
    evaluation: Evaluation, router: Router, artifacts: Mapping[str, Candidate]
) -> tuple[dict[str, dict[str, float]] | None, list[tuple[str, str]]]:
    """Loss a token under each choice, and (owner, chosen) of every prompt."""
    request = evaluation.request
    experts = {expert.label: expert for expert in evaluation.experts}
    items: list[EncodedItem] = []
    owners: list[str] = []
    decisions: list[tuple[str, str]] = []
    for data in evaluation.sets:
        if data.owner is None or data.owner not in artifacts or not data.conversations:
            continue
        expert = experts[data.owner]
        encoded = evaluation.encoded(data, expert)
        for number in encoded.kept:
            chosen = router.route(list(data.conversations[number][:-1])).expert
            decisions.append((data.owner, chosen))
        items += encoded.items
        owners += [data.owner] * len(encoded.items)
    if not items:
        return None, []
    losses = {BASE: answer_losses(evaluation.base, items, evaluation.arithmetic)}
    for label, candidate in artifacts.items():
        losses[label] = answer_losses(candidate.weights, items, evaluation.arithmetic)
    full = np.zeros(len(items))
    for label in dict.fromkeys(owners):
        own = [index for index, owner in enumerate(owners) if owner == label]
        full[own] = answer_losses(experts[label].weights, [items[index] for index in own], evaluation.arithmetic)
    tokens = np.array([len(item.tokens) - item.answer_start for item in items], dtype=float)
    picked = _picked(losses, owners, [chosen for _, chosen in decisions]) | {FULL: full}
    return {name: asdict(ratio_of_sums(picked[name], tokens, seed=request.seed)) for name in CHOICES}, decisions


def answer_losses(weights: Weights, items: Sequence[EncodedItem], arithmetic: Arithmetic) -> Array:
    """Negative log-likelihood of each item's answer, nats."""
    found = np.zeros(len(items))
    for index, logits in logits_of(weights, items, arithmetic):
        answer = items[index].answer.to(logits.device)[:, None]
        found[index] = -float(logits.log_softmax(-1).gather(1, answer).double().sum())
    return found


def _task_scores(
    evaluation: Evaluation, router: Router, artifacts: Mapping[str, Candidate], runs: Runs
) -> dict[str, dict[str, dict[str, float]]]:
    """Mean score of each owned task under each choice."""
    owners = {task: item.owner for item in evaluation.tasks if item.owner for task in item.tasks}
    found: dict[str, dict[str, dict[str, float]]] = {}
    labels = {BASE: BASE} | {label: item.label for label, item in artifacts.items()}
    for task, owner in owners.items():
        by_label = {label: runs.get(model, {}).get(task) for label, model in labels.items()}
        complete = {label: run for label, run in by_label.items() if run is not None}
        full = runs.get(owner, {}).get(task)
        if owner not in artifacts or full is None or len(complete) != len(labels):
            continue
        metric = complete[BASE].metric
        scores = {
            label: np.array([document.scores[metric] for document in run.documents]) for label, run in complete.items()
        }
        chosen = [router.route(document.question).expert for document in complete[BASE].documents]
        picked = _picked(scores, [owner] * len(chosen), chosen)
        picked[FULL] = np.array([document.scores[metric] for document in full.documents])
        ones = np.ones(len(chosen))
        found[task] = {
            name: asdict(ratio_of_sums(picked[name], ones, seed=evaluation.request.seed)) for name in CHOICES
        }
    return found


def _picked(values: Mapping[str, Array], owners: Sequence[str], chosen: Sequence[str]) -> dict[str, Array]:
    """Each choice's values, document by document, out of every model's."""
    experts = [label for label in values if label != BASE]
    return {
        "base": values[BASE],
        "random": np.mean([values[label] for label in experts], axis=0),
        "routed": np.array([values[label][index] for index, label in enumerate(chosen)]),
        "oracle": np.array([values[label][index] for index, label in enumerate(owners)]),
    }
