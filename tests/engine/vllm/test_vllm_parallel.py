"""Experts over several workers of vLLM: tensors cut between them, or layers, or requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.family import Family, make_family, requests
from engine.test_truth import check
from engine.vllm.conftest import HEAD_DIM, NEEDS_VLLM
from engine.vllm.plain_server import ENVIRONMENT, PlainServer

from meswitch_cli.engine.contract import BASE
from meswitch_cli.engine.vllm.engine import VllmEngine

pytestmark = NEEDS_VLLM

#: Input channels of every projection fall into halves that begin with a group of channels.
SIZES: Mapping[str, Any] = {"head_dim": HEAD_DIM, "intermediate_size": 192}
#: Families whose heads are as wide as hidden size and their number make them.
WIDE = {"hidden_size": 128, "num_attention_heads": 4}
FAMILIES: Mapping[str, tuple[str, Mapping[str, Any], str]] = {
    "tensor-qwen2-tied": ("qwen2", WIDE | {"tie_word_embeddings": True, "num_key_value_heads": 1}, "tensor_parallel"),
    "tensor-phi3": ("phi3", WIDE, "tensor_parallel"),
    "tensor-smollm3": ("smollm3", WIDE, "tensor_parallel"),
    "pipeline-olmo2": ("olmo2", {}, "pipeline_parallel"),
    "pipeline-gemma3-tied": ("gemma3", {}, "pipeline_parallel"),
}


@pytest.mark.parametrize("split", ["tensor", "pipeline"])
def test_mixed_traffic_over_two_workers(split: str, tmp_path: Path) -> None:
    made = make_family(tmp_path, "llama", **SIZES)
    family: Family = replace(made, artifacts={expert: made.artifacts[expert] for expert in ("alpha", "beta")})
    options = ("--max-loras", "2", "--max-lora-rank", "8", f"--{split}-parallel-size", "2")
    with PlainServer(family.base, family.artifacts, tmp_path, *options) as server:
        server.check(family, requests(family, 12, seed=4))


@pytest.mark.parametrize(("name", "config", "split"), FAMILIES.values(), ids=FAMILIES.keys())
def test_families_over_two_workers(
    name: str, config: Mapping[str, Any], split: str, tmp_path: Path, start: Callable[..., VllmEngine]
) -> None:
    """In our engine, whose processes are forked: the workers are those of vLLM's server."""
    family = make_family(tmp_path, name, **{**SIZES, **config})
    engine = start(family, slots=2, **{split: 2})
    check(engine, family, requests(family, 12, seed=4))


@pytest.mark.parametrize("split", ["tensor_parallel", "pipeline_parallel", "data_parallel"])
def test_our_engine_over_two_workers(
    split: str, tmp_path: Path, start: Callable[..., VllmEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an expert that has tokens of its own, one that comes later, and hidden states of either half's layers."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    family = make_family(tmp_path, "llama", **SIZES)
    late = {"beta": family.artifacts["beta"]}
    early = {name: path for name, path in family.artifacts.items() if name not in late}
    engine = start(family, experts=early, slots=2, **{split: 2})
    engine.load_expert("beta", late["beta"])
    check(engine, family, requests(family, 12, seed=5))
    prompt = list(range(20, 60))
    with torch.inference_mode():
        states = family.references[BASE](torch.tensor([prompt]), output_hidden_states=True).hidden_states
    (first,) = engine.pooled_hidden_states([prompt], 1)
    torch.testing.assert_close(first, states[1][0].mean(0), rtol=1e-4, atol=1e-4)
