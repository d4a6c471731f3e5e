"""Supervised fine-tuning of the lm backend: the loss is on the answer's letter alone."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any, Protocol

import torch
import torch.nn.functional as functional

from meswitch_cli.router.backends.contract import FitSettings, Progress
from meswitch_cli.router.backends.texts import native_dtype

WARMUP_STEPS = 5
BATCH = 8


class Questioner(Protocol):
    """A language model that is asked by letters: what of `lm.LetterModel` is trained."""

    model: Any
    options: tuple[str, ...]
    letter_ids: list[int]

    def question(self, text: str, options: Sequence[str]) -> list[int]: ...
    def last_hidden(self, token_ids: Sequence[Sequence[int]]) -> torch.Tensor: ...


def fine_tune(
    asked: Questioner, examples: Sequence[tuple[str, str]], settings: FitSettings, on_progress: Progress
) -> list[float]:
    """Train every weight with AdamW on (prompt, label) pairs; the loss of each step, nats."""
    torch.manual_seed(settings.seed)
    random = Random(settings.seed)
    optimizer = torch.optim.AdamW(
        asked.model.parameters(), lr=settings.lm_learning_rate, betas=(0.9, 0.95), weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / WARMUP_STEPS, 1.0, (settings.lm_steps - step) / settings.lm_steps + 0.1),
    )
    letters = torch.tensor(asked.letter_ids)
    head = asked.model.get_output_embeddings()
    queue: list[tuple[str, str]] = []
    losses: list[float] = []
    asked.model.train()
    for step in range(settings.lm_steps):
        if len(queue) < BATCH:
            queue = random.sample(list(examples), len(examples))
        batch, queue = queue[:BATCH], queue[BATCH:]
        questions, answers = [], []
        for text, label in batch:
            # Shuffled, so that it learns to read the options and not where they stood.
            options = random.sample(asked.options, len(asked.options))
            questions.append(asked.question(text, options))
            answers.append(options.index(label))
        with torch.autocast("cpu", torch.bfloat16, enabled=native_dtype() == torch.bfloat16):
            logits = head(asked.last_hidden(questions))
        # Over the whole vocabulary, as in ordinary fine-tuning: the letters must also beat every other token.
        loss = functional.cross_entropy(logits.float(), letters[torch.tensor(answers)])
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(asked.model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        on_progress("fine-tuning", step + 1, settings.lm_steps)
    asked.model.eval()
    return losses
