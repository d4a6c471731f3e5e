"""What the command line says of itself: version, help of every command, values and flags by name."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import subprocess
import sys
from typing import get_args, get_type_hints

import pytest
from typer.testing import CliRunner

from meswitch_cli import __version__
from meswitch_cli.app import COMMANDS, PANELS, build_app

WIDE = {"COLUMNS": "240", "TERMINAL_WIDTH": "240", "NO_COLOR": "1"}


def said(*arguments: str) -> str:
    result = CliRunner().invoke(build_app(arguments), list(arguments), env=WIDE)
    assert result.exit_code == 0, result.output
    return result.output


def functions() -> dict[tuple[str, ...], object]:
    """Every command's function, by the words that name it."""
    found: dict[tuple[str, ...], object] = {}
    for name in COMMANDS:
        module = importlib.import_module(f"meswitch_cli.commands.{name.replace('-', '_')}")
        if not hasattr(module, "app"):
            found[name,] = module.run
            continue
        for info in module.app.registered_commands:
            found[name, info.name or info.callback.__name__] = info.callback
    return found


FUNCTIONS = functions()


@pytest.mark.parametrize("arguments", [("--version",), ("--version", "compress"), ("--version", "nonsense")])
def test_version(arguments: tuple[str, ...]) -> None:
    assert said(*arguments) == f"meswitch {__version__}\n"


@pytest.mark.parametrize("command", FUNCTIONS, ids=" ".join)
def test_help_shows_every_option_by_its_value(command: tuple[str, ...]) -> None:
    shown = said(*command, "--help")
    assert said(*command, "-h") == shown
    assert not re.search(r"<bool|list\[|\\\[", shown)
    assert not re.search(r"<\w", shown)
    rows = {match[1]: match[2] for match in re.finditer(r"│ +(?:\* +)?(--[\w-]+)(?: +-\w)? +(.*)", shown)}
    for name, parameter in inspect.signature(FUNCTIONS[command]).parameters.items():  # type: ignore[arg-type]
        option = re.search(r"['\"](--[\w-]+)", str(parameter.annotation))
        flag = option[1] if option else "--" + name.replace("_", "-")
        if "Argument" in str(parameter.annotation):
            assert name.upper() in shown
        elif "bool" in str(parameter.annotation):
            assert not re.match(r"TEXT|PATH|N ", rows[flag])
        else:
            assert re.match(r"TEXT|PATH|N |[\w.-]+ ?\|", rows[flag]), rows[flag]
    assert not re.match(r"TEXT", rows["--help"])


@pytest.mark.parametrize("command", FUNCTIONS, ids=" ".join)
def test_help_says_a_sentence_once(command: tuple[str, ...]) -> None:
    head = said(*command, "--help").split("╭")[0]
    sentences = [sentence for sentence in re.split(r"(?<=[.:;]) +", " ".join(head.split())) if len(sentence) > 20]
    beginnings = [sentence[:20] for sentence in sentences]
    assert len(beginnings) == len(set(beginnings)), sentences


def test_brackets_in_help_are_shown() -> None:
    assert "meswitch[vllm]" in said("serve", "--help")
    assert "[LABEL=]FILE" in said("eval", "--help")


def test_help_of_the_whole_and_of_a_group() -> None:
    assert said("--help") == said("-h")
    for name, line in COMMANDS.items():
        assert re.search(rf"{name} +{re.escape(line)}", said("--help"))
    assert all(word in said("router", "-h") for word in ("add", "remove", "eval"))


def test_an_unknown_option_is_a_wrong_call() -> None:
    result = CliRunner().invoke(build_app(["plan"]), ["plan", "--nonsense[/]"], env=WIDE)
    assert result.exit_code == 2 and "--nonsense[/]" in result.output


@pytest.mark.parametrize("name", COMMANDS)
def test_panels_hold_options_that_there_are(name: str) -> None:
    module = importlib.import_module(f"meswitch_cli.commands.{name.replace('-', '_')}")
    panels = getattr(module, "PANELS", {})
    placed = [option for options in panels.values() for option in options]
    assert len(placed) == len(set(placed))
    if not panels:
        return
    there = inspect.signature(module.run).parameters
    assert set(placed) <= set(there)
    shown = said(name, "--help")
    for panel, options in panels.items():
        rows = shown.split(f"─ {panel} ─")[1].split("╰")[0]
        assert re.findall(r"│ +(?:\* +)?--([\w-]+)", rows) == [
            option.removeprefix("as_").replace("_", "-") for option in there if option in options
        ]


def test_no_panel_is_a_heap() -> None:
    """Serve had 27 options in one."""
    for command in FUNCTIONS:
        for rows in said(*command, "--help").split("╭─")[1:]:
            assert len(re.findall(r"^│ +(?:\* +)?--", rows, re.M)) <= 12, (command, rows)


def test_narrow_help_breaks_no_choice_within_a_word() -> None:
    narrow = os.environ | {"COLUMNS": "80", "TERMINAL_WIDTH": "80", "NO_COLOR": "1"}  # read once, as it is imported
    command = [sys.executable, "-m", "meswitch_cli", "compress", "--help"]
    shown = subprocess.run(command, env=narrow, capture_output=True, text=True, check=True).stdout
    column = " ".join(line[26:51] for line in shown.splitlines())
    for choice in get_args(get_args(get_type_hints(FUNCTIONS["compress",], include_extras=True)["steps"])[0]):
        for word in get_args(choice):
            assert f" {word} " in f"{column} ", word


def test_every_command_stands_in_a_panel_of_its_kind() -> None:
    shown = said("--help")
    panel, found = "", {}
    for line in shown.splitlines():
        if line.startswith("╭"):
            panel = line.strip("╭─╮ ")
        elif match := re.match(r"│ ([a-z][a-z-]*) ", line):
            found[match[1]] = panel
    assert list(found) == list(COMMANDS)
    assert [found[first] for first in PANELS] == list(PANELS.values())
    assert found["list"] == found["compress"] and found["route"] == found["router"] and found["chat"] == found["serve"]
