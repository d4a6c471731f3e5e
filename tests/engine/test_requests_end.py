"""Requests end, are cancelled or fail, and nothing of them is left; so does the engine."""

from __future__ import annotations

import random
import threading
import time

import pytest
from engine.family import Family, requests
from engine.held import held
from engine.traffic import Start, Traffic, assert_idle, one
from patience import PATIENCE

from meswitch_cli.engine import Completion, generate
from meswitch_cli.engine.contract import (
    BASE,
    Chunk,
    EngineError,
    QueueFullError,
    ShuttingDownError,
)


def test_cancelling_frees_everything(family: Family, start: Start) -> None:
    """Three hundred requests, a third of them cancelled at random moments."""
    engine = start(family, slots=2, max_wait=0.05, max_running=8, max_queue=400)
    traffic, rng = Traffic(engine), random.Random(0)
    names = [BASE, *family.artifacts]
    wanted = []

    def submit(index: int) -> None:
        request = one(rng.choice(names), index, tokens=rng.randint(1, 6))
        traffic.submit(request)
        wanted.append(request)
        if rng.random() < 0.33:
            engine.cancel(rng.choice(wanted).id)
        if rng.random() < 0.1:
            time.sleep(0.01)

    with held(engine):  # some are cancelled before they have ended
        for index in range(30):
            submit(index)
    for index in range(30, 300):
        submit(index)
    completions = traffic.wait()
    reasons = {completion.finish_reason for completion in completions.values()}
    assert reasons == {"length", "cancelled"}
    truth = {name: family.greedy(one(name, tokens=6)) for name in names}
    for request in wanted:
        tokens = completions[request.id].tokens
        assert tokens == truth[request.expert][: len(tokens)]
    engine.cancel("never heard of")
    assert_idle(engine)


def test_queue_overflow_and_duplicate_ids(family: Family, start: Start) -> None:
    engine = start(family, max_running=2, max_queue=3)
    traffic = Traffic(engine)
    with held(engine):
        with pytest.raises(QueueFullError):
            for index in range(20):
                traffic.submit(one("alpha", index, tokens=60))
        assert len(traffic.chunks) >= 5
        with pytest.raises(EngineError, match="in use"):
            engine.submit(one("alpha", 0), lambda chunk: None)
    traffic.wait()
    assert_idle(engine)


@pytest.mark.parametrize("how", ["ended", "cancelled"])
def test_who_hears_of_the_end_may_submit_at_once(family: Family, start: Start, how: str) -> None:
    """The id is free, and so is the place, in an engine that has no more than one."""
    engine = start(family, max_running=1, max_queue=0)
    request = one("alpha", tokens=4 if how == "ended" else 100)
    ends: list[str] = []
    problems: list[EngineError] = []
    over = threading.Event()

    def on_chunk(chunk: Chunk) -> None:
        if chunk.finish_reason is None:
            if how == "cancelled":
                engine.cancel(request.id)
            return
        ends.append(chunk.finish_reason)
        if len(ends) == 4:
            over.set()
            return
        try:
            engine.submit(request, on_chunk)
        except EngineError as error:
            problems.append(error)
            over.set()

    engine.submit(request, on_chunk)
    assert over.wait(PATIENCE)
    assert not problems
    assert ends == 4 * ["length" if how == "ended" else "cancelled"]
    assert_idle(engine)


def test_a_callback_that_raises_ends_its_own_request(family: Family, start: Start) -> None:
    engine = start(family)

    def broken(chunk: Chunk) -> None:
        raise RuntimeError("not the engine's fault")

    engine.submit(one("alpha", "broken", tokens=50), broken)
    (completion,) = generate(engine, [one("alpha")])
    assert completion.tokens == family.greedy(one("alpha"))
    assert_idle(engine)


def test_drain_and_stop(family: Family, start: Start) -> None:
    of_others = set(threading.enumerate())
    engine = start(family)
    with pytest.raises(EngineError, match="started already"):
        engine.start()
    traffic = Traffic(engine)
    with held(engine):
        for index in range(4):
            traffic.submit(one("alpha", index, tokens=100))
        assert not engine.drain(0.0)
        with pytest.raises(ShuttingDownError):
            engine.submit(one("beta"), lambda chunk: None)
    engine.stop()
    assert {completion.finish_reason for completion in traffic.wait().values()} <= {"cancelled", "length"}
    assert not [thread for thread in set(threading.enumerate()) - of_others if thread.name == "meswitch-loader"]
    with pytest.raises(ShuttingDownError):
        engine.submit(one("beta"), lambda chunk: None)
    engine.stop()


def test_a_failure_of_the_loop_is_told_to_everyone(family: Family, start: Start) -> None:
    engine = start(family, max_running=2)
    generate(engine, [one("alpha")])

    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("out of everything")

    engine._base.model.forward = fail
    traffic = Traffic(engine)
    for index in range(5):
        traffic.submit(one("alpha", index, tokens=20))
    completions = traffic.wait().values()
    assert {completion.finish_reason for completion in completions} == {"error"}
    assert all("out of everything" in (completion.error or "") for completion in completions)
    with pytest.raises(ShuttingDownError, match="out of everything"):
        engine.submit(one("beta"), lambda chunk: None)


def test_statistics_may_be_asked_at_any_time(family: Family, start: Start) -> None:
    engine = start(family, slots=2, max_wait=0.05)
    batch = requests(family, 32, seed=8)
    stop = threading.Event()
    most, odd = [0], []

    def ask() -> None:
        while not stop.is_set():
            statistics = engine.statistics()
            most[0] = max(most[0], statistics.cache_blocks_used)
            if statistics.slots_used > 2 or len(engine.experts()) != 3:
                odd.append(statistics)

    thread = threading.Thread(target=ask)
    thread.start()
    completions: list[Completion] = []
    deadline, rounds = time.monotonic() + PATIENCE, 0
    while not most[0]:  # it is asked while a batch is computed, sooner or later
        assert time.monotonic() < deadline
        completions += generate(engine, batch)
        rounds += 1
    stop.set()
    thread.join()
    assert engine.drain(PATIENCE)  # a request is counted just after its last chunk was told
    assert not odd and 0 < most[0] <= engine.statistics().cache_blocks
    assert engine.statistics().generated_tokens == sum(len(completion.tokens) for completion in completions)
    assert engine.statistics().prompt_tokens == rounds * sum(len(request.prompt_tokens) for request in batch)
