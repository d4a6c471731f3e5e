"""A random base and expert in a fraction of a second: ordinary Hugging Face folders for unit tests.

Nothing sensible comes out of them, but every family's tensors, names and quirks are there, and the expert's
delta looks like a real one: about one per cent of the weight's norm, with a few heavy input columns.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .tiny_tokenizer import tiny_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Sizes that are multiples of 8 but not of 64 or 32: blocks, groups and packing words all end in the middle.
_COMMON = {
    "hidden_size": 96,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "vocab_size": 268,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}
_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

#: Folders of a base and of an expert.
Pair = tuple[Path, Path]
_Family = tuple[str, Mapping[str, Any]]

# model_type of the configuration and what the family needs beside or instead of the common sizes.
DENSE_FAMILIES: Mapping[str, _Family] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "gemma": ("gemma", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", {"head_dim": 32, "query_pre_attn_scalar": 32, "tie_word_embeddings": True}),
    "gemma3": ("gemma3_text", {"head_dim": 32, "query_pre_attn_scalar": 32, "tie_word_embeddings": True}),
    "phi": ("phi", {}),
    "phi3": ("phi3", {}),
    "gpt_neox": ("gpt_neox", {}),
}
FAMILIES: Mapping[str, _Family] = {
    **DENSE_FAMILIES,
    # What vLLM runs through transformers' layers: norms after the layers; some layers without positions.
    "olmo2": ("olmo2", {}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    # Experts fused into 3-D tensors in memory, apart on disk.
    "mixtral": ("mixtral", _EXPERTS),
    # As many families are: experts that are narrower than a dense layer.
    "qwen3_moe": (
        "qwen3_moe",
        {"head_dim": 24, "moe_intermediate_size": 40, "num_experts": 4, "num_experts_per_tok": 2},
    ),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    # Experts fused into 3-D tensors in memory and on disk.
    "gpt_oss": (
        "gpt_oss",
        {"head_dim": 24, "sliding_window": 64, "rope_parameters": _PLAIN_ROPE, **_EXPERTS},
    ),
    "granitemoe": ("granitemoe", _EXPERTS),
    # Keys and values made of a few numbers for all heads, and not of one width.
    "deepseek_v3": (
        "deepseek_v3",
        {
            "num_key_value_heads": 4,
            "moe_intermediate_size": 40,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 32,
            "kv_lora_rank": 24,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
        },
    ),
    # Layers that keep a state in place of keys and values, between layers of attention.
    "qwen3_5": (
        "qwen3_5_text",
        {
            "head_dim": 24,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
    ),
    # Layers of convolutions.
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"], "full_attn_idxs": None}),
    # Heads of several widths, and keys and values that layers share.
    "gemma4": (
        "gemma4_text",
        {
            "head_dim": 16,
            "global_head_dim": 32,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "sliding_window": 16,
            "vocab_size_per_layer_input": 268,
            "hidden_size_per_layer_input": 16,
            "tie_word_embeddings": True,
        },
    ),
    # Linears kept the other way round, positions in a table.
    "gpt2": ("gpt2", {"n_inner": 72}),
}


def make_pair(
    directory: Path,
    family: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    expert_dtype: torch.dtype | None = None,
    max_shard_size: str | None = None,
    expert_max_shard_size: str | None = None,
    relative_delta: float = 1e-2,
    heavy_columns: int = 3,
    change_norms: bool = True,
    change_biases: bool = True,
    equal: Collection[str] = (),
    added_rows: int = 0,
    **config: Any,
) -> Pair:
    """Make the folders `directory/base` and `directory/expert`, each with configuration and tokenizer.

    `max_shard_size` ("20KB") makes sharded files, `equal` names the tensors that the expert leaves bit for
    bit as they are, `added_rows` the expert's extra tokens, and `config` overrides the configuration
    (`tie_word_embeddings`, `attention_bias`, `num_key_value_heads`, ...). Raises KeyError for an unknown
    family and ValueError for a name in `equal` that the model lacks.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, extra = FAMILIES[family]
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)  # what transformers draws and `_randomise` only adds to
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(model_type, **{**_COMMON, **extra, **config}), dtype=torch.float32
        )
    _randomise(model, generator)
    model.eval().to(dtype)
    base, expert = directory / "base", directory / "expert"
    _save(model, base, dtype, max_shard_size)
    tiny_tokenizer().save_pretrained(base)

    model.float()
    if unknown := set(equal) - {name for name, _ in model.named_parameters(remove_duplicate=False)}:
        raise ValueError(f"equal: the {family} model has no {', '.join(sorted(unknown))}")
    for name, parameter in model.named_parameters():
        is_bias = name.endswith("bias")
        is_norm = parameter.dim() == 1 and not is_bias
        if name not in equal and not (is_norm and not change_norms) and not (is_bias and not change_biases):
            parameter.data += _delta(parameter.data, relative_delta, heavy_columns, generator)
    if added_rows:
        _add_rows(model, added_rows, generator)
    model.to(expert_dtype or dtype)
    _save(model, expert, expert_dtype or dtype, expert_max_shard_size or max_shard_size)
    tiny_tokenizer(added_tokens=added_rows).save_pretrained(expert)
    return base, expert


def _randomise(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Weights under which greedy decoding wanders: no token's own embedding outweighs the layers.

    Gains and biases are their usual values and a little noise.
    """
    # Gemma multiplies its embedding by the root of the hidden size.
    embedding_scale = 0.02 if "gemma" in model.config.model_type else 0.1
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            parameter.data += 0.1 * noise
        elif "embed_tokens" in name or "embed_in" in name:
            parameter.data = embedding_scale * noise
        else:
            parameter.data = 2 * noise * parameter.shape[-1] ** -0.5


def _delta(weight: torch.Tensor, relative: float, heavy_columns: int, generator: torch.Generator) -> torch.Tensor:
    """Gaussian, `relative` times the weight's norm; a matrix has some input columns eight times larger."""
    delta = torch.randn(weight.shape, generator=generator)
    if weight.dim() >= 2 and heavy_columns:
        delta[..., torch.randperm(weight.shape[-1], generator=generator)[:heavy_columns]] *= 8
    return delta * (relative * weight.norm() / delta.norm())


def _add_rows(model: PreTrainedModel, count: int, generator: torch.Generator) -> None:
    rows = model.config.get_text_config().vocab_size
    model.resize_token_embeddings(rows + count, mean_resizing=False)
    ends = {
        id(module.weight): module.weight for module in (model.get_input_embeddings(), model.get_output_embeddings())
    }
    for weight in ends.values():
        weight.data[rows:] = 0.1 * torch.randn(count, weight.shape[1], generator=generator)


def _save(model: PreTrainedModel, folder: Path, dtype: torch.dtype, max_shard_size: str | None) -> None:
    model.config.dtype = dtype
    model.save_pretrained(folder, **({"max_shard_size": max_shard_size} if max_shard_size else {}))
    # A folder that says where it was made would differ between two runs.
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text())
    config.pop("_name_or_path", None)
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
