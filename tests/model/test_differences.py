"""Which config entries make a model compute differently: asked of the model, whatever the entry is called."""

from __future__ import annotations

from typing import Any

import pytest

from meswitch_cli.errors import CheckpointError
from meswitch_cli.model.differences import model_differences

COMMON = {
    "vocab_size": 72,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 1e4}
LONG |= {"original_max_position_embeddings": 128}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
BASES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-dynamic": {"model_type": "llama", "rope_scaling": DYNAMIC},
    "qwen2": {"model_type": "qwen2", "use_sliding_window": False, "max_window_layers": 28, "sliding_window": 131072},
    "qwen2-sliding": {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1, "sliding_window": 64},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "gemma2": {"model_type": "gemma2", "head_dim": 8, "query_pre_attn_scalar": 8},
    "phi3": {"model_type": "phi3", "rope_scaling": LONG, "original_max_position_embeddings": 128},
    "granite": {"model_type": "granite"},
    "gpt_neox": {"model_type": "gpt_neox"},
    "gpt2": {"model_type": "gpt2"},
}
NO_EFFECT: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"unsloth_version": "2025.1.5", "unsloth_fixed": True}),
    ("llama", {"transformers.js_config": {"dtype": "q4"}, "anything at all": [1, {"x": None}]}),
    ("llama", {"gradient_checkpointing": True, "neftune_noise_alpha": 5}),
    ("llama", {"attention_dropout": 0.1, "hidden_dropout_prob": 0.1, "initializer_range": 0.5}),
    ("llama", {"output_hidden_states": True, "return_dict": False, "use_cache": False}),
    ("llama", {"max_position_embeddings": 4096}),
    ("llama", {"head_dim": 8, "mlp_bias": False, "rope_scaling": None}),
    ("llama", {"rope_parameters": {"type": "default", "rope_type": "default", "rope_theta": 10000}}),
    ("llama", {"torch_dtype": "float16", "attn_implementation": "flash_attention_2", "quantization_config": None}),
    ("llama", {"vocab_size": 80, "eos_token_id": [1, 75], "pad_token_id": 79, "tie_word_embeddings": True}),
    ("llama", {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "a"}, "problem_type": "x"}),
    ("qwen2", {"max_window_layers": 21, "sliding_window": 32768, "use_mrope": False}),
    ("gemma2", {"hidden_act": "gelu"}),  # which the family does not look at
    ("phi3", {"resid_pdrop": 0.3, "embd_pdrop": 0.3}),
    ("gpt_neox", {"hidden_dropout": 0.3, "attention_dropout": 0.3, "classifier_dropout": 0.3}),
    ("gpt2", {"summary_type": "x", "attn_pdrop": 0.3, "unsloth_version": "1"}),
    ("mistral", {"max_length": 4096, "do_sample": True, "temperature": 0.7, "model_max_length": 4096}),
]
READ: list[tuple[str, dict[str, Any], list[str]]] = [
    ("llama", {"rope_theta": 5e5}, ["rope_parameters"]),
    ("llama", {"rope_scaling": DYNAMIC}, ["rope_parameters"]),
    ("llama", {"rms_norm_eps": 1e-5}, ["rms_norm_eps"]),
    ("llama", {"hidden_act": "gelu"}, ["hidden_act"]),
    ("llama", {"attention_bias": True}, ["attention_bias"]),
    ("llama", {"is_causal": False}, ["is_causal"]),
    ("llama", {"unsloth_version": "1", "rms_norm_eps": 1e-5, "rope_theta": 7.0}, ["rms_norm_eps", "rope_parameters"]),
    ("llama-dynamic", {"max_position_embeddings": 4096}, ["max_position_embeddings"]),
    ("llama-dynamic", {"rope_scaling": DYNAMIC | {"factor": 4.0}}, ["rope_parameters"]),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, ["layer_types"]),
    ("qwen2-sliding", {"max_window_layers": 2}, ["layer_types"]),
    ("qwen2-sliding", {"sliding_window": 32}, ["sliding_window"]),
    ("mistral", {"sliding_window": 4096}, ["sliding_window"]),
    ("gemma2", {"final_logit_softcapping": 20.0}, ["final_logit_softcapping"]),
    ("gemma2", {"attn_logit_softcapping": None}, ["attn_logit_softcapping"]),
    ("gemma2", {"query_pre_attn_scalar": 64}, ["query_pre_attn_scalar"]),
    ("phi3", {"rope_scaling": LONG | {"long_factor": [3.0] * 4}}, ["rope_parameters"]),
    ("granite", {"logits_scaling": 2.0, "embedding_multiplier": 3.0}, ["embedding_multiplier", "logits_scaling"]),
    ("granite", {"residual_multiplier": 0.5}, ["residual_multiplier"]),
    (
        "gpt2",
        {"activation_function": "relu", "scale_attn_weights": False},
        ["activation_function", "scale_attn_weights"],
    ),
    ("gpt_neox", {"rotary_pct": 0.5}, ["rope_parameters"]),
    ("gpt_neox", {"use_parallel_residual": False, "layer_norm_eps": 0.1}, ["layer_norm_eps", "use_parallel_residual"]),
]


@pytest.mark.parametrize(("family", "change"), NO_EFFECT, ids=str)
def test_entries_under_which_nothing_computes_differently(family: str, change: dict[str, Any]) -> None:
    base = COMMON | BASES[family]
    assert model_differences(base, base | change) == []
    assert model_differences(base | change, base) == []


@pytest.mark.parametrize(("family", "change", "named"), READ, ids=str)
def test_entries_that_layers_read(family: str, change: dict[str, Any], named: list[str]) -> None:
    base = COMMON | BASES[family]
    assert model_differences(base, base | change) == named


def test_configs_are_left_as_they_are() -> None:
    base = COMMON | {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0}}
    before = str(base)
    assert model_differences(base, base | {"rope_theta": 7.0}) == ["rope_parameters"]
    assert str(base) == before


UNUSABLE = [{"rope_scaling": 3}, {"model_type": "nothing"}, {"hidden_act": "no such"}, {"num_hidden_layers": "x"}]


@pytest.mark.parametrize("change", UNUSABLE, ids=str)
def test_a_config_that_transformers_cannot_use_ends_in_a_sentence(change: dict[str, Any]) -> None:
    base = COMMON | BASES["llama"]
    with pytest.raises(CheckpointError, match=r"config\.json"):
        model_differences(base, base | change)
