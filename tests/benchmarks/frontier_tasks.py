"""Right answers for the rows of benchmarks.frontier: documents of the shipped tasks, scored without generation.

Maths and logic: the choice whose tokens are likeliest after the prompt, as lm-evaluation-harness scores
`multiple_choice`. Code, whose documents have no choices: whether every token of the right value and the end of the turn
is the likeliest at its place, which is exact match of the greedy answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

import meswitch_cli.evaluation
import zoo

FILES = {"maths": "maths_choice.jsonl", "logic": "logic_choice.jsonl", "code": "code.jsonl"}


def documents(expert: str, limit: int) -> list[dict[str, Any]]:
    """The first documents of the expert's task."""
    path = Path(meswitch_cli.evaluation.__path__[0]) / "task_files" / FILES[expert]
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:limit]]


@torch.no_grad()
def right_answers(model: Any, tokenizer: Any, found: Sequence[Mapping[str, Any]]) -> list[float]:
    """1 for each document that the model answers rightly, else 0."""
    return [float(_is_right(model, tokenizer, document)) for document in found]


def _is_right(model: Any, tokenizer: Any, document: Mapping[str, Any]) -> bool:
    texts = document.get("choices") or [document["answer"]]
    encoded = [zoo.encode_item(tokenizer, {"prompt": document["prompt"], "response": text}) for text in texts]
    start = encoded[0][1]
    answers = [torch.tensor(ids[start:]) for ids, _ in encoded]
    prompt = torch.tensor([encoded[0][0][:start]])
    cache = DynamicCache()
    first = model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:]
    cache.batch_repeat_interleave(len(answers))
    padded = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True)
    rest = model(padded[:, :-1], past_key_values=cache, use_cache=True).logits
    logits = torch.cat([first.expand(len(answers), -1, -1), rest], 1).float()
    if "choices" not in document:
        return bool((logits[0].argmax(-1) == answers[0]).all())
    taken = torch.log_softmax(logits, -1).gather(-1, padded[..., None])[..., 0]
    # Without the end of the turn: the harness scores a choice's own tokens.
    likelihoods = [float(row[: len(answer) - 1].sum()) for row, answer in zip(taken, answers, strict=True)]
    return likelihoods.index(max(likelihoods)) == document["answer"]
