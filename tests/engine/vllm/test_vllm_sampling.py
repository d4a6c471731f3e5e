"""The black-box tests of sampling, and of hidden states, on one engine of vLLM."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from engine.family import Family, mean_hidden_state, requests
from engine.test_sampler import (
    PROMPT,
    run,
    test_impossible_parameters_are_refused_by_name,
    test_impossible_prompts_are_refused,
    test_json_object,
    test_json_schema,
    test_length_stop_and_minimum,
    test_logprobs_are_the_plain_models,
    test_requests_without_a_seed_differ,
    test_seed_decides_whatever_else_is_in_the_batch,
    test_stop_strings_are_held_back,
    test_text_is_the_tokens_decoded,
)
from engine.vllm.conftest import NEEDS_VLLM, make_engine

from meswitch_cli.engine import generate
from meswitch_cli.engine.contract import BASE, EngineError, GenerationRequest, InvalidRequestError, Sampling
from meswitch_cli.engine.vllm.engine import VllmEngine

__all__ = [
    "test_impossible_parameters_are_refused_by_name",
    "test_impossible_prompts_are_refused",
    "test_json_object",
    "test_json_schema",
    "test_length_stop_and_minimum",
    "test_logprobs_are_the_plain_models",
    "test_requests_without_a_seed_differ",
    "test_seed_decides_whatever_else_is_in_the_batch",
    "test_stop_strings_are_held_back",
    "test_text_is_the_tokens_decoded",
]

pytestmark = NEEDS_VLLM


@pytest.fixture(scope="module")
def engine(family: Family) -> Iterator[VllmEngine]:
    made = make_engine(family, max_model_len=256, cache_tokens=8192)
    yield made
    made.stop()


@pytest.mark.parametrize("temperature", [0.005, 2.5])
def test_temperatures_that_vllm_would_change_are_refused(engine: VllmEngine, temperature: float) -> None:
    request = GenerationRequest("bad", BASE, PROMPT, Sampling(temperature=temperature))
    with pytest.raises(InvalidRequestError) as caught:
        engine.submit(request, lambda chunk: None)
    assert caught.value.parameter == "temperature"


def test_rows_beyond_the_vocabulary_are_never_chosen(engine: VllmEngine) -> None:
    """gamma's tokens have a place in vLLM's one vocabulary; nobody else chooses them, however hot."""
    for name in (BASE, "alpha"):
        completion = run(engine, name, temperature=2.0, seed=2, max_tokens=100, ignore_eos=True, logprobs=20)
        assert max(completion.tokens) < 268
        assert all(token < 268 for item in completion.logprobs for token, _ in item.top)


def test_hidden_states_are_the_plain_models_beside_generation(engine: VllmEngine, family: Family) -> None:
    prompts = [list(range(20, 40)), [7], list(range(3, 200)), list(range(3, 200))]
    plain = family.references[BASE]
    batch = requests(family, 8, seed=9)
    for layer in (1, 2):
        pooled = engine.pooled_hidden_states(prompts, layer)
        assert pooled.dtype == torch.float32 and pooled.shape == (4, 96)
        for row, prompt in zip(pooled, prompts, strict=True):
            torch.testing.assert_close(row, mean_hidden_state(plain, prompt, layer), rtol=1e-4, atol=1e-4)
        for request, completion in zip(batch, generate(engine, batch), strict=True):
            assert completion.tokens == family.greedy(request)
    assert engine.pooled_hidden_states([], 1).shape == (0, 96)
    for layer in (0, 3):
        with pytest.raises(EngineError, match="layers 1 to 2"):
            engine.pooled_hidden_states(prompts, layer)
    with pytest.raises(EngineError, match="without tokens"):
        engine.pooled_hidden_states([[]], 1)
