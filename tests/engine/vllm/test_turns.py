"""No adapter waits for a slot without end: the rule alone, in a model of how vLLM begins requests."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Set
from dataclasses import dataclass

import pytest

from meswitch_cli.engine.vllm.turns import SlotTurns

Held = Callable[[Set[int], Set[int], float], Set[int]]


@dataclass
class Asked:
    """A request: when it came, how long it runs; when it began and when it ends, once that is known."""

    adapter: int
    came: int
    length: int
    began: int | None = None

    @property
    def ends(self) -> int:
        assert self.began is not None
        return self.began + self.length


def serve(asked: list[Asked], slots: int, held: Held) -> None:
    """Begin requests as vLLM does, the oldest first whose adapter is in use or finds a slot; a step a second."""
    coming, waiting, running = deque(asked), list[Asked](), list[Asked]()
    now = 0
    while coming or waiting or running:
        while coming and coming[0].came <= now:
            waiting.append(coming.popleft())
        running = [item for item in running if item.ends > now]
        used = {item.adapter for item in running}
        passed_over = held(frozenset(used), {item.adapter for item in waiting}, float(now))
        for item in list(waiting):
            if item.adapter not in passed_over and (item.adapter in used or len(used) < slots):
                used.add(item.adapter)
                item.began = now
                waiting.remove(item)
                running.append(item)
        assert len({item.adapter for item in running}) <= slots
        now += 1


def waits(asked: list[Asked]) -> list[int]:
    return [item.began - item.came for item in asked if item.began is not None]


def vllm_alone(running: Set[int], waiting: Set[int], now: float) -> Set[int]:
    return frozenset()


def steady(adapters: range, seconds: int, length: int) -> list[Asked]:
    """Requests that overlap, of each adapter."""
    return [Asked(adapter, second, length) for second in range(seconds) for adapter in adapters]


def test_one_that_finds_no_slot_is_passed_over_by_vllm_alone_and_waits_a_bounded_time_here() -> None:
    last = {}
    for name, held in (("alone", vllm_alone), ("turns", SlotTurns(1, 2.0).held)):
        asked = sorted([*steady(range(1), 100, 5), Asked(1, 10, 5)], key=lambda item: item.came)
        serve(asked, 1, held)
        (late,) = (item for item in asked if item.adapter == 1)
        assert late.began is not None
        last[name] = late.began - late.came
    assert last["alone"] >= 90
    # Two seconds pass, and what then runs of the other ends.
    assert last["turns"] <= 2 + 5 + 1


@pytest.mark.parametrize(("adapters", "slots"), [(2, 1), (3, 2), (5, 2), (7, 3), (12, 4)])
@pytest.mark.parametrize("seed", range(4))
def test_every_wait_is_bounded(adapters: int, slots: int, seed: int) -> None:
    rng = random.Random(seed)
    longest, max_wait = 6, 3
    asked = [
        Asked(adapter, second, rng.randint(1, longest))
        for second in range(300)
        for adapter in range(adapters)
        if adapter < slots or rng.random() < 0.3
    ]
    serve(asked, slots, SlotTurns(slots, float(max_wait)).held)
    assert len(waits(asked)) == len(asked)
    # Each turn begins and ends with a step.
    assert max(waits(asked)) <= math.ceil(adapters / slots) * (max_wait + longest + 2)


def test_nobody_is_held_where_slots_suffice() -> None:
    turns = SlotTurns(3, 0.0)
    assert all(not turns.held(frozenset({1, 2}), frozenset({1, 2, 3}), float(now)) for now in range(5))


def test_an_adapter_keeps_its_slot_for_as_long_as_others_wait() -> None:
    turns = SlotTurns(1, 10.0)
    told = [turns.held(frozenset({1}), frozenset({1, 2}), now) for now in (0.0, 9.0, 10.0, 10.5)]
    assert told == [frozenset(), frozenset(), frozenset(), {1}]
    # It drains until its last request has ended; then the one that waited goes before it.
    assert turns.held(frozenset({1}), frozenset({1, 2}), 30.0) == {1}
    assert turns.held(frozenset(), frozenset({1, 2}), 31.0) == {1}
    assert turns.held(frozenset({2}), frozenset({1}), 32.0) == frozenset()


def test_those_that_drain_go_on_when_those_that_waited_are_gone() -> None:
    turns = SlotTurns(1, 1.0)
    turns.held(frozenset({1}), frozenset({2}), 0.0)
    assert turns.held(frozenset({1}), frozenset({1, 2}), 2.0) == {1}
    assert turns.held(frozenset({1}), frozenset({1}), 3.0) == frozenset()
