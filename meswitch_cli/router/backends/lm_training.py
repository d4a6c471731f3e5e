"""Fine-tuning of the lm backend: the loss is on the answer's letter alone, until validation stops falling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Protocol

import torch
import torch.nn.functional as functional

from meswitch_cli.router.backends.contract import FitSettings, Progress
from meswitch_cli.router.backends.lm_state import TrainingState
from meswitch_cli.router.backends.texts import native_dtype

WARMUP_STEPS = 5
BATCH = 8
#: Validation is asked after so many steps, and its prompts thinned to so many, evenly.
JUDGED_EVERY, MOST_JUDGED = 20, 96
#: Training ends when validation has not fallen by so much (nats) in so many judgements in a row, or cannot any more.
LEAST_FALL, PATIENCE = 1e-3, 3

#: Prompts with their labels.
Pairs = Sequence[tuple[str, str]]


class Questioner(Protocol):
    """A language model that is asked by letters: what of `lm.LetterModel` is trained."""

    model: Any
    options: tuple[str, ...]
    letter_ids: list[int]

    def question(self, text: str, options: Sequence[str]) -> list[int]: ...
    def last_hidden(self, token_ids: Sequence[Sequence[int]]) -> torch.Tensor: ...


@dataclass(frozen=True)
class Course:
    """How a fine-tuning went.

    Attributes:
        losses: of each step, nats, over the whole vocabulary.
        validation: by the number of steps done, nats, over the letters; empty where there was nothing to judge by.
        best_step: after which the weights are those that were taken.
        converged: whether validation stopped falling before the steps ended.
    """

    losses: tuple[float, ...]
    validation: dict[int, float]
    best_step: int
    converged: bool


def fine_tune(
    asked: Questioner,
    train: Pairs,
    validation: Pairs,
    settings: FitSettings,
    on_progress: Progress,
    kept: Path | None = None,
) -> Course:
    """Train every weight with AdamW, at most `lm_steps`, and leave the weights that did best on validation.

    Args:
        kept: folder in which the state is left after every judgement; a training of the same data and settings goes
            on from there and ends with the same weights.
    """
    validation = validation[:: -(-len(validation) // MOST_JUDGED)] if validation else ()
    optimizer = torch.optim.AdamW(
        asked.model.parameters(), lr=settings.lm_learning_rate, betas=(0.9, 0.95), weight_decay=0.0
    )
    parameters = dict(asked.model.named_parameters())
    state = TrainingState(parameters, optimizer)
    identity = f"{train} {validation} {settings.seed} {settings.lm_steps} {settings.lm_learning_rate} {asked.options}"
    if kept is not None:
        state.resume(kept, identity)
    batches = _batches(train, settings.seed)
    for _ in range(state.steps):
        next(batches)
    asked.model.train()
    while state.steps < settings.lm_steps and not _has_stopped(state.validation):
        for group in optimizer.param_groups:
            group["lr"] = settings.lm_learning_rate * _rate(state.steps, settings.lm_steps)
        state.losses.append(_step(asked, next(batches), optimizer, Random(f"{settings.seed} options {state.steps}")))
        on_progress("fine-tuning", state.steps, settings.lm_steps)
        if validation and (state.steps % JUDGED_EVERY == 0 or state.steps == settings.lm_steps):
            asked.model.eval()
            state.judged(_validation_loss(asked, validation))
            asked.model.train()
            if kept is not None:
                state.save(kept, identity)
    asked.model.eval()
    state.take_best()
    return Course(tuple(state.losses), state.validation, state.best_step, _has_stopped(state.validation))


def _rate(step: int, steps: int) -> float:
    """Share of the learning rate: a short rise, then a straight fall to a tenth."""
    return min((step + 1) / WARMUP_STEPS, 1.0, (steps - step) / steps + 0.1)


def _has_stopped(validation: dict[int, float]) -> bool:
    values = list(validation.values())
    # What is below the least fall already cannot fall by so much.
    return min(values, default=LEAST_FALL) < LEAST_FALL or (
        len(values) > PATIENCE and min(values[-PATIENCE:]) > min(values[:-PATIENCE]) - LEAST_FALL
    )


def _batches(train: Pairs, seed: int) -> Iterator[Pairs]:
    """Endless; every pair once in a round but for what does not fill a batch."""
    turn = 0
    while True:
        order = Random(f"{seed} order {turn}").sample(list(train), len(train))
        turn += 1
        for start in range(0, max(1, len(order) - BATCH + 1), BATCH):
            yield order[start : start + BATCH]


def _step(asked: Questioner, batch: Pairs, optimizer: torch.optim.Optimizer, random: Random) -> float:
    questions, answers = [], []
    for text, label in batch:
        # Shuffled, so that it learns to read the options and not where they stood.
        options = random.sample(asked.options, len(asked.options))
        questions.append(asked.question(text, options))
        answers.append(options.index(label))
    letters = torch.tensor(asked.letter_ids)
    with torch.autocast("cpu", torch.bfloat16, enabled=native_dtype() == torch.bfloat16):
        logits = asked.model.get_output_embeddings()(asked.last_hidden(questions))
    # Over the whole vocabulary, as in ordinary fine-tuning: the letters must also beat every other token.
    loss = functional.cross_entropy(logits.float(), letters[torch.tensor(answers)])
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(asked.model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


@torch.no_grad()
def _validation_loss(asked: Questioner, validation: Pairs) -> float:
    """Mean over prompts of the cross-entropy over the letters, options in the order in which a router asks them."""
    losses: list[float] = []
    for start in range(0, len(validation), BATCH):
        batch = validation[start : start + BATCH]
        with torch.autocast("cpu", torch.bfloat16, enabled=native_dtype() == torch.bfloat16):
            hidden = asked.last_hidden([asked.question(text, asked.options) for text, _ in batch])
            logits = asked.model.get_output_embeddings()(hidden)[:, asked.letter_ids].float()
        truth = torch.tensor([asked.options.index(label) for _, label in batch])
        losses += functional.cross_entropy(logits, truth, reduction="none").tolist()
    return sum(losses) / len(losses)
