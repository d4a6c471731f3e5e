"""A delta that is worth nothing ends in an error that says what would do; one that is worth something does not."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.artifact.restore import restore
from meswitch_cli.artifact.workspace import Inputs, workspace
from meswitch_cli.calibration.data import random_window, read_calibration
from meswitch_cli.checkpoint.checkpoint import SINGLE_FILE, Checkpoint
from meswitch_cli.compression.closeness import WINDOWS, WeakDeltaError, closeness, doubtful
from meswitch_cli.compression.job import _quantise, compress, prepare
from meswitch_cli.compression.settings import RANDOM, CompressionSettings
from zoo.tiny import make_pair

Pair = tuple[Path, Path]


def _sparse_expert(base: Path, folder: Path, share: float, relative: float = 0.05) -> Path:
    """A fine-tune of which a share of each linear's weights moves, at random places; the rest stays bit for bit."""
    shutil.copytree(base, folder)
    generator = torch.Generator().manual_seed(3)
    tensors = safetensors.torch.load_file(base / SINGLE_FILE)
    for name, weight in tensors.items():
        if weight.dim() == 2 and "embed" not in name and "lm_head" not in name:
            moved = torch.rand(weight.shape, generator=generator) < share
            delta = torch.randn(weight.shape, generator=generator) * moved
            tensors[name] = (weight.float() + delta * relative * weight.float().norm() / delta.norm()).to(weight.dtype)
    safetensors.torch.save_file(tensors, folder / SINGLE_FILE, {"format": "pt"})
    return folder


def _settings(**changes: Any) -> CompressionSettings:
    return CompressionSettings(**({"calibration": RANDOM, "steps": "output-unbiased", "salient": 4} | changes))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair(tmp_path_factory.mktemp("base"), hidden_size=128, intermediate_size=256)[0]


