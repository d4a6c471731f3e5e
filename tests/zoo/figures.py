"""What is measured of a fine-tune: its delta, its losses, its answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from meswitch_cli.estimates import wilson_interval

from .encoding import encode_item
from .generation import greedy_texts
from .skills import outcome
from .training import held_out_loss, relative_delta

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LEADING = 16


def delta_figures(base: Mapping[str, torch.Tensor], expert: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Means over the decoder's linears: ||D||/||W||, share of weights with the base's bits once rounded to bf16, and
    share of the delta's energy in its first 16 singular directions."""
    unchanged, leading = [], []
    for name, weight in base.items():
        if ".layers." in name and weight.dim() == 2:
            unchanged.append((expert[name].bfloat16() == weight.bfloat16()).float().mean().item())
            leading.append(_leading_energy(expert[name].float() - weight.float()))
    return {
        "relative_delta": relative_delta(base, expert),
        "unchanged": sum(unchanged) / len(unchanged),
        "leading_energy": sum(leading) / len(leading),
    }


def _leading_energy(delta: torch.Tensor) -> float:
    """Of a matrix that is nought everywhere, all of it."""
    narrow = delta if delta.shape[0] <= delta.shape[1] else delta.T
    energies = torch.linalg.eigvalsh(narrow.double() @ narrow.double().T).clamp(min=0)
    total = energies.sum()
    return 1.0 if total == 0 else (energies[-LEADING:].sum() / total).item()


def answer_figures(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Mapping[str, str]],
    max_new_tokens: int,
) -> dict[str, Any]:
    """Loss on the answers and exact match of greedy answers with its 95 % Wilson interval."""
    asked = [item for item in items if item["answer"]]
    texts = greedy_texts(model, tokenizer, asked, max_new_tokens)
    right = sum(outcome(item, text) == item["answer"] for item, text in zip(asked, texts, strict=True))
    loss = held_out_loss(model, [encode_item(tokenizer, item) for item in items])
    return {
        "loss": round(loss, 4),
        "items": len(asked),
        "right": right,
        "interval": [round(bound, 4) for bound in wilson_interval(right, len(asked))],
    }
