"""Experts move between disk and device while others generate; nobody starves, nothing leaks."""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.family import Family, copy_artifact, requests
from engine.held import held
from patience import PATIENCE, until

from meswitch_cli.artifact.manifest import MANIFEST_FILE
from meswitch_cli.engine import Completion, TransformersEngine, generate
from meswitch_cli.engine.contract import (
    BASE,
    Chunk,
    EngineError,
    GenerationRequest,
    QueueFullError,
    Sampling,
    ShuttingDownError,
    UnknownExpertError,
)
from meswitch_cli.engine.generate import join_chunks
from meswitch_cli.errors import ArtifactError

Start = Callable[..., TransformersEngine]


class Traffic:
    """Submits requests and gathers what comes back."""

    def __init__(self, engine: TransformersEngine, clock: Callable[[], float] = time.monotonic) -> None:
        self.engine, self._clock = engine, clock
        self.chunks: dict[str, list[Chunk]] = {}
        self.times: dict[str, tuple[float, float]] = {}
        self._begun: dict[str, float] = {}
        self._ended = threading.Condition()

    def submit(self, request: GenerationRequest) -> None:
        self.chunks[request.id], self._begun[request.id] = [], self._clock()
        try:
            self.engine.submit(request, self._on_chunk)
        except BaseException:
            del self.chunks[request.id]
            raise

    def _on_chunk(self, chunk: Chunk) -> None:
        with self._ended:
            begun = self._begun[chunk.request_id]
            first = self.times.get(chunk.request_id, (self._clock() - begun, 0.0))[0]
            self.times[chunk.request_id] = (first, self._clock() - begun)
            self.chunks[chunk.request_id].append(chunk)
            self._ended.notify_all()

    def wait(self) -> dict[str, Completion]:
        def over() -> bool:
            return all(chunks and chunks[-1].finish_reason for chunks in self.chunks.values())

        with self._ended:
            assert self._ended.wait_for(over, PATIENCE), "requests that never ended"
        return {request_id: join_chunks(chunks) for request_id, chunks in self.chunks.items()}


def one(name: str, index: object = 0, tokens: int = 8) -> GenerationRequest:
    sampling = Sampling(temperature=0, max_tokens=tokens, ignore_eos=True)
    return GenerationRequest(f"{name}-{index}", name, tuple(range(30, 50)), sampling)


def assert_idle(engine: TransformersEngine) -> None:
    assert engine.drain(PATIENCE)
    statistics = engine.statistics()
    assert (statistics.running, statistics.waiting, statistics.cache_blocks_used) == (0, 0, 0)
    assert all(status.running == status.waiting == 0 for status in engine.experts())
    if isinstance(engine, TransformersEngine):
        processor = engine._thread.batch_processor
        assert not processor.scheduler.active_requests and not processor.scheduler.waiting_requests
        assert not processor.cache._salts and not processor.cache.matched
    assert all(slot.running == 0 for slot in engine._table.slots)


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


def test_load_and_unload_under_traffic(family: Family, start: Start, tmp_path: Path) -> None:
    """The new experts need wider codes, more channels and rows than the slots had, and a rank."""
    engine = start(family, experts={"alpha": family.artifacts["alpha"]}, slots=2)
    traffic = Traffic(engine)
    for index in range(10):
        traffic.submit(one("alpha", index, tokens=30))
    engine.load_expert("new/gamma", family.artifacts["gamma"])
    engine.load_expert("beta", family.artifacts["beta"])
    batch = [request for request in requests(family, 12, seed=3) if request.expert in ("beta", BASE)]
    for request, completion in zip(batch, generate(engine, batch), strict=True):
        assert completion.tokens == family.greedy(request)
    generate(engine, [one("new/gamma")])
    with pytest.raises(EngineError, match="served already"):
        engine.load_expert("beta", family.artifacts["alpha"])
    engine.unload_expert("beta")
    with pytest.raises(UnknownExpertError):
        traffic.submit(one("beta"))
    # The name comes back with other weights: nothing of the old ones' cache is found.
    engine.load_expert("beta", family.artifacts["alpha"])
    (completion,) = generate(engine, [one("beta", "again")])
    assert completion.tokens == family.greedy(one("alpha"))
    assert {item.tokens for item in traffic.wait().values()} == {family.greedy(one("alpha", tokens=30))}
    with pytest.raises(EngineError, match="base"):
        engine.unload_expert(BASE)
    assert_idle(engine)


