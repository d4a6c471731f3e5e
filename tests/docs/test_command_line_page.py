"""The variables that the page on the command line names are options of the commands that it says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from meswitch_cli.app import build_app, variable_prefix

PAGE = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text()
ROWS = re.findall(r"^\| `(MESWITCH_\w+)=[^`]*` \| (?:the flag )?`([^`]+)`", PAGE, re.M)


@pytest.mark.parametrize(("variable", "call"), ROWS, ids=[variable for variable, _ in ROWS])
def test_a_variable_stands_for_the_option(variable: str, call: str) -> None:
    *command, option = [word for word in shlex.split(call) if re.match(r"[a-z]|--", word) and "/" not in word]
    assert variable == f"{variable_prefix(*command)}_{option[2:].upper().replace('-', '_')}"
    shown = CliRunner().invoke(build_app(command), [*command, "--help"], env={"COLUMNS": "240", "NO_COLOR": "1"})
    assert shown.exit_code == 0 and re.search(rf"{option}\b", shown.output)
    assert f"{variable_prefix(*command)}_NAME" in shown.output


def test_the_page_names_some() -> None:
    assert len(ROWS) == 5
