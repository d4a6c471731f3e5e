"""The tools beside the tests, called as the pages say, with nothing on the path but what `make setup` put there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent
PAGES = {*(ROOT / "docs").rglob("*.md"), *TESTS.rglob("*.py"), *TESTS.rglob("*.md"), ROOT / "Makefile"}


def tool(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "tests", *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_every_tool_is_named_and_every_name_is_a_tool() -> None:
    listed = set(re.findall(r"^python tests (.+)$", tool().stdout, re.M))
    assert {"demo", "zoo", "bench compression", "bench trellis", "bench soak"} <= listed
    text = "\n".join(page.read_text() for page in PAGES - {Path(__file__)})
    named = set(re.findall(r"python tests ((?:bench )?[a-z_]+)", text)) - {"bench"}
    assert named - listed == set() and "bench server" in named
    assert not re.search(r"PYTHONPATH=tests|python -m (benchmarks|zoo|demo)\b", text)


@pytest.mark.parametrize("words", [("zoo",), ("bench", "interrupts")], ids=" ".join)
def test_a_tool_takes_its_arguments(words: tuple[str, ...]) -> None:
    shown = tool(*words, "--help")
    assert shown.returncode == 0 and "usage:" in shown.stdout, shown.stderr


def test_a_name_that_is_none_is_refused() -> None:
    refused = tool("bench", "nothing")
    assert refused.returncode == 2 and "no tool 'bench nothing'" in refused.stderr and refused.stdout == ""
    assert "python tests bench soak" in refused.stderr
