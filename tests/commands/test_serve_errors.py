"""Mistakes in what `serve` and `chat` are given, told before the base's weights are read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_line import fails, in_process

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.errors import MeswitchError
from meswitch_cli.router.store.manifest import MANIFEST_FILE as ROUTER_FILE
from zoo.tiny import Pair, make_pair


@pytest.fixture
def base(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base whose loading would fail the test."""
    monkeypatch.setattr("meswitch_cli.server.logs.configure_logging", lambda *given: None)  # it lasts
    for place in ("transformers_engine.load_base", "transformers_engine.why_one_by_one"):
        monkeypatch.setattr(f"meswitch_cli.engine.{place}", lambda *given: pytest.fail("the base was loaded"))
    return pair[0]


def odd_folders(folder: Path, pair: Pair) -> dict[str, tuple[Path, str]]:
    """Folders that are no artifacts, and what must be said of each."""
    for name in ("lora", "gguf", "router", "several/one", "several/two", ".half.partial", "empty"):
        (folder / name).mkdir(parents=True)
    (folder / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "lora" / "adapter_model.safetensors").write_bytes(b"")
    (folder / "gguf" / "model.Q4_K_M.gguf").write_bytes(b"GGUF")
    (folder / "alone.gguf").write_bytes(b"GGUF")
    (folder / "router" / ROUTER_FILE).write_text("{}")
    for name in ("one", "two"):
        (folder / "several" / name / "meswitch.json").write_text("{}")
    compress = "meswitch compress --base BASE --expert"
    return {
        "missing": (folder / "missing", "there is no such folder"),
        "whole": (pair[1], f"a whole checkpoint; compress it: {compress} {pair[1]}"),
        "lora": (folder / "lora", f"an adapter, such as a LoRA; compress it: {compress} {folder / 'lora'}"),
        "gguf folder": (folder / "gguf", "GGUF, which meswitch does not read"),
        "gguf file": (folder / "alone.gguf", "GGUF, which meswitch does not read"),
        "file": (pair[1] / "config.json", "a file; give the folder"),
        "router": (folder / "router", "a router; give it as --router"),
        "several": (folder / "several", "a folder of artifacts (one, two); give one of them"),
        "unfinished": (folder / "half", "its compression is not finished"),
        "empty": (folder / "empty", "it has no meswitch.json"),
    }


KINDS = ("missing", "whole", "lora", "gguf folder", "gguf file", "file", "router", "several", "unfinished", "empty")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_artifact_is_called_by_its_name(kind: str, pair: Pair, base: Path, tmp_path: Path) -> None:
    path, words = odd_folders(tmp_path, pair)[kind]
    for command in (
        ("serve", "--base", base, "--port", 0, "--expert", f"odd={path}"),
        ("chat", "--base", base, "--expert", f"odd={path}"),
    ):
        ended = in_process(*command)
        fails(ended, 1, f"--expert odd: {path}: not an artifact: {words}")
        assert "loading" not in ended.stderr
    fails(in_process("verify", path), 1, f"not an artifact: {words}")


def test_gguf_in_a_models_place(pair: Pair, base: Path, tmp_path: Path) -> None:
    """Without a config.json, as such folders are."""
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model.Q4_K_M.gguf").write_bytes(b"GGUF")
    for command in (
        ("serve", "--base", tmp_path / "gguf", "--port", 0),
        ("compress", "--base", base, "--expert", tmp_path / "gguf", "--out", tmp_path / "out"),
        ("inspect", "--base", tmp_path / "gguf", "--expert", pair[1]),
    ):
        fails(in_process(*command), 1, f"{tmp_path / 'gguf'}: weights only as GGUF; give the 16-bit safetensors")


def test_an_expert_of_a_base_of_another_shape(pair: Pair, base: Path, make_artifact: Any, tmp_path: Path) -> None:
    other, expert = make_pair(tmp_path, hidden_size=64)
    artifact: Artifact = make_artifact((other, expert))
    ended = in_process("serve", "--base", base, "--port", 0, "--expert", f"odd={artifact.path}")
    fails(ended, 1, "--expert odd:", "wrong base: the artifact was made against base")
    assert "loading" not in ended.stderr


def test_a_folder_without_any_artifact_ends_before_loading(base: Path, pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "experts").mkdir()
    shutil.copytree(pair[1], tmp_path / "experts" / "whole")
    ended = in_process("serve", "--base", base, "--port", 0, "--experts-dir", tmp_path / "experts")
    fails(ended, 1, "no expert can be served", "a whole checkpoint")


def test_a_router_of_other_experts(base: Path, pair: Pair, make_artifact: Any, tmp_path: Path) -> None:
    artifact = make_artifact(pair)
    data = tmp_path / "data.jsonl"
    lines = [{"prompt": f"{name} {n} {n * n}", "domain": name} for name in ("maths", "code") for n in range(25)]
    data.write_text("\n".join(json.dumps(line) for line in lines))
    made = in_process("train-router", "--backend", "tfidf", "--data", data, "--out", tmp_path / "router")
    assert made.returncode == 0, made.stderr
    given = ("serve", "--base", base, "--port", 0, "--expert", f"maths={artifact.path}")
    ended = in_process(*given, "--router", tmp_path / "router")
    fails(ended, 1, "the router can choose 'code', which this server does not have (it has 'maths')")
    assert "loading" not in ended.stderr
    ended = in_process(*given, "--router", artifact.path)
    fails(ended, 1, "not a router")
    assert "loading" not in ended.stderr


def test_an_empty_folder_of_experts_is_said_to_be_one(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_given: object) -> object:
        raise MeswitchError("the base was loaded")

    monkeypatch.setattr("meswitch_cli.server.logs.configure_logging", lambda *given: None)
    monkeypatch.setattr("meswitch_cli.engine.transformers_engine.why_one_by_one", load)
    ended = in_process("serve", "--base", pair[0], "--port", 0, "--experts-dir", tmp_path)
    fails(ended, 1, f"warning: no artifact in {tmp_path}: the base alone is served", "the base was loaded")