def test_no_room_for_wider_slots_leaves_everything_as_it_was(
    family: Family, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start(family, experts={"alpha": family.artifacts["alpha"]}, slots=2)

    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("meswitch_cli.engine.loader.Banks", full)
        with pytest.raises(EngineError, match="no room for wider slots"):
            engine.load_expert("beta", family.artifacts["beta"])
    assert not engine.serves("beta")
    (completion,) = generate(engine, [one("alpha")])
    assert completion.tokens == family.greedy(one("alpha"))
    engine.load_expert("beta", family.artifacts["beta"])
    (completion,) = generate(engine, [one("beta")])
    assert completion.tokens == family.greedy(one("beta"))


def test_unloading_waits_for_what_runs(family: Family, start: Start) -> None:
    engine = start(family)
    traffic = Traffic(engine)
    for index in range(6):
        traffic.submit(one("alpha", index, tokens=30))
    engine.unload_expert("alpha")
    assert all(len(completion.tokens) == 30 for completion in traffic.wait().values())
    assert "alpha" not in {status.name for status in engine.experts()}
    assert [engine.serves(name) for name in ("alpha", "beta", BASE)] == [False, True, True]


def test_an_expert_is_known_by_its_name_and_digest(family: Family, start: Start) -> None:
    engine = start(family)
    assert [engine.serves(name) for name in ("alpha", BASE, "nobody")] == [True, True, False]
    manifest = (family.artifacts["alpha"] / MANIFEST_FILE).read_bytes()
    assert engine.digest("alpha") == hashlib.sha256(manifest).hexdigest()
    assert engine.digest(BASE) == ""
    with pytest.raises(UnknownExpertError):
        engine.digest("nobody")


def test_same_name_other_artifact_shares_no_prefix(family: Family, start: Start) -> None:
    engine = start(family, experts={"x": family.artifacts["alpha"]})
    generate(engine, [one("x", 0)])
    engine.unload_expert("x")
    engine.load_expert("x", family.artifacts["beta"])
    (completion,) = generate(engine, [one("x", 1)])
    assert completion.cached_tokens == 0
    assert completion.tokens == family.greedy(one("beta"))


def damage(artifact: Path) -> Path:
    shard = sorted(artifact.glob("delta-*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-20] ^= 1
    shard.write_bytes(data)
    return artifact


def test_corrupt_artifact_at_start_and_at_load(family: Family, start: Start, tmp_path: Path) -> None:
    broken = damage(copy_artifact(family.artifacts["beta"], tmp_path / "broken"))
    engine = start(family, experts={"alpha": family.artifacts["alpha"], "beta": broken})
    assert set(engine.failed) == {"beta"} and "SHA-256" in engine.failed["beta"]
    with pytest.raises(ArtifactError, match="SHA-256"):
        engine.load_expert("beta", broken)
    with pytest.raises(ArtifactError, match="not an artifact"):
        engine.load_expert("beta", tmp_path)
    (completion,) = generate(engine, [one("alpha")])
    assert completion.tokens == family.greedy(one("alpha"))
    with pytest.raises(UnknownExpertError):
        engine.submit(one("beta"), lambda chunk: None)


def test_no_expert_left_stops_the_start(family: Family, start: Start, tmp_path: Path) -> None:
    broken = damage(copy_artifact(family.artifacts["beta"], tmp_path / "broken"))
    with pytest.raises(EngineError, match="no expert can be served"):
        start(family, experts={"beta": broken})
    with pytest.raises(ArtifactError):
        start(family, experts={"alpha": family.artifacts["alpha"], "beta": broken}, strict=True)


def test_artifact_lost_after_the_start_fails_its_requests_alone(family: Family, start: Start, tmp_path: Path) -> None:
    gone = copy_artifact(family.artifacts["beta"], tmp_path / "gone")
    engine = start(family, experts={"alpha": family.artifacts["alpha"], "beta": gone}, slots=1)
    for shard in gone.glob("delta-*"):
        shard.unlink()
    lost, kept = generate(engine, [one("beta"), one("alpha")])
    assert lost.finish_reason == "error" and "delta-" in (lost.error or "")
    assert kept.tokens == family.greedy(one("alpha"))
    assert_idle(engine)


def test_another_base_is_refused(family: Family, start: Start, tmp_path: Path) -> None:
    from zoo.tiny import make_pair

    other, _ = make_pair(tmp_path, "llama", seed=5)
    with pytest.raises(EngineError, match="wrong base"):
        start(Family(other, family.artifacts, {}))


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
    traffic = Traffic(engine)
    with held(engine, after=2):
        for request in batch:
            traffic.submit(request)
        until(lambda: most[0])
    completions = traffic.wait().values()
    stop.set()
    thread.join()
    assert engine.drain(PATIENCE)  # a request is counted just after its last chunk was told
    assert not odd and 0 < most[0] <= engine.statistics().cache_blocks
    assert engine.statistics().generated_tokens == sum(len(completion.tokens) for completion in completions)
    assert engine.statistics().prompt_tokens == sum(len(request.prompt_tokens) for request in batch)