@torch.no_grad()
def _log_probabilities(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return torch.log_softmax(model(tokens).logits.double(), -1)


def _kl(reference: torch.Tensor, other: torch.Tensor) -> float:
    return float((reference.exp() * (reference - other)).sum(-1).mean())


def test_a_sparse_update_at_two_bits_ends_in_an_error_that_names_what_would_do(base: Path, tmp_path: Path) -> None:
    expert, out = _sparse_expert(base, tmp_path / "expert", 0.02), tmp_path / "art"
    with pytest.raises(WeakDeltaError, match=r"no nearer to the expert than the base") as caught:
        compress(prepare(str(base), str(expert), out, _settings(bits=2), None))
    assert "% of its weights change" in str(caught.value) and "With --bits 4" in str(caught.value)
    assert "--keep-weak" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["expert"]  # no artifact, and nothing that needs --force
    compress(prepare(str(base), str(expert), out, _settings(bits=4, embedding_bits=4), None))


def test_a_weak_artifact_is_written_when_asked_for_and_its_weakness_told(base: Path, tmp_path: Path) -> None:
    expert, told = _sparse_expert(base, tmp_path / "expert", 0.02), list[str]()
    job = prepare(str(base), str(expert), tmp_path / "art", _settings(bits=2), None)
    compress(job, keep_weak=True, on_note=told.append)
    assert len(told) == 1 and "no nearer" in told[0] and "--keep-weak" not in told[0]
    assert Artifact.open(tmp_path / "art").manifest.tensors


def test_the_remedy_that_is_named_helps(base: Path, tmp_path: Path) -> None:
    expert = _sparse_expert(base, tmp_path / "expert", 0.02)
    with pytest.raises(WeakDeltaError) as caught:
        compress(prepare(str(base), str(expert), tmp_path / "weak", _settings(bits=2), None))
    named = re.search(r"(\S+) has a weight error of .* With --bits 4 it would be (\d+)%", str(caught.value))
    assert named
    told = list[str]()
    settings = _settings(bits=4, embedding_bits=4, salient=8, steps="unbiased", calibration=None)
    manifest = compress(prepare(str(base), str(expert), tmp_path / "art", settings, None), on_note=told.append)
    error = next(entry.weight_error for entry in manifest.tensors if entry.name == named[1])
    assert told == [] and error == pytest.approx(int(named[2]) / 100, abs=0.006)


@pytest.mark.parametrize(
    ("helpful", "advised"),
    [(0.12, "With --bits 4 --group-size 32 it would"), (1e-3, "No code of this version fits it")],
)
def test_what_does_not_help_is_not_advised(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, helpful: float, advised: str
) -> None:
    monkeypatch.setattr("meswitch_cli.compression.closeness.HELPFUL_ERROR", helpful)
    expert = _sparse_expert(base, tmp_path / "expert", 0.02)
    with pytest.raises(WeakDeltaError, match=advised):
        compress(prepare(str(base), str(expert), tmp_path / "weak", _settings(bits=2), None))


@pytest.mark.parametrize("settings", [{"bits": 2}, {"bits": 1, "rank": 16, "channel_scale": "rms"}], ids=["2", "1"])
def test_an_ordinary_fine_tune_is_never_doubted(pair: Pair, tmp_path: Path, settings: dict[str, Any]) -> None:
    told = list[str]()
    compress(prepare(str(pair[0]), str(pair[1]), tmp_path / "art", _settings(**settings), None), on_note=told.append)
    assert told == []


def test_a_large_weight_error_without_a_large_kl_is_no_weakness(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gains carry the fine-tune, and the linears' few random changes next to nothing."""
    expert = _sparse_expert(base, tmp_path / "expert", 0.02, relative=0.002)
    tensors = safetensors.torch.load_file(expert / SINGLE_FILE)
    generator = torch.Generator().manual_seed(1)
    for name, gain in tensors.items():
        if gain.dim() == 1:
            tensors[name] = (gain.float() * (1 + 0.2 * torch.randn(gain.shape, generator=generator))).to(gain.dtype)
    safetensors.torch.save_file(tensors, expert / SINGLE_FILE, {"format": "pt"})
    told = list[str]()
    job = prepare(str(base), str(expert), tmp_path / "art", _settings(bits=2), None)
    manifest = compress(job, on_note=told.append)
    assert max(entry.weight_error or 0 for entry in manifest.tensors) > 1 and told == []


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"added_rows": 3}),
        ("gemma2", {}),
        ("gpt_neox", {}),
        ("qwen2", {"expert_dtype": torch.float32}),
    ],
    ids=["plain", "tied", "added rows", "caps on logits", "gpt_neox", "other types"],
)
def test_closeness_is_what_transformers_measures(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    base, expert = make_pair(tmp_path, family, **options)
    job = prepare(str(base), str(expert), tmp_path / "art", _settings(), None)
    with workspace(job.out, force=False) as space:
        space.begin(Inputs(version="", settings={}, base_files="", expert_files=""))
        records = _quantise(job, space, "cpu", lambda what, nbytes, units: None, lambda note: None)
        found = closeness(job, space, records, "cpu")
        space.drop()
    compress(job)
    back = restore(Artifact.open(job.out), Checkpoint.open(str(base)), tmp_path / "back", dtype=torch.float32)
    tokens = torch.cat([random_window(268, index) for index in range(WINDOWS)])
    full, other, own = (_log_probabilities(path, tokens) for path in (expert, base, back))
    shared = [torch.log_softmax(item[..., :268], -1) for item in (full, other)]
    assert found.base == pytest.approx(_kl(*shared), rel=1e-3)
    assert found.compressed == pytest.approx(_kl(full, own), rel=1e-3)


def test_calibration_data_is_what_the_models_are_compared_on(
    base: Path, tmp_path: Path, calibration_file: Path
) -> None:
    expert, data = _sparse_expert(base, tmp_path / "expert", 0.02), read_calibration(calibration_file)
    settings = _settings(bits=2, calibration=data.sha256, samples=2, sequence_length=32)
    with pytest.raises(WeakDeltaError, match="no nearer"):
        compress(prepare(str(base), str(expert), tmp_path / "art", settings, data))


def test_a_family_whose_layers_do_not_run_alone_is_judged_by_its_weights(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("no such layer")

    monkeypatch.setattr("meswitch_cli.model.streaming.run_in_batches", fails)
    expert = _sparse_expert(base, tmp_path / "expert", 0.02)
    settings = _settings(bits=2, calibration=None, steps="unbiased")
    with pytest.raises(WeakDeltaError, match=r"do not run one by one: no such layer.*With --bits 4"):
        compress(prepare(str(base), str(expert), tmp_path / "art", settings, None))


def test_an_identical_expert_is_not_doubted(pair: Pair, tmp_path: Path) -> None:
    job = prepare(str(pair[0]), str(pair[0]), tmp_path / "art", _settings(), None)
    assert not doubtful([])
    assert compress(job).tensors == ()
