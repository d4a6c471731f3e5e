"""Log-probabilities of a prompt's tokens are those of the plain model, however the prompt is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from engine.family import Family, requests

from meswitch_cli.engine import TransformersEngine, generate
from meswitch_cli.engine.contract import GenerationRequest

Start = Callable[..., TransformersEngine]


def wanted(family: Family, request: GenerationRequest, vocabulary: int) -> torch.Tensor:
    """`[prompt - 1, vocabulary]`: how likely each token was after those before it."""
    with torch.inference_mode():
        logits = family.references[request.expert](torch.tensor([request.prompt_tokens])).logits[0, :-1, :vocabulary]
    return torch.log_softmax(logits.float(), 1)


def scored(family: Family, count: int, top: int, prefix: int = 0) -> list[GenerationRequest]:
    """Requests of the base and of every expert; of each three, two ask for their prompts' log-probabilities."""
    batch = requests(family, count, seed=count, prefix=prefix)
    return [
        replace(request, sampling=replace(request.sampling, prompt_logprobs=top if index % 3 else None))
        for index, request in enumerate(batch)
    ]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_batch_tokens": 16},  # prompts are read in pieces, some of one token
        {"slots": 1, "max_wait": 0.02},
        {"prefix_sharing": False, "max_batch_tokens": 24},
    ],
    ids=["whole", "pieces", "one slot", "unshared"],
)
def test_a_prompts_log_probabilities_are_the_plain_models(
    family: Family, start: Start, options: dict[str, Any]
) -> None:
    engine = start(family, **options)
    batch = scored(family, 12, 3, prefix=20)
    for request, completion in zip(batch, generate(engine, batch), strict=True):
        assert completion.error is None and completion.tokens == family.greedy(request)
        told = completion.prompt_logprobs
        if request.sampling.prompt_logprobs is None:
            assert told == ()
            continue
        tokens = request.prompt_tokens
        assert [item.token for item in told] == list(tokens[1:])
        vocabulary = len(family.references[request.expert].get_output_embeddings().weight)
        right = wanted(family, request, vocabulary)
        own = torch.tensor([item.logprob for item in told])
        assert torch.allclose(own, right[torch.arange(len(tokens) - 1), list(tokens[1:])], atol=2e-3)
        best = torch.topk(right, 3, dim=1)
        assert torch.allclose(torch.tensor([[value for _, value in item.top] for item in told]), best.values, atol=2e-3)
    # What was read for one of them is shared with others afterwards, and its own prompt is read whole again.
    again = scored(family, 12, 0, prefix=20)
    for request, completion in zip(again, generate(engine, again), strict=True):
        if request.sampling.prompt_logprobs is not None:
            assert completion.cached_tokens == 0
            assert len(completion.prompt_logprobs) == len(request.prompt_tokens) - 1
            assert all(item.top == () for item in completion.prompt_logprobs)


def test_a_prompt_of_one_token_has_none(family: Family, start: Start) -> None:
    engine = start(family)
    (request,) = scored(family, 2, 1)[1:]
    (completion,) = generate(engine, [replace(request, prompt_tokens=request.prompt_tokens[:1])])
    assert completion.prompt_logprobs == () and completion.tokens
