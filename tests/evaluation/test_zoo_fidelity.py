"""On the real family: the order of methods that the tables show, on few items."""

import json
import sys
from pathlib import Path

import pytest

import zoo
from meswitch_cli.app import main


@pytest.mark.zoo
def test_methods_are_in_the_order_that_the_tables_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    family = zoo.build(quick=True)
    held_out = tmp_path / "maths.jsonl"
    held_out.write_text("\n".join(json.dumps(item) for item in zoo.items("maths", "choice", quick=True)[:3]))
    words = ["--base", family.base, "--expert", family.experts["maths"], "--text", held_out, "--out", tmp_path / "out"]
    words += ["--baseline", "bitdelta", "--baseline", "meswitch:bits=2,salient=0", "--json"]
    monkeypatch.setattr(sys, "argv", ["meswitch", "eval", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    rows = {row["model"]: row for row in json.loads(capsys.readouterr().out)["fidelity"]}
    ours, rival = rows["meswitch:bits=2,salient=0"], rows["bitdelta"]
    assert ours["kl_share"] < 0.01 and ours["kl_mean"] < rival["kl_mean"] < ours["base_kl_mean"]
    assert ours["gap_recovered"] is None or ours["gap_recovered"] > 0.9
