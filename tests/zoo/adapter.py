"""A random LoRA adapter in a fraction of a second: a folder as PEFT saves one, and the model that it stands for."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

PREFIX = "base_model.model."
#: The suffixes of the linears that are adapted unless others are named.
TARGETS = ("q_proj", "v_proj", "down_proj")


def make_adapter(
    base: Path,
    folder: Path,
    *,
    seed: int = 0,
    rank: int = 4,
    targets: Collection[str] = TARGETS,
    saved: Collection[str] = (),
    dtype: torch.dtype = torch.float32,
    relative: float = 0.3,
    dora: bool = False,
    added_rows: int = 0,
    **config: Any,
) -> Path:
    """Make an adapter of the base folder's model.

    Every product is `relative` times its weight's norm. `targets` and `saved` are suffixes of module names;
    `added_rows` lengthens the embedding and the head that are saved. `config` goes into adapter_config.json.
    """
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.05,
        "bias": "none",
        "target_modules": sorted(targets),
        "modules_to_save": sorted(saved) or None,
        "use_dora": dora,
        "use_rslora": False,
    } | config
    tensors: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if name.endswith(tuple(targets)) and isinstance(weight, nn.Parameter):
            own, scale = rank_of(settings, name), scale_of(settings, name)
            left = torch.randn(weight.shape[0], own, generator=generator)
            right = torch.randn(own, weight.shape[1], generator=generator)
            left *= relative * weight.norm() / (scale * (left @ right).norm())
            if isinstance(module, nn.Embedding):
                tensors[f"{PREFIX}{name}.lora_embedding_A"] = left.T.contiguous().to(dtype)
                tensors[f"{PREFIX}{name}.lora_embedding_B"] = right.T.contiguous().to(dtype)
            else:
                tensors[f"{PREFIX}{name}.lora_A.weight"] = right.to(dtype)
                tensors[f"{PREFIX}{name}.lora_B.weight"] = left.to(dtype)
            if dora:
                length = weight.detach().norm(dim=1) * (1 + 0.1 * torch.randn(len(weight), generator=generator))
                tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = length.to(dtype)
        if saved and name.endswith(tuple(saved)):
            for leaf, value in module.named_parameters(recurse=False):
                noise = torch.randn(value.shape, generator=generator)
                full = value.detach() + relative * value.norm() / noise.norm() * noise
                if value.dim() == 2 and added_rows:
                    full = torch.cat([full, 0.1 * torch.randn(added_rows, value.shape[1], generator=generator)])
                tensors[f"{PREFIX}{name}.{leaf}"] = full.to(dtype)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def rank_of(settings: Mapping[str, Any], module: str) -> int:
    return int(_pattern(settings.get("rank_pattern"), module, settings["r"]))


def scale_of(settings: Mapping[str, Any], module: str) -> float:
    """alpha / r, or alpha / sqrt(r) where the adapter is rank-stabilised (arXiv 2312.03732)."""
    rank = rank_of(settings, module)
    alpha = _pattern(settings.get("alpha_pattern"), module, settings["lora_alpha"])
    return float(alpha) / (math.sqrt(rank) if settings["use_rslora"] else rank)


def _pattern(patterns: Mapping[str, Any] | None, module: str, otherwise: float) -> float:
    return next((value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module)), otherwise)


def merged_weights(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    """The adapted model's parameters by name, fp32: W + scale * B A, or m (W + scale * B A) / its rows' norms."""
    settings = json.loads((folder / "adapter_config.json").read_text())
    held = {
        name.removeprefix(PREFIX): value.float()
        for name, value in load_file(folder / "adapter_model.safetensors").items()
    }
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    weights = {name: value.detach().clone() for name, value in model.named_parameters(remove_duplicate=False)}
    for name, value in held.items():
        if name in weights:
            weights[name] = value
    for name in {name.rpartition(".lora_")[0] for name in held if ".lora_" in name}:
        scale = scale_of(settings, name)
        if f"{name}.lora_embedding_A" in held:
            delta = (held[f"{name}.lora_embedding_B"] @ held[f"{name}.lora_embedding_A"]).T
        else:
            delta = held[f"{name}.lora_B.weight"] @ held[f"{name}.lora_A.weight"]
        weight = weights[f"{name}.weight"]
        weight[: len(delta)] += scale * delta
        if f"{name}.lora_magnitude_vector" in held:
            weight *= (held[f"{name}.lora_magnitude_vector"] / weight.norm(dim=1)).unsqueeze(1)
    return weights
