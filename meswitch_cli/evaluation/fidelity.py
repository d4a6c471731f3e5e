"""How close a compressed expert is to the full one: the same tokens through both, compared answer token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

#: Tokens, padding included, that go through a model at once.
BATCH_TOKENS = 2048


@dataclass(frozen=True)
class EncodedItem:
    """A prompt and its answer as token ids; the answer begins at `answer_start`."""

    tokens: tuple[int, ...]
    answer_start: int

    @property
    def answer(self) -> torch.Tensor:
        return torch.tensor(self.tokens[self.answer_start :])


@dataclass(frozen=True)
class ItemFidelity:
    """Sums over the answer tokens of one item.

    Attributes:
        tokens: answer tokens.
        kl: of the reference's next-token distribution to the model's, nats.
        loss: the model's negative log-likelihood of the answer, nats.
        agreed: tokens where both rank the same token first.
    """

    tokens: int
    kl: float
    loss: float
    agreed: int


@torch.no_grad()
def answer_logits(model: Any, items: Sequence[EncodedItem]) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (item index, logits `[answer tokens, vocabulary]` fp32 that predict its answer), in order of length.

    `model` is a transformers causal language model; positions before any answer skip its head.
    """
    order = sorted(range(len(items)), key=lambda index: len(items[index].tokens))
    while order:
        batch = [order.pop()]
        length = len(items[batch[0]].tokens)
        while order and (len(batch) + 1) * length <= BATCH_TOKENS:
            batch.append(order.pop())
        ids = torch.zeros(len(batch), length, dtype=torch.long)
        for row, index in enumerate(batch):  # padded on the right, where causal attention never looks back from
            ids[row, : len(items[index].tokens)] = torch.tensor(items[index].tokens)
        device = model.get_input_embeddings().weight.device
        first = min(items[index].answer_start for index in batch) - 1
        kept = torch.arange(first, length, device=device)
        logits = model(ids.to(device), use_cache=False, logits_to_keep=kept).logits
        for row, index in enumerate(batch):
            start, stop = items[index].answer_start - 1, len(items[index].tokens) - 1
            yield index, logits[row, start - first : stop - first].float()


def reference_logits(model: Any, items: Sequence[EncodedItem]) -> list[torch.Tensor]:
    """The full expert's logits, held in memory: answer tokens x vocabulary x 4 bytes."""
    logits: list[torch.Tensor] = [torch.empty(0)] * len(items)
    for index, values in answer_logits(model, items):
        logits[index] = values
    return logits


def compare(reference: Sequence[torch.Tensor], model: Any, items: Sequence[EncodedItem]) -> list[ItemFidelity]:
    """Compare a model with the reference, item by item.

    Raises:
        FloatingPointError: the model's logits are not finite.
    """
    results: list[ItemFidelity] = [ItemFidelity(0, 0.0, 0.0, 0)] * len(items)
    for index, logits in answer_logits(model, items):
        if not torch.isfinite(logits).all():
            raise FloatingPointError(f"logits of item {index} are not finite")
        ours = torch.log_softmax(logits, dim=-1)
        theirs = torch.log_softmax(reference[index], dim=-1)
        kl = (theirs.exp() * (theirs - ours)).sum(-1)
        loss = -ours.gather(1, items[index].answer.to(ours.device)[:, None])
        agreed = int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        results[index] = ItemFidelity(len(kl), float(kl.double().sum()), float(loss.double().sum()), agreed)
    return results
