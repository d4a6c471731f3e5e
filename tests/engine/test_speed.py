"""`meswitch plan --card`: floors from bytes alone, expectations from measured constants alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine.test_memory import MISTRAL_7B, plan_of
from typer.testing import CliRunner

from meswitch_cli.app import build_app
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.compression.settings import CompressionSettings
from meswitch_cli.engine import speed
from meswitch_cli.engine.memory import MemoryPlan, plan_memory
from meswitch_cli.engine.speed import DecodeBatch, KnownCard, find_card, load_seconds, prompt_rates, step_time
from meswitch_cli.errors import UsageError
from meswitch_kernels.cards import DATA_SHEETS, CardConstants, DataSheet, card_constants, measured_cards
from zoo.tiny import make_pair

PLAN = MemoryPlan(
    device_nbytes=10**6,
    base_nbytes=1200,
    slot_nbytes=130,
    shared_nbytes=0,
    slots=4,
    experts=4,
    context=10,
    token_nbytes=3,
    layers=2,
    multiplied=500,
    base_read_nbytes=1000,
    slot_read_nbytes=100,
)
CONSTANTS = CardConstants(
    commit="abc",
    copy=90.0,
    base=80.0,
    experts={"2": 50.0},
    layer_seconds=0.5,
    step_seconds=0.25,
    prompt_operations=5000.0,
    load=26.0,
)


def test_floor_is_bytes_over_memory() -> None:
    card = KnownCard("card", DataSheet(100.0, 1e9), None)
    found = step_time(PLAN, card, DecodeBatch(requests=3, experts=2, cached=5), 2)
    assert found.floor == pytest.approx((1000 + 2 * 100 + 3 * 5 * 3) / 100)
    assert found.floor_rate == pytest.approx(3 / found.floor)
    assert found.expected is None and found.expected_rate is None
    slow = KnownCard("card", DataSheet(100.0, 100.0), None)
    assert step_time(PLAN, slow, DecodeBatch(3, 2, 5), 2).floor == pytest.approx(2 * 500 * 3 / 100)
    assert prompt_rates(PLAN, card) == (1e9 / 1000, None) and load_seconds(PLAN, card) is None


def test_expectation_is_what_was_measured() -> None:
    card = KnownCard("card", DataSheet(100.0, 1e9), CONSTANTS)
    found = step_time(PLAN, card, DecodeBatch(requests=3, experts=2, cached=5), 2)
    assert found.expected == pytest.approx(1000 / 80 + 200 / 50 + 45 / 90 + 2 * 0.5 + 0.25)
    assert found.expected_rate == pytest.approx(3 / found.expected)
    base = step_time(PLAN, card, DecodeBatch(3, 0, 5), 1)
    assert base.expected == pytest.approx(1000 / 80 + 45 / 90 + 1.25)
    assert step_time(PLAN, card, DecodeBatch(3, 2, 5), 1).expected is None  # experts of 1 bit were not measured
    assert prompt_rates(PLAN, card) == (1e9 / 1000, 5000 / 1000) and load_seconds(PLAN, card) == 130 / 26
    assert load_seconds(PLAN, KnownCard("card", None, replace(CONSTANTS, load=None))) is None


def test_a_card_without_a_data_sheet_is_judged_by_its_own_copy() -> None:
    card = KnownCard("card", None, CONSTANTS)
    assert step_time(PLAN, card, DecodeBatch(1, 0, 0), 2).floor == pytest.approx(1000 / 90)
    assert prompt_rates(PLAN, card) == (None, 5.0)


def test_cards_by_part_of_their_name() -> None:
    assert find_card("h200").name == "NVIDIA H200"
    assert find_card("NVIDIA A10").name == "NVIDIA A10"  # although others' names begin so
    with pytest.raises(UsageError, match=r"is 2 cards; name one of NVIDIA H100 80GB HBM3, NVIDIA H100 PCIe"):
        find_card("H100")
    with pytest.raises(UsageError, match=r"is no card that is known; name one of.*H200"):
        find_card("abacus")


def test_measured_constants_are_whole() -> None:
    for constants in measured_cards().values():
        assert constants.commit and constants.copy > 0 and constants.base > 0 and constants.experts
    with pytest.raises(KeyError):
        card_constants({"commit": "abc"})


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("gemma", True)])
def test_what_a_step_reads_is_all_but_an_embedding_of_its_own(family: str, tied: bool, tmp_path: Path) -> None:
    base, _ = make_pair(tmp_path, family, relative_delta=0.1)
    checkpoint = Checkpoint.open(str(base))
    settings = CompressionSettings().by_kind()
    plan = plan_memory(checkpoint, settings, device_nbytes=10**8, experts=2)
    norms = 96 * (2 * 2 + 1) * 2
    embedding = 268 * 96 * 2
    assert plan.layers == 2
    assert plan.base_read_nbytes == 2 * plan.multiplied == plan.base_nbytes - norms - (0 if tied else embedding)
    assert (plan.slot_read_nbytes == plan.slot_nbytes) == tied
    assert plan.slot_nbytes * 0.7 < plan.slot_read_nbytes <= plan.slot_nbytes


def test_mistral_on_a_card_that_was_never_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "measured_cards", dict)
    config = MISTRAL_7B | {"torch_dtype": "bfloat16"}
    assert plan_of(tmp_path, config)[1]["speed"] is None
    told = plan_of(tmp_path, config, "--card", "H100 80", "--context", "2048", "--bits", "2")[1]["speed"]
    assert told["card"] == "NVIDIA H100 80GB HBM3" and told["measured"] is None and told["load_seconds"] is None
    assert [(b["requests"], b["experts"]) for b in told["batches"]] == [(16, 0), (1, 1), (16, 16)]
    assert {b["expected_seconds"] for b in told["batches"]} == {None}
    # 14.2 GB of base, 1.90 GB an expert, directions included, and 16 caches of 1,024 tokens over 3.35 TB/s.
    assert told["batches"][2]["floor_seconds"] == pytest.approx((14.22 + 16 * 1.899 + 16 * 0.134) / 3350, rel=0.01)
    # A trellis code lies in a slot as it is stored: 0.36 GB an expert without an embedding of its own.
    quarter = plan_of(tmp_path, config, "--card", "H100 80", "--context", "2048", "--bits", "0.25")[1]["speed"]
    floors = [batch["floor_seconds"] for batch in quarter["batches"]]
    assert floors[0] == told["batches"][0]["floor_seconds"] and floors[2] < told["batches"][2]["floor_seconds"]
    assert floors[2] == pytest.approx((14.22 + 16 * 0.355 + 16 * 0.134) / 3350, rel=0.01)
    arguments = ["plan", "--base", str(tmp_path), "--experts", "16", "--device-memory", "80GB", "--card", "H200"]
    said = CliRunner().invoke(build_app(arguments), arguments)
    assert said.exit_code == 0 and "meswitch was never measured on this card" in said.stdout
    assert said.stdout.count("not known") == 5


def test_mistral_on_a_measured_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: dict[str, Any] = {"commit": "abc", "copy": 3e12, "base": 2.8e12, "experts": {"2": 2.2e12}}
    held |= {"layer_seconds": 2e-5, "step_seconds": 5e-4, "prompt_operations": 6e14, "load": 5e10}
    monkeypatch.setattr(speed, "measured_cards", lambda: {"Some card": card_constants(held)})
    config = MISTRAL_7B | {"torch_dtype": "bfloat16"}
    status, plan = plan_of(tmp_path, config, "--card", "some", "--requests", "32", "--bits", "2")
    told = plan["speed"]
    assert status == 0 and told["measured"] == "abc" and told["memory_bytes_per_second"] == 3e12
    assert [(b["requests"], b["experts"]) for b in told["batches"]] == [(32, 0), (1, 1), (32, 16)]
    for batch in told["batches"]:
        assert 0 < batch["floor_seconds"] < batch["expected_seconds"]
        assert batch["expected_tokens_per_second"] == batch["requests"] / batch["expected_seconds"]
    assert told["prompt_tokens_per_second"]["floor"] is None
    arguments = ["plan", "--base", str(tmp_path), "--experts", "4", "--device-memory", "80GB", "--card", "some"]
    arguments += ["--bits", "2"]
    said = CliRunner().invoke(build_app(arguments), arguments).stdout
    assert "constants measured on this card, commit abc" in said and "an expert from host memory" in said
    arguments[-1] = "4"
    assert "not known" in CliRunner().invoke(build_app(arguments), arguments).stdout


def test_data_sheets_are_in_bytes_and_operations() -> None:
    for sheet in DATA_SHEETS.values():
        assert 1e11 < sheet.memory < 1e13 and 5e13 < sheet.matrix < 5e15
