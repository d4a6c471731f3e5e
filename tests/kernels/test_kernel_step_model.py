"""The model of a decode step: bytes and instructions over a card's rates, and what it says of the goals."""

from pathlib import Path

import pytest

pytest.importorskip("triton")
FOLDER = Path(__file__).parents[2] / "kernels" / "benchmarks"


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import machine_code
    import step_model

    return step_model, machine_code


def loop(machine_code, **counts):
    given = {"arch": 90, "dtype": "bf16", "bits": 1, "code": "scalar", "tile_tokens": 8, "weights": 1000}
    given |= {"instructions": 1000, "unpacking": 600, "tensor": 100, "shared_loads": 0, "shared_stores": 0}
    given |= {"copies": 0, "copy_bytes": 16, "registers": 200, "shared_cycles": 100, "spills": 0}
    return machine_code.Loop(**(given | counts))


def test_a_step_is_bound_by_bytes_or_by_what_unpacks(modules):
    step_model, machine_code = modules
    weights = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096) + 32000 * 4096
    assert step_model.weights() == weights
    card = "NVIDIA H100 80GB HBM3"
    found = step_model.step(card, loop(machine_code), 1, 16)
    cycles = 132 * 1.755e9
    assert found.base == pytest.approx(1e3 * 2 * weights / (0.85 * 3.35e12))
    assert found.by_instructions == pytest.approx(1e3 * 16 * weights / 32 / (0.7 * 4 * cycles))
    assert found.by_tensor_cores == pytest.approx(1e3 * 16 * weights / 32 * 0.1 * 6 / (4 * cycles))
    assert found.by_shared_memory == pytest.approx(1e3 * 16 * weights / 32 * 0.1 / cycles)
    assert found.floor == pytest.approx(0.85 * found.by_bytes) and found.gigabytes == pytest.approx(3.35 * found.floor)
    assert found.together == max(found.by_bytes, found.by_instructions)
    assert found.in_turn == found.base + max(found.by_bytes - found.base, found.by_instructions)
    few = step_model.step(card, loop(machine_code), 1, 1)
    assert few.in_turn == pytest.approx(few.by_bytes) and few.goal == 1.2 and few.verdict == "yes"


def test_goals_are_met_side_by_side_in_turn_or_not(modules):
    step_model, machine_code = modules
    card = "NVIDIA H100 80GB HBM3"
    verdicts = [
        step_model.step(card, loop(machine_code, instructions=count), 0.25, 16).verdict for count in (300, 900, 3000)
    ]
    assert verdicts == ["yes", "if they overlap", "**no**"]
    assert step_model.step(card, loop(machine_code), 1, 4).verdict == ""
    assert step_model.GOALS[0.25, 16] == 1.5 and step_model.GOALS[1, 16] == 2.5 and step_model.GOALS[2, 16] == 3.5


def test_what_shared_memory_takes(modules):
    _, machine_code = modules
    kinds = {"LDSM.16.M88.4": 4, "LDGSTS.E.BYPASS.128": 4, "LDGSTS.E.64": 2, "LDGSTS.E": 1, "STS.U16": 1, "LOP3.LUT": 0}
    assert {kind: machine_code.shared_cycles(kind) for kind in kinds} == kinds


def test_the_loop_that_unpacks_is_the_innermost_with_most_logic(modules):
    _, machine_code = modules
    code = ["MOV", "HMMA", "LOP3", "BRA 0x10", "HMMA", "LOP3", "LOP3", "BRA 0x40", "BRA 0x0", "EXIT"]
    lines = [(16 * place, f"{text}" if "BRA" not in text else f"@P0 {text}") for place, text in enumerate(code)]
    assert machine_code.unpacking_loop(lines) == ["HMMA", "LOP3", "LOP3", "@P0 BRA 0x40"]
    with pytest.raises(ValueError, match="no loop multiplies"):
        machine_code.unpacking_loop(lines[:1])
