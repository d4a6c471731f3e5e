"""The README's commands, typed as a reader would, on tiny models."""

import json
import os
import re
import shlex
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import meswitch, python
from patience import PATIENCE, until

from zoo.tiny import Pair, make_pair

README = (Path(__file__).parents[2] / "README.md").read_text()


def commands(section: str) -> list[list[str]]:
    """The `meswitch` and `curl` commands of a section, continued lines joined."""
    text = README.split(f"## {section}\n")[1].split("\n## ")[0]
    blocks = "\n".join(re.findall(r"```\n(.*?)```", text, flags=re.DOTALL)).replace("\\\n", " ")
    return [shlex.split(line) for line in blocks.splitlines() if line.startswith(("meswitch ", "curl "))]


def run(command: list[str], folder: Path) -> None:
    done = meswitch(*command[1:], cwd=folder)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"


def test_use(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "base").symlink_to(pair[0])
    (tmp_path / "expert").symlink_to(pair[1])
    lines = commands("Use")
    assert [line[1] for line in lines] == ["compress", "inspect", "verify", "restore"]
    for line in lines:
        run(line, tmp_path)
    assert (tmp_path / "restored" / "model.safetensors").exists()


def test_from_python(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "base").symlink_to(pair[0])
    (tmp_path / "expert").symlink_to(pair[1])
    code = README.split("## From Python\n")[1].split("```python\n")[1].split("```")[0]
    done = python(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\d+\.\d MB\n", done.stdout)
    assert (tmp_path / "restored-1bit" / "model.safetensors").exists()


def test_first_screen_from_python(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "base").symlink_to(pair[0])
    (tmp_path / "maths").symlink_to(pair[1])
    code = README.split("```python\n")[1].split("```")[0]
    short = code.replace('expert="maths"', 'expert="maths", max_tokens=2')
    assert short != code and len(code.strip().splitlines()) <= 6
    done = python(short, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.endswith("\n"), done.stderr


@pytest.fixture
def family(tmp_path: Path) -> Path:
    """A folder with a base, two fine-tunes of it, and prompts of their fields."""
    for index, name in enumerate(("maths", "code")):
        base, expert = make_pair(tmp_path / name / "made", dtype=torch.float32, relative_delta=0.2 + 0.1 * index)
        base.rename(tmp_path / name / "base")
        expert.rename(tmp_path / f"{name}-expert")
    (tmp_path / "maths" / "base").rename(tmp_path / "base")
    for name in ("maths", "code"):
        for left in sorted((tmp_path / name).rglob("*"), reverse=True):
            left.rmdir() if left.is_dir() else left.unlink()
        (tmp_path / name).rmdir()
        (tmp_path / f"{name}-expert").rename(tmp_path / name)
    prompts = {
        "maths": [f"Tom has {n} apples and buys {97 - n} more. How many are there?" for n in range(60)],
        "code": [f"def f{n}(x): return x[{n}:] # write the loop" for n in range(60)],
    }
    for name, lines in prompts.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"prompt": line}) for line in lines))
    held_out = [json.dumps({"prompt": f"what is {n}", "response": f"it is {n}, of course"}) for n in range(12)]
    (tmp_path / "held-out.jsonl").write_text("\n".join(held_out))
    return tmp_path


def test_serve_and_evaluate(family: Path) -> None:
    *before, serve, curl, chat = commands("Serve")
    assert [line[1] for line in before] == ["compress", "compress", "train-router"]
    for line in before:
        run(line, family)
    answer = _answer(family, serve, curl)
    assert answer["model"] == "maths"  # what the README asks, and whose prompts are like it
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["usage"]["completion_tokens"] > 0
    assert chat[:2] == ["meswitch", "chat"]
    (evaluate,) = commands("Evaluate")
    run(evaluate, family)
    report = json.loads((family / "report" / "report.json").read_text())
    assert any(row["expert"] == "maths" for row in report["fidelity"])


def _answer(folder: Path, serve: list[str], curl: list[str]) -> dict[str, Any]:
    """Start the server on a free port and send what the curl command would, with a few tokens to answer in."""
    log = folder / "serve.log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "meswitch_cli", *serve[1:], "--port", "0"],
            cwd=folder,
            stderr=stderr,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    try:
        address = _address(log, process)
        assert curl[1] == "http://127.0.0.1:8000/v1/chat/completions" and curl[2] == "-H" and curl[4] == "-d"
        header, _, value = curl[3].partition(": ")
        body = json.dumps(json.loads(curl[5]) | {"max_tokens": 4}).encode()
        request = urllib.request.Request(curl[1].replace("http://127.0.0.1:8000", address), body, {header: value})
        with urllib.request.urlopen(request, timeout=PATIENCE) as response:
            assert response.headers["x-meswitch-expert"]
            found: dict[str, Any] = json.load(response)
            return found
    finally:
        process.terminate()
        process.wait(PATIENCE)


def _address(log: Path, process: subprocess.Popen[bytes]) -> str:
    """Where it answers: it says so once it listens."""
    until(lambda: "\npage " in log.read_text() or process.poll() is not None)
    assert process.poll() is None, log.read_text()
    return str(re.findall(r"^page +(\S+?)/?$", log.read_text(), re.MULTILINE)[0])
