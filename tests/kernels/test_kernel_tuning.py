"""What `kernels/benchmarks/tune.py` tries and writes; what it times needs a card."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest

from meswitch_kernels.tuning import Card, default_settings

FOLDER = Path(__file__).parents[2] / "kernels" / "benchmarks"


@pytest.fixture
def tune(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("tune", FOLDER / "tune.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "tune", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kernel", ["decode", "prefill"])
def test_candidates_change_one_or_two_members_of_the_default(tune, kernel):
    default = default_settings(kernel, 4096, 4096, 16, Card("card", 132, True))
    found = tune.candidates(kernel, default)
    assert found[0] == default and len(set(found)) == len(found) > 20
    usual = dataclasses.asdict(default)
    changed = [{n for n, v in dataclasses.asdict(item).items() if v != usual[n]} for item in found[1:]]
    assert {len(names) for names in changed} == {1, 2}
    assert set().union(*changed) == tune.GRID[kernel].keys() & usual.keys()


def test_entries_of_a_card_join_what_is_there(tune, tmp_path):
    file = tmp_path / "tuning.json"
    tune.written(file, "one", merge_tokens=256)
    packaged = json.loads((FOLDER.parent / "meswitch_kernels" / "tuning.json").read_text())
    first = json.loads(file.read_text())
    assert first["format"] == packaged["format"] and first["merge_tokens"]["one"] == 256
    tune.written(file, "one", cards={"a": {"block_out": 64}})
    tune.written(file, "two", cards={"a": {"block_out": 32}})
    tune.written(file, "one", cards={"b": {"block_out": 128}})
    content = json.loads(file.read_text())
    assert content["cards"]["one"] == {"a": {"block_out": 64}, "b": {"block_out": 128}}
    assert content["cards"]["two"] == {"a": {"block_out": 32}} and content["merge_tokens"]["one"] == 256
