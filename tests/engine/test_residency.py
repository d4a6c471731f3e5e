"""Experts move between disk and device while others generate; nobody starves, and prefixes are never shared."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from engine.family import Family
from engine.held import held
from engine.traffic import Start, Traffic, assert_idle, one
from patience import until

from meswitch_cli.engine import TransformersEngine, generate
from meswitch_cli.engine.contract import (
    BASE,
    EngineError,
    GenerationRequest,
    Sampling,
    UnknownExpertError,
)


def test_experts_of_one_beginning_never_share_cache(family: Family, start: Start) -> None:
    engine = start(family)
    prompt = tuple(range(20, 60))
    sampling = Sampling(temperature=0, max_tokens=6, ignore_eos=True)
    for name in [BASE, *family.artifacts]:
        first, again = (GenerationRequest(f"{name}{i}", name, prompt, sampling) for i in (1, 2))
        (cold,), (warm,) = generate(engine, [first]), generate(engine, [again])
        assert (cold.cached_tokens, warm.cached_tokens) == (0, 32)  # whole pages of 8, and never the last token
        assert cold.tokens == warm.tokens == family.greedy(first)
    assert_idle(engine)


def test_without_sharing_nothing_is_cached(family: Family, start: Start) -> None:
    engine = start(family, prefix_sharing=False)
    for index in range(2):
        (completion,) = generate(engine, [one("alpha", index)])
        assert completion.cached_tokens == 0


def test_least_recently_used_goes_first(family: Family, start: Start) -> None:
    engine = start(family, slots=2)

    def resident() -> set[str]:
        return {status.name for status in engine.experts() if status.residency == "device"}

    assert resident() == {"alpha", "beta"}
    generate(engine, [one("alpha")])
    generate(engine, [one("gamma")])
    assert resident() == {"alpha", "gamma"}
    statistics = engine.statistics()
    assert (statistics.slot_hits, statistics.slot_loads, statistics.slot_evictions) == (1, 3, 1)
    assert statistics.slot_load_bytes > 0 and statistics.slot_load_seconds > 0
    generate(engine, [one("beta")])
    assert resident() == {"beta", "gamma"}


def test_host_copies_are_kept_within_their_bytes(family: Family, start: Start) -> None:
    nbytes = max(sum(file.stat().st_size for file in path.glob("*.safetensors")) for path in family.artifacts.values())
    engine = start(family, slots=1, host_bytes=2 * nbytes)
    for name in ("alpha", "beta", "gamma"):
        generate(engine, [one(name)])
    assert 0 < engine._copies.nbytes <= 2 * nbytes
    residencies = {status.name: status.residency for status in engine.experts()}
    assert residencies["gamma"] == "device" and "host" in residencies.values()


def test_pinned_experts_stay(family: Family, start: Start) -> None:
    engine = start(family, slots=2, max_wait=0.05)
    engine.pin_expert("alpha")
    generate(engine, [one("gamma"), one("beta"), one("gamma", 1)])
    alpha = next(status for status in engine.experts() if status.name == "alpha")
    assert alpha.pinned and alpha.residency == "device"
    engine.pin_expert("gamma")
    with pytest.raises(EngineError, match="every slot is pinned"):
        engine.pin_expert("beta")
    (refused,) = generate(engine, [one("beta", 1)])
    assert refused.finish_reason == "error" and "pinned" in (refused.error or "")
    engine.pin_expert("alpha", False)
    generate(engine, [one("beta", 2)])
    with pytest.raises(EngineError, match="always"):
        engine.pin_expert(BASE)
    with pytest.raises(UnknownExpertError):
        engine.pin_expert("nobody")


def test_pinning_an_absent_expert_fetches_it(family: Family, start: Start) -> None:
    engine = start(family, slots=1)
    engine.pin_expert("gamma")
    until(lambda: any(status.name == "gamma" and status.residency == "device" for status in engine.experts()))


def test_what_waits_for_a_slot_is_read_ahead(family: Family, start: Start) -> None:
    """The only slot is taken: the expert that is waited for comes into host memory meanwhile."""
    engine = start(family, slots=1, max_wait=30.0, host_bytes=1 << 30)
    traffic = Traffic(engine)
    with held(engine, after=2):
        traffic.submit(one("alpha", tokens=100))
        until(lambda: any(status.running for status in engine.experts()))
        traffic.submit(one("beta"))
        until(lambda: {status.name: status.residency for status in engine.experts()}["beta"] == "host")
        assert not traffic.chunks["beta-0"]
    assert traffic.wait()["beta-0"].tokens == family.greedy(one("beta"))


class Ticking:
    """A clock of batches, 10 ms each: what an engine waits by it does not depend on how fast the machine is."""

    def __init__(self, engine: TransformersEngine) -> None:
        self._now = time.monotonic()  # slots were filled by the other one
        go_on = engine.before_batch

        def tick(loop: Any) -> None:
            go_on(loop)
            self._now += 0.01 * (engine.statistics().running > 0)

        engine.before_batch = tick

    def monotonic(self) -> float:
        return self._now

    def wait(self, seconds: float) -> None:
        end = self._now + seconds
        until(lambda: self._now >= end)


def test_nobody_starves_under_skewed_load(family: Family, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """One slot, and an expert that always has work: the others get their turn within the bound."""
    max_wait = 0.3
    engine = start(family, slots=1, max_wait=max_wait, max_running=8)
    clock = Ticking(engine)
    for module in ("generation", "residency", "slotted_engine"):
        monkeypatch.setattr(f"meswitch_cli.engine.{module}.time", clock)
    traffic = Traffic(engine, clock.monotonic)
    stop = threading.Event()

    def flood() -> None:
        index = 0
        while not stop.is_set():
            if sum(status.running + status.waiting for status in engine.experts()) < 12:
                traffic.submit(one("alpha", index, tokens=6))
                index += 1
            else:
                time.sleep(0.002)

    thread = threading.Thread(target=flood)
    thread.start()
    clock.wait(0.5)
    for index in range(3):
        traffic.submit(one("beta", index, tokens=4))
        traffic.submit(one("gamma", index, tokens=4))
        clock.wait(0.4)
    clock.wait(2.5)
    until(lambda: sum(name.startswith("alpha") for name in tuple(traffic.times)) > 20)
    stop.set()
    thread.join()
    traffic.wait()
    rare = [times[0] for name, times in traffic.times.items() if not name.startswith("alpha")]
    longest = max(times[1] - times[0] for times in traffic.times.values())
    # Both others may be before it, each for `max_wait` and what then still runs.
    assert max(rare) < 3 * (max_wait + longest) + 1.0
    assert sum(name.startswith("alpha") for name in traffic.times) > 20
    assert_idle(engine)
