"""The Python page's code, and the examples, run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import python
from hub.standin import StandIn

import meswitch_cli as meswitch
from zoo.tiny import Pair, make_pair

pytest_plugins = ["hub.conftest"]

DOCS = Path(__file__).parents[2] / "docs"
#: Names of the package that a page speaks of: `meswitch.load`, or `compress(` at the beginning of a call.
_CALL = re.compile(r"meswitch\.(\w+)|`(\w+)\(")


def run(code: str, *arguments: object, cwd: Path) -> str:
    done = python(code, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def models(tmp_path: Path) -> Pair:
    """`base` and `maths` in one folder, their delta large enough to matter."""
    base, expert = make_pair(tmp_path / "made", dtype=torch.float32, relative_delta=0.2)
    return base.rename(tmp_path / "base"), expert.rename(tmp_path / "maths")


def test_the_page_runs(models: Pair, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "python.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    out = run("\n".join(blocks) + "\nprint(type(model).__name__)", cwd=tmp_path)
    assert re.search(r"^http://127\.0\.0\.1:\d+$", out, re.MULTILINE)
    assert out.endswith("LlamaForCausalLM\n")


def test_the_page_names_every_call() -> None:
    page = (DOCS / "python.md").read_text()
    named = {first or second for first, second in _CALL.findall(page)}
    assert set(meswitch.__all__) - {"Artifact", "Completion"} <= named | {"Engine"}
    assert {first for first, _ in _CALL.findall(page) if first} <= set(meswitch.__all__)


def test_compress_and_load(models: Pair, tmp_path: Path) -> None:
    script = (DOCS / "examples" / "compress_and_load.py").read_text()
    out = run(script, *models, "maths-1bit", cwd=tmp_path)
    found = re.search(r"delta (\d\.\d+), base (\d\.\d+)", out)
    assert found and float(found[1]) < float(found[2])


def test_many_experts(models: Pair, tmp_path: Path) -> None:
    for name, bits in (("maths", 2), ("sums", 4)):
        meswitch.compress(*models, tmp_path / "experts" / name, bits=bits)
    experts = ["maths=./experts/maths", "sums=./experts/sums"]
    out = run((DOCS / "examples" / "many_experts.py").read_text(), "./base", *experts, cwd=tmp_path)
    assert {line.partition(":")[0] for line in out.splitlines() if ": '" in line or ': "' in line} >= {"base", "maths"}
    assert out.endswith("['maths', 'sums-again']\n")


def test_hub_and_server(hub: StandIn, models: Pair, tmp_path: Path) -> None:
    meswitch.compress(*models, tmp_path / "maths-1bit", bits=1)
    script = DOCS / "examples" / "hub_and_server.py"
    done = subprocess.run(  # its own process: what the environment says of the Hub is read by the import
        [sys.executable, script, "./base", "./maths-1bit", "ann/llama-maths-1bit"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1,localhost"},
    )
    assert done.returncode == 0, done.stderr
    out = done.stdout
    assert f"{hub.endpoint}/ann/llama-maths-1bit has" in out and "licence is unknown" in out
    assert out.splitlines()[-1].startswith("maths: ")
