"""A base whose config.json ties a head that it stores with other values: the engine serves what is stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.engine.base_model import load_base
from meswitch_cli.engine.contract import EngineError
from zoo.tiny import make_pair


def _base(folder: Path, head_over_embedding: float) -> Path:
    """A base in fp32 whose stored head is a multiple of its embedding."""
    base, _ = make_pair(folder, dtype=torch.float32, tie_word_embeddings=True)
    tensors = safetensors.torch.load_file(base / "model.safetensors")
    head = tensors["model.embed_tokens.weight"] * head_over_embedding
    safetensors.torch.save_file(tensors | {"lm_head.weight": head}, base / "model.safetensors", {"format": "pt"})
    return base


@pytest.mark.parametrize(
    ("ratio", "dtype", "tied"),
    [
        (1.5, torch.float32, False),
        (1 + 2**-20, torch.float32, False),
        (1 + 2**-20, torch.bfloat16, False),  # equal once rounded, and an expert's embedding may still be another
        (1.0, torch.bfloat16, True),
    ],
)
def test_the_engine_ties_what_the_checkpoint_ties(tmp_path: Path, ratio: float, dtype: torch.dtype, tied: bool) -> None:
    base = _base(tmp_path, ratio)
    loaded = load_base(Checkpoint.open(str(base)), torch.device("cpu"), dtype)
    assert loaded.tied is tied
    assert (loaded.head.weight is loaded.embedding.weight) is tied
    stored = safetensors.torch.load_file(base / "model.safetensors")
    assert torch.equal(loaded.head.weight, stored["lm_head.weight"].to(dtype))
    assert torch.equal(loaded.embedding.weight, stored["model.embed_tokens.weight"].to(dtype))


def test_a_folder_that_transformers_does_not_load_is_served(tmp_path: Path) -> None:
    """An index without metadata: the weights are where it says."""
    base, _ = make_pair(tmp_path, max_shard_size="90KB")
    index = base / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": json.loads(index.read_text())["weight_map"]}))
    checkpoint = Checkpoint.open(str(base))
    assert "has no metadata" in checkpoint.notes[0]
    loaded = load_base(checkpoint, torch.device("cpu"), torch.float32)
    file = base / json.loads(index.read_text())["weight_map"]["model.norm.weight"]
    stored = safetensors.torch.load_file(file)["model.norm.weight"]
    assert torch.equal(loaded.layer("model.norm").weight, stored.float())


def test_a_model_that_cannot_be_built_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any) -> None:
        raise RuntimeError("no such\nkernel")

    monkeypatch.setattr("meswitch_cli.engine.base_model.build_model", fails)
    with pytest.raises(EngineError, match=r"^[^\n]*cannot be served: no such[^\n]*$"):
        load_base(Checkpoint.open(str(_base(tmp_path, 1.0))), torch.device("cpu"), torch.float32)
