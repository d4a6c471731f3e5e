"""Models that are in memory together, compared with one of them token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from meswitch_cli.evaluation.fidelity import EncodedItem, answer_logits, compare_tokens, refuse_non_finite
from meswitch_cli.evaluation.figures import TokenFigures, item_sums


def reference_logits(model: Any, items: Sequence[EncodedItem]) -> list[torch.Tensor]:
    """The full expert's logits: answer tokens x vocabulary x 4 bytes."""
    found = dict(answer_logits(model, items))
    return [found[index] for index in range(len(items))]


def compare(reference: Sequence[torch.Tensor], model: Any, items: Sequence[EncodedItem]) -> list[TokenFigures]:
    """A model's figures, item by item.

    Raises:
        FloatingPointError: the model's logits are not finite.
    """
    found = {}
    for index, logits in answer_logits(model, items):
        refuse_non_finite(logits, index)
        found[index] = compare_tokens(torch.log_softmax(reference[index], dim=-1), logits, items[index].answer)
    return [found[index] for index in range(len(items))]


def sums_by_item(figures: Sequence[TokenFigures]) -> dict[str, list[float]]:
    """Sums over each item's answer tokens, from which a page's figures and intervals are made."""
    rows = [item_sums(item) for item in figures]
    return {name: [row[name] for row in rows] for name in rows[0]}
