"""Log-probabilities of a prompt's own tokens, from the logits of the batches that read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from meswitch_cli.engine.contract import TokenLogprob
from meswitch_cli.engine.generation import Generation

#: Rows of logits that are turned into fp32 at once.
_ROWS = 64


@dataclass(frozen=True)
class ScoredRun:
    """Tokens of a batch whose logits say how likely the prompt's next token was.

    Attributes:
        first: place in the batch of the first of them.
        targets: the prompt's tokens that follow them, one each.
    """

    generation: Generation
    first: int
    targets: tuple[int, ...]


def scored_runs(batch: Sequence[Any]) -> list[ScoredRun]:
    """Those of a batch that transformers has laid out: its requests in order, each with its state and its length."""
    runs, place = [], 0
    for item in batch:
        generation: Generation = item.state.generation
        if generation.request.sampling.prompt_logprobs is not None:
            prompt, known = generation.request.prompt_tokens, len(generation.prompt_logprobs)
            start = item.state.position_offset - item.query_length
            stop = min(item.state.position_offset, len(prompt) - 1)
            # A request that begins again in a full cache reads what it has read before.
            begin = max(start, known)
            if begin < stop:
                runs.append(ScoredRun(generation, place + begin - start, prompt[begin + 1 : stop + 1]))
        place += item.query_length
    return runs


def places(runs: Sequence[ScoredRun]) -> list[int]:
    """Places in the batch of all tokens of the runs."""
    return [run.first + index for run in runs for index in range(len(run.targets))]


@torch.inference_mode()
def keep_scores(runs: Sequence[ScoredRun], logits: Tensor) -> None:
    """Add to each run's request what the logits `[tokens of the runs, width]` say of its targets."""
    row = 0
    for run in runs:
        vocabulary = run.generation.model.vocabulary
        count = min(run.generation.request.sampling.prompt_logprobs or 0, vocabulary)
        for start in range(0, len(run.targets), _ROWS):
            targets = run.targets[start : start + _ROWS]
            scores = torch.log_softmax(logits[row : row + len(targets), :vocabulary].float(), 1)
            own = scores[torch.arange(len(targets)), torch.tensor(targets, device=scores.device)].tolist()
            best = torch.topk(scores, count, dim=1)
            tops = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            run.generation.prompt_logprobs += [
                TokenLogprob(token, value, tuple(zip(ids, values, strict=True)))
                for token, value, (ids, values) in zip(targets, own, tops, strict=True)
            ]
            row += len(targets)
