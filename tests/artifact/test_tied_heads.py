"""Heads that config.json ties and the weights do not: what comes back is what transformers loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.artifact.base import check_base_shapes, refuse_other_base
from meswitch_cli.artifact.restore import restore
from meswitch_cli.calibration.data import read_calibration
from meswitch_cli.checkpoint.checkpoint import SINGLE_FILE, Checkpoint
from meswitch_cli.compression.job import compress, prepare
from meswitch_cli.compression.settings import CompressionSettings
from meswitch_cli.errors import ArtifactError
from meswitch_cli.model.build import build_model
from meswitch_cli.model.weights import CheckpointWeights
from zoo.tiny import make_pair

TOKENS = torch.arange(5, 45)[None]


def _set_tie(folder: Path, value: bool) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": value}))


def _tie(folder: Path) -> None:
    """Make a model's head its embedding."""
    _set_tie(folder, True)
    tensors = safetensors.torch.load_file(folder / SINGLE_FILE)
    del tensors["lm_head.weight"]
    safetensors.torch.save_file(tensors, folder / SINGLE_FILE, {"format": "pt"})


@torch.no_grad()
def _logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return torch.log_softmax(model(TOKENS).logits.double(), -1)


def _kl(reference: torch.Tensor, other: torch.Tensor) -> float:
    return float((reference.exp() * (reference - other)).sum(-1).mean())


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Of its own for each test: base and expert have heads of their own."""
    return make_pair(tmp_path)


def _artifact(pair: tuple[Path, Path], out: Path, **settings: object) -> Artifact:
    chosen = CompressionSettings(**({"bits": 4, "embedding_bits": 4, "salient": 2} | settings))  # type: ignore[arg-type]
    compress(prepare(str(pair[0]), str(pair[1]), out, chosen, None))
    return Artifact.open(out)


@pytest.mark.parametrize("which", ["expert", "base", "both", "expert of a tied base"])
def test_the_expert_comes_back_as_transformers_loads_it(pair: tuple[Path, Path], tmp_path: Path, which: str) -> None:
    base, expert = pair
    if which == "expert of a tied base":
        _tie(base)
    for name, folder in (("expert", expert), ("base", base)):
        if name in which or which == "both":
            _set_tie(folder, True)
    # The defaults of `compress` where a tensor may have nothing in common with the base's.
    settings = {"embedding_bits": 2, "steps": "unbiased"} if "tied base" in which else {}
    artifact = _artifact(pair, tmp_path / "art", **settings)
    back = restore(artifact, Checkpoint.open(str(base)), tmp_path / "back", dtype=torch.float32)
    full = _logits(expert)
    assert _kl(full, _logits(back)) < 0.15 * _kl(full, _logits(base))
    for folder in (artifact.path, back):
        assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False


def test_another_head_of_the_base_is_another_base(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, _ = pair
    _set_tie(base, True)
    artifact = _artifact(pair, tmp_path / "art")
    other = Path(shutil.copytree(base, tmp_path / "other"))
    tensors = safetensors.torch.load_file(base / SINGLE_FILE)
    safetensors.torch.save_file(tensors | {"lm_head.weight": -tensors["lm_head.weight"]}, other / SINGLE_FILE)
    opened = Checkpoint.open(str(other))
    check_base_shapes(artifact.manifest, opened)
    found = CheckpointWeights(opened).fingerprint
    with pytest.raises(ArtifactError, match="wrong base"):
        refuse_other_base(artifact.manifest, found, other)


def test_evaluation_and_distillation_build_it_with_its_own_head(
    pair: tuple[Path, Path], tmp_path: Path, calibration_file: Path
) -> None:
    for folder in pair:
        _set_tie(folder, True)
    weights = CheckpointWeights(Checkpoint.open(str(pair[1])))
    with torch.no_grad():
        built = build_model(weights, torch.device("cpu"), torch.float32)(TOKENS).logits
    assert _kl(_logits(pair[1]), torch.log_softmax(built.double(), -1)) < 1e-9
    data = read_calibration(calibration_file)
    chosen = CompressionSettings(
        bits=4, embedding_bits=4, salient=2, steps="distill", calibration=data.sha256, samples=2, sequence_length=16
    )
    compress(prepare(str(pair[0]), str(pair[1]), tmp_path / "art", chosen, data))
    back = restore(Artifact.open(tmp_path / "art"), Checkpoint.open(str(pair[0])), tmp_path / "back")
    assert _kl(_logits(pair[1]), _logits(back)) < 0.15 * _kl(_logits(pair[1]), _logits(pair[0]))
