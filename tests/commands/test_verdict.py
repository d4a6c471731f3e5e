"""What `compress` says of an artifact's errors, and which command it names next."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from command_line import in_process, meswitch

from meswitch_cli.artifact.manifest import Manifest
from meswitch_cli.commands.next_steps import after_compress
from meswitch_cli.commands.verdict import MEASURED_KL, NORMAL_ERROR, verdict
from meswitch_cli.delta.codes import RATES
from zoo.adapter import make_adapter
from zoo.tiny import Pair

RESULTS = Path(__file__).parents[2] / "docs" / "results"


def with_errors(manifest: Manifest, error: float, **settings: Any) -> Manifest:
    tensors = [dataclasses.replace(item, weight_error=error) if item.bits else item for item in manifest.tensors]
    return dataclasses.replace(manifest, tensors=tuple(tensors), settings=dict(manifest.settings) | settings)


DEFAULT = {"steps": "output-unbiased", "salient": 8}


def test_an_ordinary_delta(make_artifact: Any, pair: Pair) -> None:
    manifest = make_artifact(pair, steps="output-unbiased", calibration="random").manifest
    (only,) = verdict(manifest)  # with 4 salient channels no KL was measured
    assert re.match(r"weight error [\d.]+ % of the delta: usual at 2 bits \(up to 24 %\)", only)
    usual, expected = verdict(with_errors(manifest, 0.179, **DEFAULT))
    assert usual.startswith("weight error 18 % of the delta: usual at 2 bits")
    assert "0.000029 to 0.03 % of the base's" in expected
    assert len(verdict(with_errors(manifest, 0.179, **DEFAULT | {"steps": "least-squares"}))) == 1
    (beyond,) = verdict(with_errors(manifest, 0.8, **DEFAULT))
    assert "weight error 80 % of the delta: more than usual at 2 bits (up to 24 %)" in beyond


@pytest.mark.parametrize(("bits", "rank", "words"), [(1, 16, "1 bit"), (0.25, 16, "0.25 bit"), (4, 0, "4 bits")])
def test_every_rate_has_its_own_measure(make_artifact: Any, pair: Pair, bits: float, rank: int, words: str) -> None:
    manifest = make_artifact(pair, bits=bits, rank=rank, embedding_bits=2).manifest
    told = verdict(with_errors(manifest, 0.01, **DEFAULT))
    assert f"usual at {words} (" in told[0] and (len(told) == 2) is (bits != 4)


@pytest.mark.parametrize(
    ("bits", "words"),
    [(16, "these are the adapter's own factors"), (8, "the adapter's factors lost digits; --factor-bits 16")],
)
def test_an_adapter(make_artifact: Any, pair: Pair, tmp_path: Path, bits: int, words: str) -> None:
    adapter = make_adapter(pair[0], tmp_path / "lora")
    (told,) = verdict(make_artifact((pair[0], adapter), factor_bits=bits).manifest)
    assert words in told and re.match(r"weight error 0\.0\d+ % of the update", told), told


def test_nothing_is_said_where_nothing_is_known(make_artifact: Any, pair: Pair) -> None:
    manifest = make_artifact(pair).manifest
    assert verdict(dataclasses.replace(manifest, tensors=())) == []
    assert verdict(with_errors(manifest, None)) == []  # type: ignore[arg-type]


def test_figures_are_those_of_the_pages() -> None:
    """The noise of a Laplacian, and KLs in percent of the base's, as the committed tables have them."""
    trellis = (RESULTS / "trellis.md").read_text()
    noises = trellis.split("Processor time")[0]
    rows = re.findall(r"^\| ([\d.]+) bit, (trellis|scalar) \| [\d.]+ \| [\d.]+ \| ([\d.]+) \|$", noises, re.M)
    noise = {(code, float(bits)): float(found) for bits, code, found in rows}
    assert {float(rate) for rate in RATES} == {bits for _, bits in noise}
    assert noise.keys() == NORMAL_ERROR.keys()
    assert all(noise[key] == pytest.approx(value, rel=0.02) for key, value in NORMAL_ERROR.items())
    fidelity = (RESULTS / "compression.md").read_text()
    sections = re.split(r"^## ", fidelity, flags=re.M)
    strong = "".join(section for section in sections if section.startswith(("strong: ", "coder: ")))
    (weaker,) = [section for section in sections if section.startswith("Weaker fine-tunes")]
    options = {
        ("scalar", 2, False): ["`--bits 2 --rank 0`"],
        ("scalar", 2, True): ["`--bits 2`", "`--bits 2 --factor-bits 4`"],
        ("scalar", 1, False): ["`--bits 1 --rank 0`"],
        ("scalar", 1, True): ["`--bits 1`"],
        ("trellis", 1, True): ["`--bits 1 --code trellis --embedding-bits 2`"],
        ("trellis", 0.25, True): ["`--bits 0.25`", "`--bits 0.25 --embedding-bits 2`"],
    }
    of_weaker = {
        ("scalar", 2, False): "2 bits, output-unbiased, 8 salient: `--bits 2`",
        ("scalar", 2, True): "2 bits, output-unbiased, 8 salient, 16 directions",
        ("scalar", 1, False): "1 bit, output-unbiased, 8 salient, channel scale",
        ("scalar", 1, True): "1 bit, output-unbiased, 8 salient, channel scale, 16 directions: `--bits 1`",
    }
    assert MEASURED_KL.keys() == options.keys()
    for key, (low, high) in MEASURED_KL.items():
        found = []
        for name in options[key]:
            row = rf"^\| {re.escape(name)} \| [\d.]+ \| \S+ \| ([\d.e-]+) \|"
            found += [float(kl) for kl in re.findall(row, strong, re.M)]
        for line in re.findall(rf"^\| {re.escape(of_weaker.get(key, '-'))} \|(.*)\|$", weaker, re.M):
            found += [float(kl) for kl in line.split("|")[1:]]
        assert found, key
        assert min(found) / 100 == pytest.approx(low, rel=0.2), (key, found)
        assert max(found) / 100 == pytest.approx(high, rel=0.2), (key, found)


