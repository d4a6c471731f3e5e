"""An evaluation, step by step; what was measured before a failure stays in the report."""

from __future__ import annotations

import json
import math
import operator
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from meswitch_cli.artifact.disk import disk_errors, refuse_occupied, write_atomically
from meswitch_cli.calibration.data import read_calibration
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.errors import EvaluationError, MeswitchError, UsageError
from meswitch_cli.evaluation.baselines.activations import Activations
from meswitch_cli.evaluation.baselines.model import baseline_candidate
from meswitch_cli.evaluation.figures import TokenFigures, against_base, base_row, item_sums, model_row
from meswitch_cli.evaluation.html import page
from meswitch_cli.evaluation.markdown import markdown
from meswitch_cli.evaluation.passes import Arithmetic, Failure, Mode, choose_mode, compare_models
from meswitch_cli.evaluation.profile import saliency_rows, tensor_rows
from meswitch_cli.evaluation.prompts import EncodedSet, EvaluationSet, encode_set, read_set
from meswitch_cli.evaluation.report import REPORT_FILE, Report, environment
from meswitch_cli.evaluation.subjects import BASE, Candidate, Expert, open_artifacts, open_experts, split_label
from meswitch_cli.evaluation.task_choice import TaskChoice, choose_tasks
from meswitch_cli.evaluation.task_source import require_harness
from meswitch_cli.model.weights import CheckpointWeights, context_length, parameter_count
from meswitch_cli.paths import user_path

