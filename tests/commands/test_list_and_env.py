"""`list` and `env` as a user meets them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_line import Result, fails, in_process

from meswitch_cli import __version__
from zoo.adapter import make_adapter
from zoo.tiny import Pair


@pytest.fixture
def experts(pair: Pair, make_artifact: Any, tmp_path: Path) -> Path:
    """A folder with three good artifacts, one that lacks a file, one that is changed, one unfinished, and others."""
    folder = tmp_path / "experts"
    folder.mkdir()
    made = make_artifact(pair).path
    for name in ("good", "short", "changed"):
        shutil.copytree(made, folder / name)
    make_artifact(pair, out="experts/one-bit", bits=1)
    adapter = make_adapter(pair[0], tmp_path / "lora", rank=4)
    make_artifact((pair[0], adapter), out="experts/adapter")
    (folder / "short" / "tokenizer.json").unlink()
    shard = next((folder / "changed").glob("delta-*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x55")
    (folder / ".later.partial").mkdir()
    (folder / ".good.partial").mkdir()  # of an artifact that is being replaced
    shutil.copytree(pair[1], folder / "whole")
    return folder


def rows(done: Result) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads(done.stdout)}


def test_list(experts: Path) -> None:
    done = in_process("list", experts, "--json")
    found = rows(done)
    assert done.returncode == 1 and list(found) == ["later", "adapter", "changed", "good", "one-bit", "short"]
    assert found["good"]["problem"] is None and not found["good"]["verified"]
    assert (found["good"]["base"], found["good"]["expert"]) == ("base", "expert")
    assert found["good"]["linears"] == "2" and found["one-bit"]["linears"] == "1"
    assert found["adapter"]["linears"] == "rank 4"
    shards = sum(file.stat().st_size for file in (experts / "good").glob("delta-*"))
    assert found["good"]["bytes"] == shards and found["one-bit"]["bits_per_weight"] < found["good"]["bits_per_weight"]
    assert found["changed"]["problem"] is None  # its size is right
    assert found["short"]["problem"].endswith("tokenizer.json: missing")
    assert "not finished" in found["later"]["problem"] and "base" not in found["later"]
    shown = in_process("list", experts)
    assert shown.returncode == 1 and shown.stdout.count("all there") == 4 and shown.stdout.count("unusable") == 2
    assert "short: " in shown.stdout and "whole" not in shown.stdout


def test_list_verifies(experts: Path) -> None:
    found = rows(in_process("list", experts, "--verify", "--json"))
    assert [name for name, row in found.items() if row["verified"]] == ["adapter", "good", "one-bit"]
    assert "changed or damaged" in found["changed"]["problem"]
    alone = in_process("list", experts / "good", "--verify")
    assert alone.returncode == 0 and "verified" in alone.stdout


def test_list_of_nothing(tmp_path: Path) -> None:
    fails(in_process("list", tmp_path / "none"), 1, "no such folder")
    empty = in_process("list", tmp_path)
    assert empty.returncode == 0 and empty.stdout == "" and "no artifacts" in empty.stderr
    assert json.loads(in_process("list", tmp_path, "--json").stdout) == []


def test_env(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setenv("MESWITCH_SERVE_PORT", "8000")
    monkeypatch.setenv("MESWITCH_TEST_TOKEN", "swordfish")
    found = json.loads(in_process("env", "--json").stdout)
    assert found["versions"]["meswitch"] == __version__ and found["versions"]["torch"] == torch.__version__
    assert found["kernels"]["naive"] == "can run" and found["kernels"]["used on cpu"] in ("naive", "cpu", "triton")
    assert ("cuda" in found["devices"]) is not torch.cuda.is_available()
    assert found["variables"]["MESWITCH_SERVE_PORT"] == "8000"
    assert found["variables"]["MESWITCH_TEST_TOKEN"] == "(set)"
    shown = in_process("env").stdout
    assert f"meswitch           {__version__}" in shown and "swordfish" not in shown
    assert all(name in shown for section in found.values() for name in section)


def test_env_names_the_kernel_that_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from meswitch_kernels import dispatch

    monkeypatch.setenv("MESWITCH_KERNEL", "quick")
    dispatch.default_backend.cache_clear()
    try:
        assert "unknown backend 'quick'" in json.loads(in_process("env", "--json").stdout)["kernels"]["used on cpu"]
    finally:
        dispatch.default_backend.cache_clear()
