"""Configurations to be proven, and a model of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from meswitch_cli.engine.proof import prove, why_one_by_one
from zoo.tiny_tokenizer import tiny_tokenizer

CPU = torch.device("cpu")
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 268,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
#: Of families whose heads all have keys of their own.
UNGROUPED = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
OPT = UNGROUPED | {"ffn_dim": 96, "word_embed_proj_dim": 64, "max_position_embeddings": 128}
GPT_NEO = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 268, "max_position_embeddings": 512} | {
    "attention_types": [[["global", "local"], 1]],
    "bos_token_id": 0,
    "eos_token_id": 1,
}
ELECTRA = UNGROUPED | {"embedding_size": 32, "is_decoder": True}
BLOOM = {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 268}
#: A Llama of 70 billion parameters.
LARGE = {
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
}


def config_of(kind: str, **entries: Any) -> dict[str, Any]:
    return {"model_type": kind, **SIZES, **entries}


def check(config: dict[str, Any]) -> None:
    prove(config, "base", CPU, torch.float32)


def save(folder: Path, kind: str, **entries: Any) -> Path:
    torch.manual_seed(5)
    config = transformers.AutoConfig.for_model(kind, **entries)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = 1.5 * parameter.shape[-1] ** -0.5 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def why(config: dict[str, Any]) -> str | None:
    return why_one_by_one(config, "base", CPU, torch.float32)


ONE_BY_ONE = {
    "bloom": {"model_type": "bloom", **BLOOM},
    "gpt_neo": {"model_type": "gpt_neo", **GPT_NEO},
    "mamba": {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2},
    "gpt_oss": config_of("gpt_oss", num_local_experts=4, head_dim=16),
    "granitemoe": config_of("granitemoe", num_local_experts=4),
    "jetmoe": {"model_type": "jetmoe", **UNGROUPED},
    "qwen3_5_text": config_of("qwen3_5_text", layer_types=["linear_attention", "full_attention"]),
    "falcon_h1": config_of("falcon_h1"),
}
