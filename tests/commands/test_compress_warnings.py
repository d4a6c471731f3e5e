"""What `meswitch compress` says of checkpoints that are odd, and of a result that is worth nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from click.testing import Result
from typer.testing import CliRunner

from meswitch_cli.app import build_app
from meswitch_cli.compression.closeness import WeakDeltaError
from zoo.tiny import make_pair

Pair = tuple[Path, Path]


def _compress(base: Path, expert: Path, out: Path, *more: str) -> Result:
    arguments = ["compress", "--base", str(base), "--expert", str(expert), "--out", str(out), "--salient", "2", *more]
    return CliRunner().invoke(build_app(arguments), arguments)


@pytest.fixture
def expert(pair: Pair, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pair[1], tmp_path / "expert"))


def _without_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()


def _half_a_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def _stale_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "old.safetensors"}}))


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (_without_tokenizer, "its tokenizer cannot be loaded"),
        (_half_a_tokenizer, "its tokenizer cannot be loaded"),
        (_stale_index, "names old.safetensors"),
    ],
)
@pytest.mark.parametrize("as_json", [True, False])
def test_oddities_are_told_in_every_form_of_output(
    pair: Pair, expert: Path, tmp_path: Path, damage: Callable[[Path], None], word: str, as_json: bool
) -> None:
    damage(expert)
    result = _compress(pair[0], expert, tmp_path / "art", "--calibration", "none", *(["--json"] if as_json else []))
    assert result.exit_code == 0, result.exception
    assert f"warning: {expert}" in result.stderr and word in result.stderr
    if as_json:
        (warning,) = json.loads(result.stdout)["warnings"]
        assert word in warning


def test_a_tokenizer_longer_than_the_embedding_is_told(tmp_path: Path) -> None:
    base, expert = make_pair(tmp_path, vocab_size=256)
    result = _compress(base, expert, tmp_path / "art", "--calibration", "none")
    assert result.exit_code == 0 and "its embedding has 256 rows" in result.stderr


def test_an_ordinary_pair_has_no_warnings(pair: Pair, tmp_path: Path) -> None:
    result = _compress(*pair, tmp_path / "art", "--json")
    assert json.loads(result.stdout)["warnings"] == []
    assert result.stderr == "reading both models' headers\n"


def _sparse(base: Path, folder: Path) -> Path:
    shutil.copytree(base, folder)
    generator = torch.Generator().manual_seed(0)
    tensors = safetensors.torch.load_file(base / "model.safetensors")
    for name, weight in tensors.items():
        if "proj" in name:
            moved = torch.rand(weight.shape, generator=generator) < 0.02
            tensors[name] = (weight.float() * (1 + moved * torch.randn(weight.shape, generator=generator))).bfloat16()
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_worthless_delta_is_an_error_unless_it_is_wanted(tmp_path: Path) -> None:
    base, _ = make_pair(tmp_path, hidden_size=128, intermediate_size=256)
    expert = _sparse(base, tmp_path / "sparse")
    refused = _compress(base, expert, tmp_path / "art", "--json", "--bits", "2", "--rank", "0")
    assert isinstance(refused.exception, WeakDeltaError) and refused.exception.exit_code == 1
    assert refused.stdout == "" and not (tmp_path / "art").exists()
    kept: Any = _compress(base, expert, tmp_path / "art", "--json", "--bits", "2", "--rank", "0", "--keep-weak")
    assert kept.exit_code == 0 and "no nearer" in kept.stderr
    assert "With --bits 4" in json.loads(kept.stdout)["warnings"][0]
