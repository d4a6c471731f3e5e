"""How close a compressed expert is to the full one: the same tokens through both, compared answer token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from meswitch_cli.evaluation.figures import QUANTITIES, LogProbabilities, TokenFigures
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


def refuse_non_finite(logits: torch.Tensor, index: int) -> None:
    """Raise FloatingPointError, naming item and answer token, where logits are NaN or infinite."""
    bad = (~torch.isfinite(logits)).any(dim=-1)
    if bad.any():
        count, token = int(bad.sum()), int(bad.nonzero()[0])
        raise FloatingPointError(f"logits of item {index} are not finite ({count} tokens, the first is {token})")


def compare_tokens(reference: torch.Tensor, logits: torch.Tensor, answer: torch.Tensor) -> TokenFigures:
    """Compare one item's logits `[tokens, vocabulary]` with the reference's log-probabilities of the same shape.

    Log-softmax in fp32, sums over the vocabulary in float64. Where the vocabularies differ in size (added tokens),
    both are renormalised over the part that they share.

    Raises:
        ValueError: an answer token lies outside the shared vocabulary.
    """
    shared = min(reference.shape[-1], logits.shape[-1])
    if len(answer) and int(answer.max()) >= shared:
        raise ValueError(f"token {int(answer.max())} is outside the shared vocabulary of {shared}")
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in QUANTITIES}
    for chunk in (slice(start, start + COMPARED_ROWS) for start in range(0, len(answer), COMPARED_ROWS)):
        rows = _rows(reference[chunk], logits[chunk], answer[chunk], shared)
        for name, quantity in QUANTITIES.items():
            parts[name].append(quantity(rows))
    return {name: torch.cat(found).double().cpu() for name, found in parts.items()}


def _rows(reference: torch.Tensor, logits: torch.Tensor, answer: torch.Tensor, shared: int) -> LogProbabilities:
    ours = torch.log_softmax(logits[:, :shared].float(), dim=-1)
    theirs = reference.to(ours.device)
    if theirs.shape[-1] != shared:
        theirs = torch.log_softmax(theirs[:, :shared], dim=-1)
    wanted = answer.to(ours.device)[:, None]
    return LogProbabilities(theirs, ours, theirs.gather(1, wanted)[:, 0], ours.gather(1, wanted)[:, 0])
