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


def test_candidates_change_one_or_two_members_of_the_default(tune):
    default = default_settings(4096, 4096, 16, Card("card", 132, True))
    found = tune.candidates(default)
    assert found[0] == default and len(set(found)) == len(found) > 20
    usual = dataclasses.asdict(default)
    changed = [{n for n, v in dataclasses.asdict(item).items() if v != usual[n]} for item in found[1:]]
    assert {len(names) for names in changed} == {1, 2}
    assert set().union(*changed) == tune.GRID.keys() <= usual.keys()


def test_entries_of_a_card_join_what_is_there(tune, tmp_path):
    file = tmp_path / "tuning.json"
    tune.write_tuning(file, "one", merge_tokens=256)
    packaged = json.loads((FOLDER.parent / "meswitch_kernels" / "tuning.json").read_text())
    first = json.loads(file.read_text())
    assert first["format"] == packaged["format"] and first["merge_tokens"]["one"] == 256
    tune.write_tuning(file, "one", cards={"a": {"block_out": 64}})
    tune.write_tuning(file, "two", cards={"a": {"block_out": 32}})
    tune.write_tuning(file, "one", cards={"b": {"block_out": 128}})
    content = json.loads(file.read_text())
    assert content["cards"]["one"] == {"a": {"block_out": 64}, "b": {"block_out": 128}}
    assert content["cards"]["two"] == {"a": {"block_out": 32}} and content["merge_tokens"]["one"] == 256


LAYER_GB, HEAD_GB, HOST_MS, ATTENTION_MS = 0.44, 2 * 4096 * 32000 / 1e9, 0.7, 0.05
DELTA_GB, DELTA_HEAD_GB = {2: 0.054, 1: 0.03, 0.25: 0.012}, 0.035
BASE_RATE, EXPERT_RATE, LAYER_MS = 2.6e12, {2: 2.0e12, 1: 1.5e12, 0.25: 0.6e12}, 0.02


def step_ms(layers, bits, experts, layer_ms):
    base = LAYER_GB * layers + HEAD_GB
    delta = experts * (DELTA_GB[bits] * layers + DELTA_HEAD_GB)
    return 1e12 * base / BASE_RATE + 1e12 * delta / EXPERT_RATE[bits] + layers * layer_ms


def proof_run():
    """Results of a card that takes exactly what the model of constants says."""
    decoder, decode, profile = [], [], []
    for bits in (2, 1, 0.25):
        for experts, tokens in ((1, 1), (1, 16), (16, 16)):
            row = {"figure": "decoder", "layers": 32, "bits": bits, "slots": 16, "experts": experts, "tokens": tokens}
            row |= {"ms": step_ms(32, bits, experts, LAYER_MS), "base_ms": 1e12 * (LAYER_GB * 32 + HEAD_GB) / BASE_RATE}
            row |= {"base_gb": LAYER_GB * 32 + HEAD_GB, "delta_head_gb": experts * DELTA_HEAD_GB}
            decoder.append(row | {"delta_gb": experts * (DELTA_GB[bits] * 32 + DELTA_HEAD_GB)})
        batch = {"bits": str(bits), "experts": 16, "requests": 16}
        device = step_ms(8, bits, 16, LAYER_MS + ATTENTION_MS)
        decode.append({"figure": "decode", "what": "experts", "layers": 8, "step_ms_p50": device + HOST_MS, **batch})
        profile.append({"figure": "profile", "device_ms_per_step": device, **batch})
    others = [
        {"figure": "card", "copy_gb_per_s": 2900.0},
        {"figure": "prefill", "experts": 1, "layers": 8, "prompt_tokens_per_second": 1000.0},
        {"figure": "switch", "gb_per_second": 40.0},
    ]
    parts = {"all": {"figures": [*decoder, *decode, *profile, *others]}}
    return {"commit": "abc", "device": "card", "tiny": False, "parts": parts}


def test_constants_are_those_of_the_run(tune, tmp_path, capsys, monkeypatch):
    import card_constants

    whole = proof_run()
    rows = whole["parts"]["all"]["figures"]
    cut = {
        name: [row for row in rows if (row["figure"] == "switch") == (name == "switch")] for name in ("all", "switch")
    }
    files = []
    for name, figures in cut.items():  # two runs, one part each
        files.append(str(tmp_path / f"{name}.json"))
        Path(files[-1]).write_text(json.dumps(whole | {"parts": {name: {"figures": figures}}}))
    out = tmp_path / "tuning.json"
    monkeypatch.setattr(sys, "argv", ["card_constants", *files, "--out", str(out)])
    assert card_constants.main() == 0
    found = json.loads(out.read_text())["constants"]["card"]
    assert found["commit"] == "abc" and found["copy"] == 2.9e12 and found["load"] == 40e9
    assert found["base"] == pytest.approx(BASE_RATE)
    assert found["experts"] == pytest.approx({str(bits): rate for bits, rate in EXPERT_RATE.items()})
    assert found["layer_seconds"] == pytest.approx((LAYER_MS + ATTENTION_MS) / 1e3)
    assert found["step_seconds"] == pytest.approx(HOST_MS / 1e3)
    assert found["prompt_operations"] == pytest.approx(1000 * (LAYER_GB * 8 + HEAD_GB) * 1e9)
    reckoned = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| experts")]
    assert len(reckoned) == 3 and all("0% |" in line for line in reckoned)


def test_a_run_without_a_card_gives_no_constants(tune, tmp_path, monkeypatch):
    import card_constants

    (tmp_path / "results.json").write_text(json.dumps(proof_run() | {"tiny": True}))
    out = tmp_path / "tuning.json"
    monkeypatch.setattr(sys, "argv", ["card_constants", str(tmp_path / "results.json"), "--out", str(out)])
    assert card_constants.main() == 1 and not out.exists()
    broken = proof_run()
    rows = broken["parts"]["all"]["figures"]
    broken["parts"]["all"]["figures"] = [row for row in rows if row["figure"] != "prefill"]
    (tmp_path / "results.json").write_text(json.dumps(broken))
    with pytest.raises(SystemExit, match="'prefill'"):
        card_constants.main()
