"""Options of `serve` from a file and from variables, and what a shell completes."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import ENVIRONMENT, fails, in_process

from meswitch_cli.app import variable_prefix, words_to_complete

YAML = """
base: ./base
experts:
  maths: ./maths-1bit
  code: ./code-1bit
router: ./router
gate: "off"
max-queue: 3
max_running: 5
prefix-sharing: false
log-prompts: true
cors-origin: [https://a.example, https://b.example]
slots: null
api-key-file: ./keys
"""
TOML = """
base = "./base"
router = "./router"
gate = "off"
max-queue = 3
max_running = 5
prefix-sharing = false
log-prompts = true
cors-origin = ["https://a.example", "https://b.example"]
api-key-file = "./keys"
[experts]
maths = "./maths-1bit"
code = "./code-1bit"
"""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `serve` was called with, in place of serving; filled by each call."""
    from meswitch_cli.commands import serve

    found: dict[str, Any] = {}

    @functools.wraps(serve.run)
    def record(**arguments: Any) -> None:
        found.clear()
        found.update(arguments)

    monkeypatch.setattr(serve, "run", record)
    return found


@pytest.mark.parametrize(("name", "text"), [("s.yaml", YAML), ("s.yml", YAML), ("s.toml", TOML)])
def test_a_file_gives_every_kind_of_option(name: str, text: str, asked: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    done = in_process("serve", "--config", tmp_path / name)
    assert done.returncode == 0, done.stderr
    assert asked["base"] == "./base" and asked["expert"] == ["maths=./maths-1bit", "code=./code-1bit"]
    assert (asked["router"], asked["gate"], asked["api_key_file"]) == (Path("router"), "off", Path("keys"))
    assert (asked["max_queue"], asked["max_running"], asked["max_n"], asked["slots"]) == (3, 5, 16, None)
    assert asked["prefix_sharing"] is False and asked["log_prompts"] is True
    assert asked["cors_origin"] == ["https://a.example", "https://b.example"]


def test_the_command_line_goes_before_variables_and_they_before_the_file(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "s.yaml").write_text(YAML)
    monkeypatch.setenv("MESWITCH_SERVE_CONFIG", str(tmp_path / "s.yaml"))
    monkeypatch.setenv("MESWITCH_SERVE_MAX_QUEUE", "7")
    monkeypatch.setenv("MESWITCH_SERVE_MAX_RUNNING", "8")
    monkeypatch.setenv("MESWITCH_SERVE_EXPERT", "logic=./logic maths=./other")
    assert in_process("serve", "--max-queue", 9, "--prefix-sharing").returncode == 0
    assert (asked["max_queue"], asked["max_running"], asked["gate"]) == (9, 8, "off")
    assert asked["prefix_sharing"] is True and asked["expert"] == ["logic=./logic", "maths=./other"]


@pytest.mark.parametrize("suffix", ["yaml", "toml"])
def test_the_page_shows_files_that_work(suffix: str, asked: dict[str, Any], tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "commands" / "serve.md").read_text()
    file = tmp_path / f"serve.{suffix}"
    file.write_text(page.split(f"```{suffix}\n")[1].split("```")[0])
    done = in_process("serve", "--config", file)
    assert done.returncode == 0, done.stderr
    assert asked["expert"][0] == "maths=./maths-1bit" and asked["max_queue"] == 64
    assert (asked["base"], asked["router"]) == ("./base", Path("router"))


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("s.yaml", "prot: 8000", "prot: no such option; is it port?"),
        ("s.yaml", "port: 99999", "port: Input should be less than or equal to 65535"),
        ("s.yaml", "port: 3.5", "port: Input should be a valid integer"),
        ("s.yaml", "gate: off", "gate: true and false are no value of it; put a word such as off into quotes"),
        ("s.yaml", "gate: loose", "gate: 'loose' is not one of 'strict', 'normal', 'off'"),
        ("s.yaml", "log-prompts: 1", "log-prompts: must be true or false, not 1"),
        ("s.yaml", "base: [a, b]", "base: must be a text, a number or a list of them, not list"),
        ("s.yaml", "max-queue: 1\nmax_queue: 2", "max_queue: given twice"),
        ("s.yaml", "config: other.yaml", "config: no such option"),
        ("s.yaml", "- port", "must hold options by name"),
        ("s.yaml", "a: 1\nport: [1", "line 2: not YAML"),
        ("s.yaml", "a: !!python/object/apply:os.system ['true']", "line 1: not YAML"),
        ("s.toml", "port 8", "not TOML"),
        ("s.ini", "port=8", "must end in .yaml, .yml or .toml"),
    ],
)
def test_a_file_that_cannot_be_used(name: str, text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    fails(in_process("serve", "--base", "./nowhere", "--config", tmp_path / name), 2, f"{tmp_path / name}: {words}")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    fails(in_process("serve", "--config", tmp_path / "none.yaml"), 2, "none.yaml: cannot be read")


def test_every_command_takes_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESWITCH_LIST_VERIFY", "perhaps")
    fails(in_process("list", tmp_path), 2, "--verify")
    assert variable_prefix("router", "add") == "MESWITCH_ROUTER_ADD"
    assert variable_prefix("train-router") == "MESWITCH_TRAIN_ROUTER"
    assert "MESWITCH_ROUTER_ADD_NAME" in in_process("router", "add", "--help").stdout


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("meswitch com", {"compress"}),
        ("meswitch router ", {"add", "remove", "eval"}),
        ("meswitch serve --max-", {"--max-queue", "--max-running", "--max-model-len", "--max-n", "--max-body"}),
        ("meswitch serve --gate ", {"strict", "normal", "off"}),
        ("meswitch compress --expert 'open --bit", set()),
    ],
)
def test_bash_completes(line: str, completed: set[str]) -> None:
    words = {"_MESWITCH_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
    command = "import sys; sys.argv = ['meswitch']; from meswitch_cli.app import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", command], env=ENVIRONMENT | words, capture_output=True, text=True, check=False
    )
    assert set(done.stdout.split()) == completed, done.stderr


def test_completion_is_offered_and_other_words_are_left_alone() -> None:
    script = "import sys; sys.argv = ['x', '--show-completion', 'bash']; from meswitch_cli.app import main; main()"
    named = ENVIRONMENT | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    shown = subprocess.run([sys.executable, "-c", script], env=named, capture_output=True, text=True, check=True)
    assert "complete -o default -F _meswitch_completion meswitch" in shown.stdout
    assert words_to_complete({"COMP_WORDS": "meswitch serve"}) == []
    assert words_to_complete({"_MESWITCH_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": "meswitch serve --"}) == [
        "serve",
        "--",
    ]
