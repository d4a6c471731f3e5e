"""Graphs of decode batches, and pages instead of rows, under a stand-in that a CPU can run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.family import Family, make_family, requests
from engine.graphs import Recorded, stand_in
from patience import PATIENCE

from meswitch_cli.engine import TransformersEngine, batching, generate, proof
from meswitch_cli.engine.contract import BASE
from meswitch_cli.engine.runner import Runner

Start = Callable[..., TransformersEngine]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    proof._problem.cache_clear()
    return stand_in(monkeypatch)


def check(engine: TransformersEngine, family: Family, count: int, **options: int) -> None:
    batch = requests(family, count, **options)
    for request, completion in zip(batch, generate(engine, batch), strict=True):
        assert completion.error is None
        assert completion.tokens == family.greedy(request), request


def test_every_answer_is_right_under_graphs(family: Family, start: Start, recorded: Recorded) -> None:
    engine = start(family, slots=2, max_wait=0.05, max_running=6)
    sizes = {key[0] for key in recorded.captures}
    assert sizes >= {1, 2, 4, 6}
    captured = len(recorded.captures)
    for count in (1, 2, 5, 12):
        check(engine, family, count, seed=count, prefix=20 if count > 2 else 0)
    assert len(recorded.captures) == captured, "a graph was captured while requests waited"
    assert {mixed for *_, mixed in recorded.replays[captured:]} == {0, 1}


def test_the_first_batch_of_a_graph_is_right(
    family: Family, start: Start, recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs captured under way: what a capture leaves behind is not sampled from."""
    monkeypatch.setattr("meswitch_cli.engine.runner.Runner.warm_up", lambda self, model, slot: None)
    engine = start(family, max_running=6)
    before = len(recorded.captures)
    check(engine, family, 12, seed=3)
    assert len(recorded.captures) > before


@pytest.mark.parametrize(("backend", "captured"), [("triton", True), ("naive", False)])
def test_only_what_a_graph_can_hold_is_captured(backend: str, captured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The naive backend waits for the device."""
    monkeypatch.setattr(batching, "default_backend", lambda device: backend)
    assert batching.captures_graphs(torch.device("cuda")) is captured
    assert not batching.captures_graphs(torch.device("cpu"))


def test_a_batch_of_the_base_alone_has_a_graph_of_its_own(family: Family, start: Start, recorded: Recorded) -> None:
    engine = start(family, max_running=4)
    before = len(recorded.replays)
    batch = [request for request in requests(family, 16, seed=2) if request.expert == BASE]
    for request, completion in zip(batch, generate(engine, batch), strict=True):
        assert completion.tokens == family.greedy(request)
    assert {mixed for *_, mixed in recorded.replays[before:]} == {0}


@pytest.mark.parametrize(
    ("name", "config"),
    [("gemma2", {"sliding_window": 16}), ("gemma3", {"sliding_window": 16}), ("mistral", {"sliding_window": 8})],
)
def test_rings_and_caps(name: str, config: dict[str, object], tmp_path: Path, start: Start, recorded: Recorded) -> None:
    own = make_family(tmp_path, name, **config)
    engine = start(own, slots=2, max_wait=0.05)
    replays = len(recorded.replays)
    check(engine, own, 12, seed=1)
    assert len(recorded.replays) > replays


def test_full_cache_begins_requests_again(family: Family, start: Start, recorded: Recorded) -> None:
    engine = start(family, cache_tokens=128, max_batch_tokens=32)
    check(engine, family, 16, seed=5, longest=60, max_tokens=40)
    assert engine.drain(PATIENCE)
    assert engine.statistics().cache_blocks_used == 0


def test_an_expert_that_needs_wider_slots_arrives_under_graphs(
    family: Family, start: Start, recorded: Recorded
) -> None:
    engine = start(family, experts={"alpha": family.artifacts["alpha"]}, slots=2, max_running=4)
    captured = len(recorded.captures)
    engine.load_expert("beta", family.artifacts["beta"])
    batch = [request for request in requests(family, 16, seed=8) if request.expert != "gamma"]
    for request, completion in zip(batch, generate(engine, batch), strict=True):
        assert completion.tokens == family.greedy(request), request
    assert len(recorded.captures) > captured


def test_everything_is_tried_before_requests_are_taken(
    family: Family, start: Start, recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels are compiled when they are first called: batches of each size are computed before the first request."""
    tried: set[tuple[int, bool]] = set()
    forward = Runner._forward_process_and_sample

    def noted(self: Runner, model: Any, batch_data: dict[str, Any], *arguments: Any) -> None:
        forward(self, model, batch_data, *arguments)
        tried.add((batch_data["input_ids"].shape[1], self.mixed))

    monkeypatch.setattr(Runner, "_forward_process_and_sample", noted)
    start(family, max_running=4, max_batch_tokens=256)
    assert tried >= {(size, mixed) for size in (1, 2, 4, 16, 32, 64, 128, 256) for mixed in (False, True)}


def test_answers_are_told_while_the_next_batch_is_computed(family: Family, start: Start, recorded: Recorded) -> None:
    engine = start(family, max_running=4)
    assert engine._thread is not None
    engine._thread.batch_processor.model_runner.waits = True  # as on a card
    batch = requests(family, 16, seed=4)
    texts = [completion.text for completion in generate(start(family), batch)]
    for request, completion, text in zip(batch, generate(engine, batch), texts, strict=True):
        assert (completion.tokens, completion.text) == (family.greedy(request), text)
    assert engine.drain(PATIENCE)
