"""One meaning of the dtype of a checkpoint whose weights are in several."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.engine.base_model import served_dtype
from meswitch_cli.engine.settings import EngineSettings
from meswitch_cli.errors import UsageError
from meswitch_cli.model.dtype import model_dtype, stored_dtype


def _checkpoint(folder: Path, **sizes: tuple[int, torch.dtype]) -> Checkpoint:
    tensors = {name: torch.zeros(count, dtype=dtype) for name, (count, dtype) in sizes.items()}
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return Checkpoint.open(str(folder))


@pytest.mark.parametrize(
    ("bf16", "fp32", "expected"),
    [
        (300, 100, torch.bfloat16),  # most bytes and most weights, though the header begins with fp32
        (150, 100, torch.float32),  # most bytes, though not most weights
        (100, 150, torch.float32),
    ],
)
def test_the_dtype_of_most_bytes(tmp_path: Path, bf16: int, fp32: int, expected: torch.dtype) -> None:
    checkpoint = _checkpoint(tmp_path, a=(fp32, torch.float32), b=(bf16, torch.bfloat16))
    assert next(iter(checkpoint.tensors.values())).dtype == torch.float32
    assert stored_dtype(checkpoint) == expected
    assert model_dtype(checkpoint, "auto") == expected
    assert model_dtype(checkpoint, "float16") == torch.float16
    assert served_dtype(checkpoint, EngineSettings(base=str(tmp_path), device="cpu")) == expected


@pytest.mark.parametrize("config", [{"dtype": "bfloat16"}, {"torch_dtype": "torch.bfloat16"}], ids=str)
def test_without_weights_the_config_says(tmp_path: Path, config: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert stored_dtype(Checkpoint.describe(str(tmp_path))) == torch.bfloat16


def test_without_weights_and_without_a_word_it_must_be_given(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint.describe(str(tmp_path))
    with pytest.raises(UsageError, match=r"has no weights and no dtype in its config\.json: give --dtype"):
        model_dtype(checkpoint, "auto")
    assert model_dtype(checkpoint, "float32") == torch.float32
