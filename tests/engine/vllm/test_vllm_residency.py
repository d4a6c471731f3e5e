"""The black-box tests of residency, and what is vLLM's own about it."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from engine.family import Family, requests
from engine.test_requests_end import (
    test_a_callback_that_raises_ends_its_own_request,
    test_cancelling_frees_everything,
    test_drain_and_stop,
    test_queue_overflow_and_duplicate_ids,
    test_statistics_may_be_asked_at_any_time,
)
from engine.test_residency import (
    test_experts_of_one_beginning_never_share_cache,
    test_least_recently_used_goes_first,
    test_nobody_starves_under_skewed_load,
    test_pinned_experts_stay,
    test_pinning_an_absent_expert_fetches_it,
    test_without_sharing_nothing_is_cached,
)
from engine.test_served_experts import (
    test_an_expert_is_known_by_its_name_and_digest,
    test_another_base_is_refused,
    test_artifact_lost_after_the_start_fails_its_requests_alone,
    test_corrupt_artifact_at_start_and_at_load,
    test_no_expert_left_stops_the_start,
    test_same_name_other_artifact_shares_no_prefix,
    test_unloading_waits_for_what_runs,
)
from engine.traffic import Traffic, assert_idle, one
from engine.vllm.conftest import NEEDS_VLLM
from engine.vllm.processes import children

from meswitch_cli.engine import generate
from meswitch_cli.engine.contract import EngineError, ShuttingDownError, UnknownExpertError
from meswitch_cli.engine.vllm.engine import VllmEngine

__all__ = [
    "test_a_callback_that_raises_ends_its_own_request",
    "test_an_expert_is_known_by_its_name_and_digest",
    "test_another_base_is_refused",
    "test_artifact_lost_after_the_start_fails_its_requests_alone",
    "test_cancelling_frees_everything",
    "test_corrupt_artifact_at_start_and_at_load",
    "test_drain_and_stop",
    "test_experts_of_one_beginning_never_share_cache",
    "test_least_recently_used_goes_first",
    "test_no_expert_left_stops_the_start",
    "test_nobody_starves_under_skewed_load",
    "test_pinned_experts_stay",
    "test_pinning_an_absent_expert_fetches_it",
    "test_queue_overflow_and_duplicate_ids",
    "test_same_name_other_artifact_shares_no_prefix",
    "test_statistics_may_be_asked_at_any_time",
    "test_unloading_waits_for_what_runs",
    "test_without_sharing_nothing_is_cached",
]

pytestmark = NEEDS_VLLM
Start = Callable[..., VllmEngine]


def test_load_and_unload_under_traffic(family: Family, start: Start) -> None:
    """The new expert needs wider codes than the slots had; one with tokens that vLLM has no place for is refused."""
    engine = start(family, experts={"alpha": family.artifacts["alpha"]}, slots=2)
    traffic = Traffic(engine)
    for index in range(10):
        traffic.submit(one("alpha", index, tokens=30))
    engine.load_expert("beta", family.artifacts["beta"])
    batch = [request for request in requests(family, 12, seed=3) if request.expert in ("beta", "base")]
    for request, completion in zip(batch, generate(engine, batch), strict=True):
        assert completion.tokens == family.greedy(request)
    with pytest.raises(EngineError, match="3 tokens of its own"):
        engine.load_expert("gamma", family.artifacts["gamma"])
    with pytest.raises(EngineError, match="served already"):
        engine.load_expert("beta", family.artifacts["alpha"])
    engine.unload_expert("beta")
    with pytest.raises(UnknownExpertError):
        traffic.submit(one("beta"))
    assert {item.tokens for item in traffic.wait().values()} == {family.greedy(one("alpha", tokens=30))}
    assert_idle(engine)


def test_a_worker_that_is_killed_fails_everyone_and_nothing_hangs(family: Family, start: Start) -> None:
    engine = start(family, max_running=2)
    traffic = Traffic(engine)
    for index in range(5):
        traffic.submit(one("alpha", index, tokens=100))
    (worker,) = children("Worker")
    worker.kill()
    completions = traffic.wait().values()
    assert {completion.finish_reason for completion in completions} == {"error"}
    assert all("vLLM's processes have ended" in (completion.error or "") for completion in completions)
    with pytest.raises(ShuttingDownError, match="vLLM's processes have ended"):
        engine.submit(one("beta"), lambda chunk: None)
    with pytest.raises(ShuttingDownError, match="vLLM's processes have ended"):
        engine.load_expert("late", family.artifacts["beta"])
    engine.stop()
    assert not children("Worker") and not children("EngineCore")


def test_an_idle_engine_notices_that_vllm_has_died(family: Family, start: Start) -> None:
    engine = start(family)
    (core,) = children("EngineCore")
    core.kill()
    deadline = time.monotonic() + 60
    while engine.closed is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert "vLLM's processes have ended" in (engine.closed or "")
