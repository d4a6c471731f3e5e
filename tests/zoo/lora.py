"""Low-rank adapters on a model's linears (LoRA, arXiv 2106.09685), merged into them when trained."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Adapted(nn.Module):
    """`linear(x) + up(down(x)) * 2`: the usual scale, alpha = 2 rank. The linear itself is frozen."""

    scale = 2.0

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = nn.Parameter(torch.empty(rank, linear.in_features))
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        low = nn.functional.linear(nn.functional.linear(inputs, self.down), self.up)
        return self.linear(inputs) + self.scale * low

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        self.linear.weight += self.scale * (self.up @ self.down)
        return self.linear


def adapt(model: PreTrainedModel, rank: int, seed: int) -> None:
    """Freeze the model and put an adapter on every linear of its decoder layers."""
    torch.manual_seed(seed)
    model.requires_grad_(False)
    for parent in list(model.model.layers.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Adapted(child, rank))


def merge(model: PreTrainedModel) -> None:
    """Undo `adapt`, keeping what was learnt."""
    for parent in list(model.model.layers.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Adapted):
                setattr(parent, name, child.merged())
    model.requires_grad_(True)


def save_adapter(checkpoint: Path, base: Path, folder: Path) -> Path:
    """The adapters of a trained checkpoint in PEFT's format, fp32."""
    weights = {
        name.removeprefix("weight/"): value
        for name, value in load_file(checkpoint).items()
        if name.startswith("weight/")
    }
    parts = {"down": "lora_A", "up": "lora_B"}
    tensors = {}
    for name, value in weights.items():
        module, _, part = name.rpartition(".")
        tensors[f"base_model.model.{module}.{parts[part]}.weight"] = value
    rank = min(next(iter(weights.values())).shape)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": Adapted.scale * rank,
        "use_rslora": False,
        "use_dora": False,
        "target_modules": sorted({name.split(".")[-2] for name in weights}),
        "bias": "none",
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder
