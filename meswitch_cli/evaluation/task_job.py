"""Tasks of an evaluation, and exact match on its texts: every model on all that concern it, compared in pairs."""

from __future__ import annotations

import functools
import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from meswitch_cli.artifact.disk import disk_errors
from meswitch_cli.errors import EvaluationError, MeswitchError
from meswitch_cli.evaluation.exact_match import exact_match
from meswitch_cli.evaluation.job import Evaluation, OnStep
from meswitch_cli.evaluation.paired import PairedComparison, compare_paired, with_holm
from meswitch_cli.evaluation.prompts import EvaluationSet
from meswitch_cli.evaluation.subjects import BASE, Expert
from meswitch_cli.evaluation.task_choice import TaskChoice
from meswitch_cli.evaluation.tasks import (
    TaskRun,
    live_model,
    paired_scores,
    run_tasks,
    score_row,
    served_model,
)
from meswitch_cli.model.build import build_model
from meswitch_cli.model.tokenizer import end_ids
from meswitch_cli.model.weights import Weights, context_length

SAMPLES_FILE = "samples.jsonl"
#: Examples of lost and of gained answers that a report shows for each comparison.
SHOWN_FLIPS = 8

#: By model label, then task: what was measured.
Runs = dict[str, dict[str, TaskRun]]


@dataclass(frozen=True)
class _Subject:
    label: str
    kind: str
    expert: Expert
    weights: Weights | None
    make: Callable[[], Any]


def measure_tasks(evaluation: Evaluation, on_step: OnStep = lambda what: None) -> Runs:
    """Fill the report's `tasks`, `comparisons` and `flips`; every document goes to `samples.jsonl`."""
    request, report = evaluation.request, evaluation.report
    choices = evaluation.tasks
    runs: Runs = {}
    answered = [item for item in evaluation.sets if request.exact_match and item.has_answers]
    if not choices and not answered:
        return runs
    if evaluation.arithmetic.mode == "stream":
        report.fail("tasks", "they need a model in memory, and these models are streamed; give --server URL instead")
        choices = [] if request.server is None else choices
    for subject in _subjects(evaluation):
        wanted = [item.name for item in choices if _concerns(evaluation, item, subject)]
        sets = [item for item in answered if subject.kind == "base" or item.owner in (None, subject.expert.label)]
        parts: list[tuple[list[str], Callable[[], dict[str, TaskRun]]]] = []
        if wanted:
            parts.append((wanted, functools.partial(_run, evaluation, subject, wanted)))
        if sets and subject.weights is not None:
            parts.append(([item.name for item in sets], functools.partial(_answers, evaluation, subject, sets)))
        for names, measure in parts:
            on_step(f"tasks: {subject.label}: {', '.join(names)}")
            try:
                found = measure()
            except MeswitchError as error:
                report.fail(f"tasks: {subject.label}", str(error))
            else:
                runs.setdefault(subject.label, {}).update(found)
                _keep(evaluation, subject, found)
            gc.collect()  # one model in memory at a time
            evaluation.save()
    _compare(evaluation, runs)
    evaluation.save()
    return runs


def _subjects(evaluation: Evaluation) -> list[_Subject]:
    def in_memory(weights: Weights, expert: Expert) -> Callable[[], Any]:
        def make() -> Any:
            arithmetic = evaluation.arithmetic
            model = build_model(weights, arithmetic.device, arithmetic.dtype)
            return live_model(model, expert.tokenizer, context_length(weights))

        return make

    first = evaluation.experts[0]
    by_label = {expert.label: expert for expert in evaluation.experts}
    found = [_Subject(BASE, "base", first, evaluation.base, in_memory(evaluation.base, first))]
    found += [
        _Subject(item.label, "expert", item, item.weights, in_memory(item.weights, item)) for item in evaluation.experts
    ]
    for item in evaluation.candidates:
        owner = by_label[item.expert]
        found.append(_Subject(item.label, item.kind, owner, item.weights, in_memory(item.weights, owner)))
    if evaluation.arithmetic.mode == "stream":
        found = []
    request = evaluation.request
    if request.server is not None:
        url = request.server
        for expert in evaluation.experts:
            name = request.server_model or expert.label
            make = functools.partial(served_model, url, name, context=context_length(expert.weights))
            found.append(_Subject(f"{name} at {url}", "server", expert, None, make))
    return found


def _concerns(evaluation: Evaluation, choice: TaskChoice, subject: _Subject) -> bool:
    """A task that belongs to one expert is its models' and the base's; a router may send it to any compressed one."""
    routed = evaluation.request.router is not None and subject.kind == "artifact"
    return choice.owner is None or subject.kind == "base" or routed or choice.owner == subject.expert.label


