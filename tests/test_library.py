"""What a program calls gives what the commands give."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from command_line import meswitch
from transformers import AutoModelForCausalLM

import meswitch_cli
from meswitch_cli import Artifact, compress, restore
from meswitch_cli.errors import ArtifactError, UsageError
from zoo.tiny import Pair


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_compress_makes_what_the_command_makes(pair: Pair, tmp_path: Path) -> None:
    made = compress(pair[0], str(pair[1]), tmp_path / "library", bits=1, salient=4)
    command = meswitch(
        "compress", "--base", pair[0], "--expert", pair[1], "--out", tmp_path / "command", "--bits", 1, "--salient", 4
    )
    assert command.returncode == 0, command.stderr
    assert bytes_of(made.path) == bytes_of(tmp_path / "command")


def test_restore_takes_an_artifact_or_its_folder(pair: Pair, tmp_path: Path) -> None:
    made = compress(pair[0], pair[1], tmp_path / "art", bits=4, salient=4, calibration="none", steps="unbiased")
    restored = [restore(item, pair[0], tmp_path / name) for item, name in ((made, "a"), (str(made.path), "b"))]
    models = [AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in restored]
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())
    with pytest.raises(ArtifactError, match=r"there already|in use"):
        restore(made, pair[0], tmp_path / "a")


def test_a_setting_that_does_not_exist_is_named(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such setting: bit"):
        compress(pair[0], pair[1], tmp_path / "art", bit=1)
    assert not (tmp_path / "art").exists()


@pytest.mark.parametrize(
    "package",
    [
        "",
        "artifact",
        "calibration",
        "checkpoint",
        "compression",
        "delta",
        "engine",
        "evaluation",
        "load",
        "model",
        "router",
        "server",
    ],
)
def test_every_name_that_a_package_offers_is_there(package: str) -> None:
    module = importlib.import_module("meswitch_cli" + (f".{package}" if package else ""))
    assert module.__all__ == sorted(module.__all__, key=lambda name: (not name[0].isupper(), name))
    assert all(callable(getattr(module, name)) for name in module.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = module.nothing


def test_an_artifact_opens_by_the_name_of_its_folder(pair: Pair, tmp_path: Path) -> None:
    made = compress(pair[0], pair[1], tmp_path / "art", salient=4)
    assert Artifact.open(str(tmp_path / "art")).digest == made.digest
    assert meswitch_cli.__version__ in made.manifest.created_with
