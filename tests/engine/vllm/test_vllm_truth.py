"""The black-box tests of the truth, over vLLM."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine.family import make_family, mean_hidden_state, requests
from engine.test_truth import (
    check,
    test_full_cache_begins_requests_again,
    test_mixed_batches_equal_plain_models,
    test_random_arrivals,
)
from engine.vllm.conftest import HEAD_DIM, NEEDS_VLLM

from meswitch_cli.engine.contract import BASE, EngineError
from meswitch_cli.engine.vllm.engine import VllmEngine

__all__ = [
    "test_full_cache_begins_requests_again",
    "test_mixed_batches_equal_plain_models",
    "test_random_arrivals",
]

pytestmark = NEEDS_VLLM
Start = Callable[..., VllmEngine]


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("qwen2", {}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {}),
        ("gemma", {}),
        ("gemma2", {"sliding_window": 16}),
        ("gemma3", {"sliding_window": 16}),
        ("mistral", {"sliding_window": 8}),
        ("phi3", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "plain",
)
def test_families(name: str, config: dict[str, object], tmp_path: Path, start: Start) -> None:
    # Families without a width of heads of their own have as few heads as make them 32 wide.
    sizes = {"num_attention_heads": 3, "num_key_value_heads": 3} if name in ("qwen2", "phi3") else {}
    own = make_family(tmp_path, name, **{"head_dim": HEAD_DIM, **sizes, **config})
    if name == "gemma2":  # transformers leaves its soft cap out of attention unless it computes that itself
        for model in own.references.values():
            model.set_attn_implementation("eager")
    engine = start(own, slots=2, max_wait=0.05)
    check(engine, own, requests(own, 12, seed=1))


@pytest.mark.parametrize("name", ["olmo2", "smollm3", "phi"])
def test_a_family_that_vllm_runs_through_transformers_layers(name: str, tmp_path: Path, start: Start) -> None:
    """vLLM has no code of its own for it."""
    own = make_family(tmp_path, name, num_attention_heads=3, num_key_value_heads=3)
    engine = start(own, slots=2, max_wait=0.05)
    check(engine, own, requests(own, 12, seed=1))
    prompts = [list(range(20, 40)), [7]]
    for prompt, row in zip(prompts, engine.pooled_hidden_states(prompts, 1), strict=True):
        torch.testing.assert_close(row, mean_hidden_state(own.references[BASE], prompt, 1), rtol=1e-4, atol=1e-4)


def test_a_family_whose_layers_vllm_calls_otherwise_is_refused(tmp_path: Path, start: Start) -> None:
    own = make_family(tmp_path, "gpt_neox", num_attention_heads=3, num_key_value_heads=3)
    with pytest.raises(EngineError, match="use --engine transformers"):
        start(own)


def test_expert_with_a_head_of_its_own_on_a_tied_base(tmp_path: Path, start: Start) -> None:
    own = make_family(tmp_path, "llama", head_dim=HEAD_DIM, tie_word_embeddings=True, untie=("beta",))
    engine = start(own)
    check(engine, own, requests(own, 12, seed=2))
