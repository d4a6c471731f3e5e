"""Long full fine-tuning that can be stopped at any time and goes on from its last checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .training import Encoded, answer_losses, has_bf16_instructions, make_batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHECKPOINT_EVERY = 50


@dataclass(frozen=True)
class Schedule:
    """A rate that rises over `warmup_steps`, stays, and falls to a tenth over the last `decay_steps`.

    While it stays it does not depend on `steps`: a checkpoint from before the fall serves a longer training too.
    """

    steps: int
    learning_rate: float
    batch_tokens: int
    warmup_steps: int = 20
    decay_steps: int = 50

    def rate(self, step: int) -> float:
        rising = min(1.0, (step + 1) / self.warmup_steps)
        falling = min(1.0, (self.steps - step) / self.decay_steps)
        return self.learning_rate * rising * (0.1 + 0.9 * falling)


def train_resumably(
    model: PreTrainedModel,
    sequences: Sequence[Encoded],
    schedule: Schedule,
    seed: int,
    checkpoint: Path,
    watch: Callable[[int], None] = lambda step: None,
) -> dict[str, float]:
    """Train fp32 weights in place with AdamW from `checkpoint` on, or from the start where there is none.

    Only what requires a gradient is trained and kept in the checkpoint. `watch` is called with the number of steps
    done after each checkpoint, with the model in evaluation mode. A resumed training ends with the bytes of an
    uninterrupted one. Raises ValueError where the checkpoint is of other sequences. Returns the counts of steps,
    tokens and sequences and the seconds of all parts.
    """
    torch.manual_seed(seed)
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=schedule.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    counts: dict[str, float] = {"step": 0, "tokens": 0, "answer_tokens": 0, "sequences": 0, "seconds": 0.0}
    digest = hashlib.sha256(json.dumps([seed, sequences]).encode()).hexdigest()
    if checkpoint.exists():
        counts = _load(checkpoint, parameters, optimizer, digest)
    first = int(counts["step"])
    model.train()
    in_bf16 = has_bf16_instructions()
    batches = islice(make_batches(sequences, schedule.batch_tokens, seed), first, schedule.steps)
    for step, batch in enumerate(batches, first):
        started = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
            losses = answer_losses(model, batch)
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        counts["step"] += 1
        counts["tokens"] += sum(len(ids) for ids, _ in batch)
        counts["answer_tokens"] += len(losses)
        counts["sequences"] += len(batch)
        counts["seconds"] += time.monotonic() - started
        print(
            f"step {step + 1}/{schedule.steps} loss {losses.mean().item():.3f} {counts['seconds']:.0f} s",
            file=sys.stderr,
            flush=True,
        )
        if (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == schedule.steps:
            _save(checkpoint, parameters, optimizer, counts, digest)
            model.eval()
            watch(step + 1)
            model.train()
    model.eval()
    return counts


def _save(
    checkpoint: Path,
    parameters: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.AdamW,
    counts: dict[str, float],
    digest: str,
) -> None:
    tensors = {}
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]
        tensors[f"weight/{name}"] = parameter.detach()
        tensors.update({f"{key}/{name}": state[key] for key in ("exp_avg", "exp_avg_sq", "step")})
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    temporary = checkpoint.with_name(f".{checkpoint.name}.{os.getpid()}")
    save_file(tensors, temporary, {"counts": json.dumps(counts), "data": digest})
    temporary.replace(checkpoint)


@torch.no_grad()
def _load(
    checkpoint: Path,
    parameters: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.AdamW,
    digest: str,
) -> dict[str, float]:
    with safe_open(checkpoint, "pt") as file:
        if file.metadata().get("data") != digest:
            raise ValueError(f"{checkpoint}: a training on other items; remove it to begin anew")
        for name, parameter in parameters.items():
            parameter.copy_(file.get_tensor(f"weight/{name}"))
            state = {key: file.get_tensor(f"{key}/{name}") for key in ("exp_avg", "exp_avg_sq", "step")}
            optimizer.state[parameter] = state
        counts: dict[str, float] = json.loads(file.metadata()["counts"])
    return counts
