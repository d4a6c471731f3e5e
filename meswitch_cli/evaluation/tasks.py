"""Tasks through lm-evaluation-harness, document by document, so that models can be compared in pairs."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch

from meswitch_cli.addresses import is_this_machine, without_proxy
from meswitch_cli.errors import EvaluationError, reason_of
from meswitch_cli.estimates import wilson_interval
from meswitch_cli.evaluation.paired import mean_interval
from meswitch_cli.evaluation.statistics import Estimate
from meswitch_cli.evaluation.task_source import load_tasks, quiet, require_harness

BATCH_SIZE = 8


@dataclass(frozen=True)
class Document:
    """What a model did with one document of a task.

    Attributes:
        number: the document's index in the task.
        digest: of its content, so that only equal documents are paired.
        question: the task's text before any chat template.
        prompt: what the model was given.
        target: the right answer.
        answer: what the model answered, as the task's filter left it; of a choice, the choice's text or number.
        scores: by metric, as numbers.
    """

    number: int
    digest: str
    question: str
    prompt: str
    target: str
    answer: str
    scores: dict[str, float]


@dataclass(frozen=True)
class TaskRun:
    """One model's documents of one task; `metric` is the task's first, on which models are compared."""

    task: str
    metric: str
    documents: tuple[Document, ...]


def run_tasks(
    model: Any,
    names: Sequence[str],
    include: Path | None,
    *,
    limit: int | None,
    seed: int,
    chat: bool,
    allow_code: bool = False,
) -> list[TaskRun]:
    """Run a harness model object (`live_model`, `served_model`) over tasks.

    Raises:
        EvaluationError: a task cannot be loaded, or the model fails on it.
    """
    from lm_eval import evaluate

    tasks = {task.task_name: task for task in load_tasks(names, include, allow_code=allow_code)}
    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    try:
        with quiet():
            results = evaluate(
                lm=model,
                task_dict={"tasks": tasks, "groups": {}, "group_map": {}},
                limit=limit,
                bootstrap_iters=0,  # uncertainty is ours, paired by document
                apply_chat_template=chat,
                log_samples=True,
            )
    except Exception as error:  # the harness raises whatever its model and metrics raise
        said = getattr(getattr(error, "response", None), "text", "")  # a server's own words
        what = f"tasks {', '.join(names)}: {reason_of(error)}"
        raise EvaluationError(what + (f": {said[:300]}" if said else "")) from error
    return [_run_of(tasks[task], samples) for task, samples in results["samples"].items()]


def live_model(model: Any, tokenizer: Any, context: int) -> Any:
    """A harness model around a transformers model that is in memory."""
    require_harness()
    from lm_eval.models.huggingface import HFLM

    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.register_forward_hook(refuse_non_finite_logits)
    with quiet():
        return HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=BATCH_SIZE, max_length=context)


def refuse_non_finite_logits(model: Any, inputs: Any, output: Any) -> None:
    """A hook: NaN would be taken for a low score, and the model for a bad one.

    Raises:
        FloatingPointError: the logits are not finite.
    """
    if not bool(torch.isfinite(output.logits).all()):
        raise FloatingPointError("the model's logits are not finite: its weights are damaged or overflow")


def served_model(url: str, name: str, *, context: int) -> Any:
    """A harness model around a running OpenAI-compatible server's chat endpoint.

    Chat endpoints give no probabilities of a prompt, so only tasks that generate can be run on it.

    Raises:
        EvaluationError: the harness's packages for servers are not installed.
    """
    require_harness()
    from lm_eval.models.openai_completions import LocalChatCompletion

    host = urlsplit(url).hostname or ""
    if is_this_machine(host):  # the harness's client takes the environment's proxies even so
        without_proxy(host)
    try:
        with quiet():
            return LocalChatCompletion(
                base_url=f"{url.rstrip('/').removesuffix('/v1')}/v1/chat/completions",
                model=name,
                tokenizer_backend=None,
                tokenized_requests=False,
                max_length=context,
                max_retries=1,
                timeout=600,
            )
    except ModuleNotFoundError as error:
        raise EvaluationError(
            f"a server needs the harness's packages for it: pip install 'meswitch[eval]': {error}"
        ) from error


def score_row(run: TaskRun, metric: str) -> dict[str, Any]:
    """A task's mean score with its 95 % interval over documents, and the SHA-256 of which documents they were."""
    scores = np.array([document.scores[metric] for document in run.documents])
    estimate = wilson(scores) if np.isin(scores, (0.0, 1.0)).all() else mean_interval(scores)
    return {
        "task": run.task,
        "metric": metric,
        "documents": len(scores),
        "documents_sha256": hashlib.sha256("\n".join(item.digest for item in run.documents).encode()).hexdigest(),
        "score": estimate.value,
        "score_low": estimate.low,
        "score_high": estimate.high,
    }


def wilson(scores: np.ndarray[Any, Any]) -> Estimate:
    """The mean of scores that are 0 or 1, with Wilson's 95 % interval."""
    return Estimate(float(scores.mean()), *wilson_interval(float(scores.sum()), len(scores)))


def paired_scores(ours: TaskRun, theirs: TaskRun) -> tuple[list[Document], list[Document]]:
    """The documents of two runs in one order.

    Raises:
        EvaluationError: they are not the same documents.
    """
    left = {document.digest: document for document in ours.documents}
    right = {document.digest: document for document in theirs.documents}
    if left.keys() != right.keys() or len(left) != len(ours.documents):
        raise EvaluationError(f"task {ours.task!r}: the models did not see the same documents, or one twice")
    return [left[key] for key in left], [right[key] for key in left]


def _run_of(task: Any, samples: Sequence[dict[str, Any]]) -> TaskRun:
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    chosen = [sample for sample in samples if sample["filter"] == filters[-1]]
    documents = []
    for sample in chosen:
        scores = {name: float(sample[name]) for name in sample["metrics"] if _is_number(sample[name])}
        if not scores:
            raise EvaluationError(f"task {task.task_name!r} has no metric that is a number for each document")
        documents.append(
            Document(
                int(sample["doc_id"]),
                f"{sample['doc_id']}-{sample['doc_hash']}",
                str(task.doc_to_text(sample["doc"])),
                str(sample["arguments"][0][0]),
                _target_of(sample),
                _answer_of(sample),
                scores,
            )
        )
    if not documents:
        raise EvaluationError(f"task {task.task_name!r} has no document")
    return TaskRun(task.task_name, next(iter(documents[0].scores)), tuple(documents))


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float | np.number) and math.isfinite(float(value))


def _target_of(sample: dict[str, Any]) -> str:
    choices = sample["doc"].get("choices") if isinstance(sample["doc"], dict) else None
    target = sample["target"]
    return str(choices[target]) if isinstance(choices, list) and isinstance(target, int) else str(target)


def _answer_of(sample: dict[str, Any]) -> str:
    found = sample["filtered_resps"]
    if len(found) > 1 and isinstance(found[0], list | tuple):  # log-likelihoods of the choices
        best = max(range(len(found)), key=lambda index: found[index][0])
        return str(sample["arguments"][best][1])
    return str(found[0])