def _run(evaluation: Evaluation, subject: _Subject, names: Sequence[str]) -> dict[str, TaskRun]:
    """All tasks at once where that works; one at a time where one fails, so that the others are kept."""
    request = evaluation.request
    chat = subject.kind == "server" or bool(getattr(subject.expert.tokenizer, "chat_template", None))
    model = subject.make()

    def go(part: Sequence[str]) -> dict[str, TaskRun]:
        found = run_tasks(
            model,
            part,
            request.include_path,
            limit=request.limit,
            seed=request.seed,
            chat=chat,
            allow_code=request.allow_task_code,
        )
        return {run.task: run for run in found}

    try:
        return go(names)
    except EvaluationError:
        if len(names) == 1:
            raise
    found: dict[str, TaskRun] = {}
    for name in names:
        try:
            found |= go([name])
        except EvaluationError as error:
            evaluation.report.fail(f"tasks: {subject.label}: {name}", str(error))
    return found


def _answers(evaluation: Evaluation, subject: _Subject, sets: Sequence[EvaluationSet]) -> dict[str, TaskRun]:
    """Greedy answers to the prompts of texts that name theirs; a text has its owner's tokenizer, for the base too."""
    assert subject.weights is not None
    arithmetic, by_label = evaluation.arithmetic, {item.label: item for item in evaluation.experts}
    model = build_model(subject.weights, arithmetic.device, arithmetic.dtype)
    found = {}
    for data in sets:
        expert = subject.expert if data.owner is None else by_label[data.owner]
        found[data.name] = exact_match(
            model,
            expert.tokenizer,
            data,
            evaluation.encoded(data, expert),
            ends=end_ids(expert.weights.checkpoint.source.path, expert.tokenizer),
            most=evaluation.request.max_new_tokens,
            context=context_length(subject.weights),
        )
    return found


def _keep(evaluation: Evaluation, subject: _Subject, runs: dict[str, TaskRun]) -> None:
    path = evaluation.request.out / SAMPLES_FILE
    with disk_errors(path), path.open("a", encoding="utf-8") as stream:
        for run in runs.values():
            for document in run.documents:
                value = {"task": run.task, "model": subject.label} | asdict(document)
                stream.write(json.dumps(value, ensure_ascii=False) + "\n")
    for run in runs.values():
        for metric in run.documents[0].scores:
            row = {"model": subject.label, "kind": subject.kind, "expert": subject.expert.label}
            evaluation.report.tasks.append(row | score_row(run, metric))


def _compare(evaluation: Evaluation, runs: Runs) -> None:
    """Compressed models and servers against their full expert and the base, experts against the base."""
    report = evaluation.report
    found: dict[str, list[tuple[dict[str, Any], PairedComparison]]] = {"full expert": [], BASE: []}
    for subject in _subjects(evaluation):
        opponents = {"full expert": subject.expert.label, BASE: BASE} if subject.kind != "expert" else {BASE: BASE}
        for role, opponent in opponents.items() if subject.kind != "base" else ():
            for task, run in runs.get(subject.label, {}).items():
                theirs = runs.get(opponent, {}).get(task)
                if theirs is None:
                    continue
                try:
                    left, right = paired_scores(run, theirs)
                except EvaluationError as error:
                    report.fail(f"tasks: {subject.label} against {opponent}", str(error))
                    continue
                scores = [[document.scores[run.metric] for document in side] for side in (left, right)]
                comparison = compare_paired(*scores, margin=evaluation.request.margin, seed=evaluation.request.seed)
                row: dict[str, Any] = {
                    "task": task,
                    "metric": run.metric,
                    "model": subject.label,
                    "against": opponent,
                    "role": role,
                    "same_answers": sum(own.answer == other.answer for own, other in zip(left, right, strict=True)),
                }
                found[role].append((row, comparison))
                if role == "full expert":
                    report.flips += _flips(row, left, right, run.metric)
    for pairs in found.values():
        corrected = with_holm([comparison for _, comparison in pairs])
        report.comparisons += [row | item.to_row() for (row, _), item in zip(pairs, corrected, strict=True)]


def _flips(row: dict[str, Any], ours: Sequence[Any], theirs: Sequence[Any], metric: str) -> list[dict[str, Any]]:
    """Documents that the compressed model lost, and gained, with both answers."""
    shown: dict[str, list[dict[str, Any]]] = {"lost": [], "gained": []}
    for left, right in zip(ours, theirs, strict=True):
        change = left.scores[metric] - right.scores[metric]
        if change:
            shown["lost" if change < 0 else "gained"].append(
                {"task": row["task"], "model": row["model"], "against": row["against"], "document": left.number}
                | {"prompt": left.prompt, "target": left.target, "answer": left.answer, "expert_answer": right.answer}
            )
    return [{"change": kind} | item for kind, items in shown.items() for item in items[:SHOWN_FLIPS]]