CPU = torch.device("cpu")
ITEMS_FILE = "items.jsonl"
MARKDOWN_FILE = "report.md"
HTML_FILE = "report.html"
OnStep = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """What was asked for; `LABEL=` before an expert, a text or a task names the expert it belongs to.

    Raises:
        UsageError: nothing to compare or nothing to compare on, or an option that cannot have an effect.
    """

    base: str
    experts: tuple[str, ...]
    out: Path
    artifacts: tuple[Path, ...] = ()
    baselines: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    include_path: Path | None = None
    allow_task_code: bool = False
    server: str | None = None
    server_model: str | None = None
    router: Path | None = None
    margin: float = 0.02
    calibration: Path | None = None
    limit: int | None = None
    exact_match: bool = False
    max_new_tokens: int = 128
    device: torch.device = CPU
    dtype: torch.dtype = torch.float32
    mode: Mode | None = None
    seed: int = 0
    min_recovery: float | None = None
    max_kld: float | None = None
    force: bool = False

    def __post_init__(self) -> None:
        if not self.artifacts and not self.baselines:
            raise UsageError("nothing to evaluate: give --artifact or --baseline")
        if not self.texts and not self.tasks:
            raise UsageError("nothing to evaluate on: give --text or --tasks")
        for name in ("margin", "min_recovery", "max_kld"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise UsageError(f"--{name.replace('_', '-')} {value}: must be a number")
        if self.exact_match and not self.texts:
            raise UsageError('--exact-match: answers the prompts of --text that have an "answer"; give some')
        if self.server is not None and not self.tasks:
            raise UsageError(f"--server {self.server}: a server is measured on --tasks; give some")
        if self.server is not None and not self.server.startswith(("http://", "https://")):
            raise UsageError(f"--server {self.server}: must be a URL, http://127.0.0.1:8000 say")

    def options(self) -> dict[str, Any]:
        """What changes the figures, for the report."""
        names = (
            "limit", "margin", "min_recovery", "max_kld", "server", "server_model", "exact_match", "max_new_tokens",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names} | {"tasks": list(self.tasks)}


@dataclass
class Evaluation:
    """A prepared evaluation: everything opened and checked, nothing run yet."""

    request: Request
    base: CheckpointWeights
    experts: list[Expert]
    candidates: list[Candidate]
    sets: list[EvaluationSet]
    tasks: list[TaskChoice]
    arithmetic: Arithmetic
    report: Report

    def of_expert(self, expert: Expert) -> list[Candidate]:
        return [item for item in self.candidates if item.expert == expert.label]

    def encoded(self, data: EvaluationSet, expert: Expert) -> EncodedSet:
        """A set by an expert's tokenizer, within its context and the request's limit.

        Raises:
            EvaluationError: as `encode_set`.
        """
        return encode_set(
            data,
            expert.tokenizer,
            vocabulary=expert.weights.architecture.vocabulary,
            context=context_length(expert.weights),
            limit=self.request.limit,
        )

    def save(self) -> None:
        self.report.save(self.request.out)


def prepare(request: Request) -> Evaluation:
    """Open and check everything that the request names; tasks that do not load are noted in the report.

    Raises:
        MeswitchError: something is missing, damaged, or does not belong together.
    """
    _refuse_occupied(request)
    sets = _read_sets(request)
    calibration = None if request.calibration is None else read_calibration(request.calibration)
    if request.tasks:
        require_harness()
    base = CheckpointWeights(Checkpoint.open(request.base))
    experts = open_experts(request.experts, base)
    labels = {expert.label for expert in experts}
    for item in sets:
        if item.owner is not None and item.owner not in labels:
            raise UsageError(f"--text {item.owner}={item.path}: no expert is called {item.owner!r}")
    if request.exact_match and not any(item.has_answers for item in sets):
        raise UsageError('--exact-match: no line of --text has an "answer"')
    tasks, failures = choose_tasks(request.tasks, labels, request.include_path, allow_code=request.allow_task_code)
    if failures and not tasks and not sets:
        raise EvaluationError(next(iter(failures.values())))
    named = {task for choice in tasks for task in choice.tasks}
    twice = next((item.name for item in sets if request.exact_match and item.name in named), None)
    if twice is not None:
        raise UsageError(f"--text: {twice!r} is a task's name too; rename the file for --exact-match")
    candidates: list[Candidate] = []
    for path in request.artifacts:
        candidates += open_artifacts(path, base, experts, [item.label for item in candidates])
    for expert in experts:
        activations = Activations(expert, request.calibration, request.seed)
        for spec in request.baselines:
            candidates.append(baseline_candidate(spec, base, expert, activations, several=len(experts) > 1))
    mode = request.mode or choose_mode([base, *(item.weights for item in experts)], request.device, request.dtype)
    arithmetic = Arithmetic(request.device, request.dtype, mode)
    report = Report(
        seed=request.seed,
        options=request.options() | {"calibration_sha256": calibration.sha256 if calibration else None},
        environment=environment(request.device, request.dtype, mode),
        base=_identity(base),
        experts=[{"label": item.label} | _identity(item.weights) for item in experts],
        models=[
            {"label": item.label, "expert": item.expert, "kind": item.kind, "served": item.served} | dict(item.facts)
            for item in candidates
        ],
    )
    for name, message in failures.items():
        report.fail(f"tasks: {name}", message)
    return Evaluation(request, base, experts, candidates, sets, tasks, arithmetic, report)


def measure_fidelity(evaluation: Evaluation, on_step: OnStep = lambda what: None) -> None:
    """Fill the report's `sets` and `fidelity`; sets that belong to one expert are measured on that one alone."""
    for expert in evaluation.experts:
        for data in evaluation.sets:
            if data.owner in (None, expert.label):
                _measure_set(evaluation, expert, data, on_step)
                evaluation.save()


def _measure_set(evaluation: Evaluation, expert: Expert, data: EvaluationSet, on_step: OnStep) -> None:
    report, request = evaluation.report, evaluation.request
    where = f"{expert.label} on {data.name}"
    candidates = evaluation.of_expert(expert)
    try:
        encoded = evaluation.encoded(data, expert)
        found = compare_models(
            expert.weights,
            {BASE: evaluation.base} | {item.label: item.weights for item in candidates},
            encoded.items,
            evaluation.arithmetic,
            request.out,
            on_pass=lambda label, items: on_step(f"{where}: {label}, {items} items"),
        )
    except MeswitchError as error:
        report.fail(where, str(error))
        return
    report.sets.append(_set_facts(data, expert, encoded))
    base = found[BASE]
    of_base: dict[str, Any] = {}
    if isinstance(base, Failure):
        report.fail(f"{where}: base", base.reason)
    else:
        of_base = base_row(base, seed=request.seed)
    for item in candidates:
        figures = found[item.label]
        if isinstance(figures, Failure):
            report.fail(f"{where}: {item.label}", figures.reason)
            continue
        row: dict[str, Any] = {"expert": expert.label, "model": item.label, "kind": item.kind, "set": data.name}
        row["nbytes"] = item.nbytes()
        row |= model_row(figures, seed=request.seed)
        if not isinstance(base, Failure):
            row |= of_base | against_base(figures, base, seed=request.seed)
        report.fidelity.append(row)
    _append_items(evaluation, expert, data, found)


def _append_items(
    evaluation: Evaluation, expert: Expert, data: EvaluationSet, found: dict[str, list[TokenFigures] | Failure]
) -> None:
    """Per-item sums, for pairing and for plots of one's own."""
    lines = []
    for label, figures in found.items():
        for index, item in enumerate([] if isinstance(figures, Failure) else figures):
            value = {"expert": expert.label, "set": data.name, "model": label, "item": index} | item_sums(item)
            lines.append(json.dumps(value))
    path = evaluation.request.out / ITEMS_FILE
    with disk_errors(path), path.open("a", encoding="utf-8") as stream:
        stream.write("".join(f"{line}\n" for line in lines))


def judge(evaluation: Evaluation) -> bool:
    """Fill the report's `gates`; False where a limit is missed, or could not be checked.

    Limits hold for every compressed model. Recovery is judged on each expert's own prompts: the sets labelled with
    it, or every set of answers where none is labelled. KL is judged on every set.
    """
    report, request = evaluation.report, evaluation.request
    owned = {item["name"] for item in report.sets if item["owner"]} or {
        item["name"] for item in report.sets if item["kind"] == "responses"
    }
    artifacts = any(item.kind == "artifact" for item in evaluation.candidates)  # alone judged where there are any
    rows = [row for row in report.fidelity if row["kind"] == "artifact" or not artifacts]
    own = [row for row in rows if row["set"] in owned]
    limits = (
        ("max-kld", request.max_kld, rows, "kl_mean", operator.le),
        ("min-recovery", request.min_recovery, own, "gap_recovered", operator.ge),
    )
    for name, limit, judged, member, holds in limits:
        if limit is None:
            continue
        for row in judged:
            value = row.get(member)
            report.gates.append(
                {"gate": name, "limit": limit, "value": value, "passed": value is not None and holds(value, limit)}
                | {key: row[key] for key in ("expert", "model", "set")}
            )
        if not judged:
            report.fail(f"--{name}", "nothing was measured that it could be checked on")
    return report.passed


def finish(evaluation: Evaluation) -> None:
    """Write `report.json` as complete, and the pages made from it."""
    by_label = {expert.label: expert for expert in evaluation.experts}
    for item in evaluation.candidates:
        evaluation.report.tensors += tensor_rows(item)
        evaluation.report.saliency += saliency_rows(item, by_label[item.expert])
    for item, model in zip(evaluation.candidates, evaluation.report.models, strict=True):
        model["nbytes"] = item.nbytes() or None
    evaluation.report.complete = True
    evaluation.save()
    value = evaluation.report.to_dict()
    write_atomically(evaluation.request.out / MARKDOWN_FILE, markdown(value).encode())
    write_atomically(evaluation.request.out / HTML_FILE, page(value).encode())


def _read_sets(request: Request) -> list[EvaluationSet]:
    sets: list[EvaluationSet] = []
    for option in request.texts:
        owner, path = split_label(option)
        item = read_set(user_path(path), owner)
        if any(item.name == other.name for other in sets):
            raise UsageError(f"--text {path}: two files are called {item.name!r}; rename one")
        sets.append(item)
    return sets


def _refuse_occupied(request: Request) -> None:
    refuse_occupied(request.out, REPORT_FILE, force=request.force, what="an evaluation", error=EvaluationError)


def claim(evaluation: Evaluation) -> None:
    """Make the output folder, or empty one that an earlier evaluation made, and begin the report there.

    Raises:
        EvaluationError: something else is there.
        ArtifactError: it cannot be written.
    """
    out = evaluation.request.out
    _refuse_occupied(evaluation.request)
    with disk_errors(out):
        if (out / REPORT_FILE).is_file():
            shutil.rmtree(out)
        out.mkdir(parents=True, exist_ok=True)
    evaluation.save()  # first: what marks the folder as an evaluation's, which --force may replace
    write_atomically(out / ITEMS_FILE, b"")


def _identity(weights: CheckpointWeights) -> dict[str, Any]:
    source = weights.checkpoint.source
    return {
        "id": source.id,
        "revision": source.revision,
        "fingerprint": weights.fingerprint,
        "nbytes": weights.nbytes,
        "parameters": parameter_count(weights),
    }


def _set_facts(data: EvaluationSet, expert: Expert, encoded: EncodedSet) -> dict[str, Any]:
    return {
        "name": data.name,
        "expert": expert.label,
        "owner": data.owner,
        "kind": data.kind,
        "sha256": data.sha256,
        "items": len(encoded.items),
        "tokens": sum(len(item.tokens) - item.answer_start for item in encoded.items),
        "skipped": encoded.skipped,
    }
