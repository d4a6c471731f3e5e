"""A size in place of bits, from `compress` through `inspect` to `plan`."""

import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from meswitch_cli.app import build_app
from meswitch_cli.errors import UsageError
from zoo.tiny import Pair


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(build_app(list(arguments)), list(arguments))


def _compress(pair: Pair, out: Path, *more: str) -> Result:
    return _run("compress", "--base", str(pair[0]), "--expert", str(pair[1]), "--out", str(out), *more)


def test_a_size_is_kept_explained_and_planned_with(pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "artifact"
    made = _compress(pair, out, "--size", "60KB", "--json")
    assert made.exit_code == 0, made.output
    figures = json.loads(made.stdout)
    assert 58_800 <= figures["bytes"] <= 60_000
    assert figures["settings"]["size"] == 60_000

    told = _run("inspect", str(out))
    assert told.exit_code == 0
    expected = figures["settings"]["expected"]
    words = " ".join(told.stdout.split())
    assert f"within {expected['kl'] / expected['least_kl'] - 1:.1%} of the least that any choice" in words
    assert "expected KL" not in words  # it is 160 times what prompts show: docs/results/trellis.md
    assert "size 60000" in told.stdout

    planned = [
        _run(
            "plan", "--base", str(pair[0]), "--experts", "4", "--device-memory", "100MB", "--context", "64", "--json",
            *more,
        )
        for more in (("--artifact", str(out)), ("--bits", "4"), ("--bits", "1", "--salient", "0", "--rank", "0"))
    ]  # fmt: skip
    own, most, least = (json.loads(result.stdout)["slot_bytes"] for result in planned)
    assert least < own < most


def test_a_size_and_bits_exclude_each_other(pair: Pair, tmp_path: Path) -> None:
    for more in (("--size", "60KB", "--bits", "2"), ("--target-bits", "1", "--salient", "4")):
        result = _compress(pair, tmp_path / "artifact", *more)
        assert isinstance(result.exception, UsageError)
        assert f"{more[2]}: a size or target bits choose that" in str(result.exception)


@pytest.mark.parametrize("size", ["many", "12 parsecs"])
def test_a_size_that_is_none(pair: Pair, tmp_path: Path, size: str) -> None:
    result = _compress(pair, tmp_path / "artifact", "--size", size)
    assert isinstance(result.exception, UsageError)