def test_the_next_commands_can_be_typed(pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "experts" / "my artifact"
    made = in_process("compress", "--base", pair[0], "--expert", pair[1], "--out", out, "--salient", 4)
    assert made.returncode == 0, made.stderr
    assert made.stderr.startswith("reading both models' headers\n")
    assert "weight error" in made.stdout.splitlines()[-2] and made.stdout.splitlines()[-1] == str(out)
    evaluate, serve = map(shlex.split, made.stderr.split("next:\n")[1].splitlines())
    assert serve[:2] == ["meswitch", "serve"] and serve[-1] == f"expert={out}"
    assert evaluate[:2] == ["meswitch", "eval"]
    (tmp_path / "held-out.jsonl").write_text('{"prompt": "what is 1", "response": "it is 1"}\n' * 3)
    evaluate[evaluate.index("HELD-OUT.jsonl")] = str(tmp_path / "held-out.jsonl")
    done = meswitch(*evaluate[1:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "my artifact-eval" / "report.md").exists()
    assert [path.name for path in out.parent.iterdir()] == [out.name]  # all of which `serve --experts-dir` serves


def test_a_name_that_cannot_be_served_is_left_to_the_user() -> None:
    assert after_compress("base", "./my model[final]", Path("out"))[1][-1] == "NAME=out"
    assert after_compress("base", "owner/maths@main", Path("out"))[1][-1] == "maths=out"


def test_json_has_no_verdict(pair: Pair, tmp_path: Path) -> None:
    given = ("--base", pair[0], "--expert", pair[1], "--out", tmp_path / "a", "--salient", 4, "--json")
    made = in_process("compress", *given)
    assert made.returncode == 0 and made.stdout.count("\n") == 1 and "next:" not in made.stderr
