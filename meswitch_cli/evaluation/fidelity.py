"""How close a compressed expert is to the full one: the same tokens through both, compared answer token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from meswitch_cli.token_batches import batches_by_length, padded

#: Rows of logits compared at once: a handful of `[rows, vocabulary]` temporaries stay small.
COMPARED_ROWS = 256


@dataclass(frozen=True)
class EncodedItem:
    """A prompt and its answer as token ids; the answer begins at `answer_start`, which is at least 1."""

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


@dataclass(frozen=True)
class TokenFidelity:
    """Figures of every answer token of one item, each `[tokens]` float64 on the CPU.

    Attributes:
        kl: of the reference's next-token distribution to the model's, nats.
        loss: the model's negative log-likelihood of the token that follows, nats.
        reference_loss: the reference's.
        agreed: 1 where both rank the same token first, else 0.
        probability_change: the model's probability of the token that follows, less the reference's.
    """

    kl: torch.Tensor
    loss: torch.Tensor
    reference_loss: torch.Tensor
    agreed: torch.Tensor
    probability_change: torch.Tensor


@torch.no_grad()
def answer_logits(model: Any, items: Sequence[EncodedItem]) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (item index, logits `[answer tokens, vocabulary]` fp32 that predict its answer), in order of length.

    `model` is a transformers causal language model; positions before any answer skip its head.
    """
    for batch in batches_by_length([len(item.tokens) for item in items], longest_first=True):
        ids, _ = padded([items[index].tokens for index in batch])
        length = ids.shape[1]
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
        refuse_non_finite(logits, index)
        found = compare_tokens(torch.log_softmax(reference[index], dim=-1), logits, items[index].answer)
        results[index] = ItemFidelity(
            len(found.kl), float(found.kl.sum()), float(found.loss.sum()), int(found.agreed.sum())
        )
    return results


def refuse_non_finite(logits: torch.Tensor, index: int) -> None:
    """Raise FloatingPointError, naming item and answer token, where logits are NaN or infinite."""
    bad = (~torch.isfinite(logits)).any(dim=-1)
    if bad.any():
        count, token = int(bad.sum()), int(bad.nonzero()[0])
        raise FloatingPointError(f"logits of item {index} are not finite ({count} tokens, the first is {token})")


def compare_tokens(reference: torch.Tensor, logits: torch.Tensor, answer: torch.Tensor) -> TokenFidelity:
    """Compare one item's logits `[tokens, vocabulary]` with the reference's log-probabilities of the same shape.

    Log-softmax in fp32, sums over the vocabulary in float64. Where the vocabularies differ in size (added tokens),
    both are renormalised over the part that they share.

    Raises:
        ValueError: an answer token lies outside the shared vocabulary.
    """
    shared = min(reference.shape[-1], logits.shape[-1])
    if len(answer) and int(answer.max()) >= shared:
        raise ValueError(f"token {int(answer.max())} is outside the shared vocabulary of {shared}")
    parts = [
        _compare_rows(reference[rows], logits[rows], answer[rows], shared)
        for rows in (slice(start, start + COMPARED_ROWS) for start in range(0, len(answer), COMPARED_ROWS))
    ]
    columns = zip(*parts, strict=True)
    return TokenFidelity(*(torch.cat(list(column)).double().cpu() for column in columns))


def _compare_rows(
    reference: torch.Tensor, logits: torch.Tensor, answer: torch.Tensor, shared: int
) -> tuple[torch.Tensor, ...]:
    ours = torch.log_softmax(logits[:, :shared].float(), dim=-1)
    theirs = reference.to(ours.device)
    if theirs.shape[-1] != shared:
        theirs = torch.log_softmax(theirs[:, :shared], dim=-1)
    kl = (theirs.exp() * (theirs - ours)).sum(-1, dtype=torch.float64)
    wanted = answer.to(ours.device)[:, None]
    our_answer, their_answer = ours.gather(1, wanted)[:, 0], theirs.gather(1, wanted)[:, 0]
    agreed = ours.argmax(-1) == theirs.argmax(-1)
    return kl, -our_answer, -their_answer, agreed, our_answer.double().exp() - their_answer.double().exp()
