"""Supervised fine-tuning of the lm backend: the loss is on the answer's letter alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as functional

from meswitch_cli.checkpoint.source import resolve
from meswitch_cli.router.backends.lm import LetterModel
from meswitch_cli.router.data import Example
from meswitch_cli.router.features import native_dtype

if TYPE_CHECKING:
    from meswitch_cli.router.training import FittedBackend, Progress, TrainingSettings

WARMUP_STEPS = 5
BATCH = 8


def fit_letter_model(
    parts: Mapping[str, Sequence[Example]],
    labels: tuple[str, ...],
    folder: str,
    settings: TrainingSettings,
    on_progress: Progress,
) -> FittedBackend:
    """Fine-tune every weight with AdamW, then take the letters' rows as the head."""
    from meswitch_cli.router.training import FittedBackend, all_features

    backend = LetterModel(Path(resolve(folder).path), labels, max_tokens=settings.max_tokens, training=True)
    certain = [example for example in parts["train"] if example.domain is not None]
    losses = _train(backend, certain, settings, on_progress)
    # As it will be stored and served, so that the figures are of what the folder holds.
    backend.model.to(torch.bfloat16).to(native_dtype())
    return FittedBackend(
        backend,
        all_features(backend, parts, on_progress),
        standardise=False,
        head=backend.letters_head(),
        notes={"first_losses": losses[:5], "last_losses": losses[-5:]},
    )


def _train(
    backend: LetterModel, examples: Sequence[Example], settings: TrainingSettings, on_progress: Progress
) -> list[float]:
    """Returns the loss of each step, nats."""
    torch.manual_seed(settings.seed)
    random = Random(settings.seed)
    optimizer = torch.optim.AdamW(
        backend.model.parameters(), lr=settings.lm_learning_rate, betas=(0.9, 0.95), weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / WARMUP_STEPS, 1.0, (settings.lm_steps - step) / settings.lm_steps + 0.1),
    )
    letters = torch.tensor(backend.letter_ids)
    head = backend.model.get_output_embeddings()
    queue: list[Example] = []
    losses: list[float] = []
    backend.model.train()
    for step in range(settings.lm_steps):
        if len(queue) < BATCH:
            queue = random.sample(list(examples), len(examples))
        batch, queue = queue[:BATCH], queue[BATCH:]
        questions, answers = [], []
        for example in batch:
            # Shuffled, so that it learns to read the options and not where they stood.
            options = random.sample(backend.options, len(backend.options))
            questions.append(backend.question(example.text, options))
            answers.append(options.index(str(example.domain)))
        with torch.autocast("cpu", torch.bfloat16, enabled=native_dtype() == torch.bfloat16):
            logits = head(backend.last_hidden(questions))
        # Over the whole vocabulary, as in ordinary fine-tuning: the letters must also beat every other token.
        loss = functional.cross_entropy(logits.float(), letters[torch.tensor(answers)])
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(backend.model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        on_progress("fine-tuning", step + 1, settings.lm_steps)
    backend.model.eval()
    return losses
