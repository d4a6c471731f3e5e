"""Paths as users write them, wherever a command takes one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from meswitch_cli.app import main
from meswitch_cli.checkpoint.source import resolve
from meswitch_cli.commands.train_router import pairs
from meswitch_cli.errors import CheckpointError, UsageError
from meswitch_cli.paths import user_path
from meswitch_cli.server.experts import named_experts

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """A function that runs a command in this process: exit status, stdout, stderr."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["meswitch", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def test_home_after_an_equals_sign(home: Path) -> None:
    assert user_path("~/a") == home / "a" and user_path("a/~") == Path("a/~")
    assert named_experts(["maths=~/a", "code=./~"])[0] == {"maths": home / "a", "code": Path("~")}
    assert pairs(["maths=~/a"], "--expert") == {"maths": home / "a"}
    with pytest.raises(UsageError, match="nobody-of-this-name"):
        user_path("~nobody-of-this-name/a")
    with pytest.raises(UsageError, match="nobody-of-this-name"):
        resolve("~nobody-of-this-name/a")


def test_options_of_every_kind(home: Path, pair: tuple[Path, Path], run: Run) -> None:
    (home / "base").symlink_to(pair[0])
    (home / "expert").symlink_to(pair[1])
    (home / "text.jsonl").write_text(json.dumps({"prompt": "what is two", "response": "it is two"}))
    status, out, err = run(
        "compress", "--base=~/base", "--expert=~/expert", "--out=~/art", "--salient=4", "--calibration=~/text.jsonl",
        "--sequence-length=8", "--samples=1",
    )  # fmt: skip
    assert status == 0, err
    assert (home / "art" / "meswitch.json").is_file() and str(home / "art") in out
    assert run("inspect", "~/art", "--plot=~/art.svg")[0] == 0 and (home / "art.svg").is_file()
    assert run("verify", "~/art", "--base=~/base")[0] == 0
    assert run("restore", "~/art", "--base=~/base", "--out=~/back")[0] == 0 and (home / "back").is_dir()
    status, _, err = run("inspect", "~nobody-of-this-name/art")
    assert status == 2 and "nobody-of-this-name" in err and "Traceback" not in err


def test_a_folder_whose_name_is_not_utf8(tmp_path: Path, pair: tuple[Path, Path], run: Run) -> None:
    odd = tmp_path / "exp\udcff"
    odd.symlink_to(pair[1])
    (tmp_path / "deep\udcfe").mkdir()
    below = tmp_path / "deep\udcfe" / "expert"
    below.symlink_to(pair[1])
    for folder in (odd, below):
        with pytest.raises(CheckpointError, match="not a UTF-8 path"):
            resolve(str(folder))
        status, out, err = run("compress", "--base", pair[0], "--expert", folder, "--out", tmp_path / "a")
        assert status == 1 and "not a UTF-8 path" in err and "Traceback" not in err and out == ""
    assert not (tmp_path / "a").exists()
    status, out, err = run(
        "compress", "--base", pair[0], "--expert", pair[1], "--out", tmp_path / "o\udcff", "--salient=4"
    )
    assert status == 0, err
    assert out.strip().endswith("o\\udcff") and (tmp_path / "o\udcff" / "meswitch.json").is_file()


@pytest.mark.parametrize("name", ["maths\u3000v2", "ma\u00adths", "a\u200db", "tab\tname", "line\nname", "\u202ename"])
def test_a_name_that_does_not_print_is_refused_before_the_work(
    tmp_path: Path, pair: tuple[Path, Path], run: Run, name: str
) -> None:
    odd = tmp_path / name
    odd.mkdir()
    for file in pair[1].iterdir():
        (odd / file.name).symlink_to(file)
    for base, expert in ((pair[0], odd), (odd, pair[1])):
        status, out, err = run("compress", "--base", base, "--expert", expert, "--out", tmp_path / "a", "--salient=4")
        assert status == 1 and "do not print (U+" in err and "rename the folder" in err and out == ""
    assert not (tmp_path / "a").exists() and not (tmp_path / ".a.partial").exists()


@pytest.mark.parametrize("name", ["naïve 模型", "a b", "数学\u00b7v2", "🙂", "x" * 200])
def test_a_name_that_prints_is_taken(tmp_path: Path, pair: tuple[Path, Path], run: Run, name: str) -> None:
    odd = tmp_path / name
    odd.mkdir()
    for file in pair[1].iterdir():
        (odd / file.name).symlink_to(file)
    assert run("compress", "--base", pair[0], "--expert", odd, "--out", tmp_path / "a", "--salient=4")[0] == 0
    assert run("verify", tmp_path / "a")[0] == 0
