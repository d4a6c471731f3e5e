"""What a program calls gives what the commands give."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

import pytest
import torch
from command_line import meswitch
from transformers import AutoModelForCausalLM

import meswitch_cli
from meswitch_cli import Artifact, compress, load, restore
from meswitch_cli.errors import ArtifactError, UsageError
from zoo.tiny import Pair, make_pair


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


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_load_gives_what_restore_writes(pair: Pair, tmp_path: Path, dtype: torch.dtype | None) -> None:
    made = compress(pair[0], pair[1], tmp_path / "art", salient=4, rank=3)
    loaded = load(pair[0], str(made.path), dtype=dtype)
    restored = AutoModelForCausalLM.from_pretrained(restore(made, pair[0], tmp_path / "plain", dtype=dtype))
    assert loaded.dtype == restored.dtype == loaded.config.dtype and not loaded.training
    wanted = restored.state_dict()
    assert loaded.state_dict().keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in loaded.state_dict().items())
    ids = torch.arange(3, 20)[None]
    assert torch.equal(loaded(ids).logits, restored(ids).logits)
    assert loaded.generate(ids, max_new_tokens=4).shape[1] <= 21
    assert loaded.generation_config.eos_token_id == restored.generation_config.eos_token_id
    loaded.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in wanted.items())


def test_load_refuses_another_base_and_damage(pair: Pair, tmp_path: Path) -> None:
    made = compress(pair[0], pair[1], tmp_path / "art", salient=4)
    other, _ = make_pair(tmp_path / "other", seed=3)
    with pytest.raises(ArtifactError, match="wrong base"):
        load(other, made)
    shard = made.path / made.manifest.shards[0].name
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="bytes, the manifest says"):
        load(pair[0], made)


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
        "client",
        "compression",
        "delta",
        "engine",
        "evaluation",
        "hub",
        "library",
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
    modules = {found.name for found in pkgutil.iter_modules(module.__path__)}
    late = {name for name in module.__all__ if not callable(vars(module).get(name))}
    assert not modules & late  # the import of a module of that name would take the name's place


def test_an_artifact_opens_by_the_name_of_its_folder(pair: Pair, tmp_path: Path) -> None:
    made = compress(pair[0], pair[1], tmp_path / "art", salient=4)
    assert Artifact.open(str(tmp_path / "art")).digest == made.digest
    assert meswitch_cli.__version__ in made.manifest.created_with
