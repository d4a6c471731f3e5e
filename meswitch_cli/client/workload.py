"""Which request goes to which model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from meswitch_cli.errors import UsageError
from meswitch_cli.jsonl import read_jsonl

Popularity = Literal["uniform", "zipf"]

_WORDS = (
    "the of a in is water bridge seven write list number why each garden train explain short about price function "
    "table light because river count metal city under first example story between answer yellow large small question"
)


@dataclass(frozen=True)
class WorkloadRequest:
    model: str
    prompt: str


@dataclass(frozen=True)
class Workload:
    """Requests in the order in which they are sent.

    Attributes:
        concurrency: requests in flight at once; the next is sent when one has ended.
        ignore_eos: every answer has exactly `max_tokens` tokens, where the server knows this member.
    """

    requests: tuple[WorkloadRequest, ...]
    concurrency: int
    max_tokens: int
    temperature: float = 0.0
    ignore_eos: bool = False


def make_workload(
    models: Sequence[str],
    *,
    requests: int,
    concurrency: int,
    max_tokens: int,
    popularity: Popularity = "uniform",
    zipf_exponent: float = 1.0,
    prompts: Sequence[str] = (),
    prompt_words: int = 32,
    temperature: float = 0.0,
    ignore_eos: bool = False,
    seed: int = 0,
) -> Workload:
    """Draw requests. Under Zipf's law the r-th model of the list has a share proportional to r^-exponent.

    `prompts` are used in turn; without any, each prompt is `prompt_words` words drawn anew, so that no cache helps.

    Raises:
        UsageError: there is no model to ask.
    """
    if not models:
        raise UsageError("no model to ask: name one with --model")
    draw = random.Random(seed)
    weights = [rank**-zipf_exponent if popularity == "zipf" else 1.0 for rank in range(1, len(models) + 1)]
    chosen = draw.choices(list(models), weights, k=requests)
    texts = [
        prompts[index % len(prompts)] if prompts else " ".join(draw.choices(_WORDS.split(), k=prompt_words))
        for index in range(requests)
    ]
    pairs = tuple(WorkloadRequest(model, text) for model, text in zip(chosen, texts, strict=True))
    return Workload(pairs, concurrency, max_tokens, temperature, ignore_eos)


def read_prompts(path: Path) -> list[str]:
    """The prompts of a JSONL file: each line's "prompt" or "text".

    Raises:
        UsageError: it cannot be read, or a line has neither.
    """
    prompts = []
    for number, item in read_jsonl(path, UsageError, "what --prompts names").values:
        if not isinstance(item, dict):
            raise UsageError(f"--prompts {path}: line {number}: not a JSON object")
        prompt = item.get("prompt", item.get("text"))
        if not isinstance(prompt, str):
            raise UsageError(f'--prompts {path}: line {number}: needs "prompt" or "text"')
        prompts.append(prompt)
    return prompts
