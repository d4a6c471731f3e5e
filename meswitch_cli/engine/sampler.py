"""From logits to the next token of each request."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from meswitch_cli.engine.contract import GenerationRequest, TokenLogprob
from meswitch_cli.engine.expert import ServedModel
from meswitch_cli.engine.grammar import Grammar

#: Below this temperature the logits' differences leave fp32's range; it is greedy.
GREEDY_TEMPERATURE = 1e-5
#: The likeliest tokens are looked at first for top_p; a full sort of a vocabulary costs ten times as much.
TOP_P_CANDIDATES = 1024


class Sampler:
    """How one request's tokens are chosen, and what the choice remembers."""

    def __init__(self, request: GenerationRequest, model: ServedModel, seed: int, grammar: Grammar | None) -> None:
        self.sampling, self.vocabulary, self.grammar = request.sampling, model.vocabulary, grammar
        self.generated: list[int] = []
        self._seed = seed
        self._prompt = request.prompt_tokens
        self._counts: dict[int, int] = {}
        self._ends = sorted(
            {token for token in (*model.end_ids, *request.sampling.stop_token_ids) if token < model.vocabulary}
        )
        self.greedy = self.sampling.temperature < GREEDY_TEMPERATURE

    @property
    def complete(self) -> bool:
        """Whether the grammar allows nothing more."""
        return self.grammar is not None and self.grammar.complete

    def take(self, token: int) -> None:
        """Remember a chosen token."""
        self.generated.append(token)
        self._counts[token] = self._counts.get(token, 0) + 1
        if self.grammar is not None:
            self.grammar.take(token)

    def uniform(self) -> float:
        """A number in [0, 1) that follows from the seed and the position alone."""
        digest = hashlib.blake2b(f"{self._seed}:{len(self.generated)}".encode(), digest_size=8).digest()
        return (int.from_bytes(digest, "little") >> 11) / (1 << 53)

    def adjust(self, logits: Tensor) -> None:
        """Apply, in place, to logits `[width]`: vocabulary, penalties, bias, minimum length, grammar."""
        sampling = self.sampling
        if self.vocabulary < logits.shape[0]:
            logits[self.vocabulary :] = -torch.inf
        if sampling.repetition_penalty != 1.0:
            seen = torch.tensor(sorted({*self._prompt, *self._counts}), device=logits.device)
            values = logits[seen]
            penalty = sampling.repetition_penalty
            logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
        if self._counts and (sampling.frequency_penalty or sampling.presence_penalty):
            seen = torch.tensor(list(self._counts), device=logits.device)
            counts = torch.tensor(list(self._counts.values()), dtype=logits.dtype, device=logits.device)
            logits[seen] -= sampling.frequency_penalty * counts + sampling.presence_penalty
        if sampling.logit_bias:
            tokens = torch.tensor(list(sampling.logit_bias), device=logits.device)
            logits[tokens] += torch.tensor(list(sampling.logit_bias.values()), dtype=logits.dtype, device=logits.device)
        if self.grammar is not None:
            self.grammar.mask(logits)
        elif len(self.generated) < sampling.min_tokens and self._ends:
            logits[torch.tensor(self._ends, device=logits.device)] = -torch.inf

    def restrict(self, logits: Tensor) -> None:
        """Apply top_k, min_p and top_p, in place, to logits `[width]` that the temperature has divided."""
        sampling = self.sampling
        if 0 < sampling.top_k < logits.shape[0]:
            logits[logits < torch.topk(logits, sampling.top_k).values[-1]] = -torch.inf
        if sampling.min_p > 0:
            logits[logits < logits.max() + math.log(sampling.min_p)] = -torch.inf
        if sampling.top_p < 1:
            logits[logits < _top_p_threshold(logits, sampling.top_p)] = -torch.inf

    @property
    def restricts(self) -> bool:
        sampling = self.sampling
        return sampling.top_k > 0 or sampling.min_p > 0 or sampling.top_p < 1


def _top_p_threshold(logits: Tensor, top_p: float) -> Tensor:
    """The smallest logit of the fewest tokens whose probability reaches `top_p`."""
    total = logits.double().logsumexp(0)
    for count in (min(TOP_P_CANDIDATES, logits.shape[0]), logits.shape[0]):
        best = torch.topk(logits, count).values
        reached = torch.cumsum((best.double() - total).exp(), 0)
        kept = int((reached < top_p).sum())
        if kept < count:
            return best[kept]
    return best[-1]


@dataclass(frozen=True)
class ChosenToken:
    """A token, None where no token has a finite logit, and its log-probability where it was asked for."""

    token: int | None
    logprob: TokenLogprob | None


@torch.inference_mode()
def choose(logits: Tensor, samplers: Sequence[Sampler]) -> list[ChosenToken]:
    """Choose the next token of each row of logits `[rows, width]` fp32, which are changed in place.

    Log-probabilities are of the model's own distribution, before any penalty or temperature.
    """
    wanted = {row: sampler for row, sampler in enumerate(samplers) if sampler.sampling.logprobs is not None}
    logprobs = {row: torch.log_softmax(logits[row, : sampler.vocabulary], 0) for row, sampler in wanted.items()}
    for row, sampler in enumerate(samplers):
        sampler.adjust(logits[row])
    values, tokens = logits.max(1)
    drawn = [row for row, sampler in enumerate(samplers) if not sampler.greedy]
    if drawn:
        tokens[drawn] = _draw(logits[drawn], [samplers[row] for row in drawn])
    choices = []
    for row, token in enumerate(tokens.masked_fill_(~values.isfinite(), -1).tolist()):  # the one wait for the device
        logprob = _report(logprobs[row], max(token, 0), wanted[row]) if row in wanted else None
        choices.append(ChosenToken(token if token >= 0 else None, logprob))
    return choices


def _draw(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """Draw from softmax(logits / temperature) by inverting its distribution at each request's own number."""
    temperatures = torch.tensor([sampler.sampling.temperature for sampler in samplers], device=logits.device)
    logits = logits / temperatures[:, None]
    for row, sampler in enumerate(samplers):
        if sampler.restricts:
            sampler.restrict(logits[row])
    cumulated = torch.cumsum(torch.softmax(logits, 1, dtype=torch.float64), 1)
    uniform = torch.tensor([sampler.uniform() for sampler in samplers], dtype=torch.float64, device=logits.device)
    # `right` passes over tokens of probability 0; the last sum differs from 1 by rounding.
    place = torch.searchsorted(cumulated, (uniform * cumulated[:, -1])[:, None], right=True)[:, 0]
    return place.clamp(max=logits.shape[1] - 1)


def _report(logprobs: Tensor, token: int, sampler: Sampler) -> TokenLogprob:
    count = min(sampler.sampling.logprobs or 0, logprobs.shape[0])
    best = torch.topk(logprobs, count) if count else None
    top = () if best is None else tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return TokenLogprob(token, float(logprobs[token]), top)
