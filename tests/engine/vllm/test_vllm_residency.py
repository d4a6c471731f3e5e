"""The black-box tests of residency, and what is vLLM's own about it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from engine.family import Family, requests
from engine.test_residency import (
    Traffic,
    assert_idle,
    one,
    test_a_callback_that_raises_ends_its_own_request,
    test_an_expert_is_known_by_its_name_and_digest,
    test_another_base_is_refused,
    test_artifact_lost_after_the_start_fails_its_requests_alone,
    test_cancelling_frees_everything,
    test_corrupt_artifact_at_start_and_at_load,
    test_drain_and_stop,
    test_experts_of_one_beginning_never_share_cache,
    test_least_recently_used_goes_first,
    test_no_expert_left_stops_the_start,
    test_nobody_starves_under_skewed_load,
    test_pinned_experts_stay,
    test_pinning_an_absent_expert_fetches_it,
    test_queue_overflow_and_duplicate_ids,
    test_same_name_other_artifact_shares_no_prefix,
    test_statistics_may_be_asked_at_any_time,
    test_unloading_waits_for_what_runs,
    test_without_sharing_nothing_is_cached,
)
from engine.vllm.conftest import NEEDS_VLLM

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


def test_a_failure_of_the_loop_is_told_to_everyone(family: Family, start: Start) -> None:
    engine = start(family, max_running=2)
    loops: list[object] = []
    engine._in_loop(loops.append)

    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("out of everything")

    loops[0].engine.engine_core.engine_core.model_executor.execute_model = fail  # type: ignore[attr-defined]
    traffic = Traffic(engine)
    for index in range(5):
        traffic.submit(one("alpha", index, tokens=20))
    completions = traffic.wait(10).values()
    assert {completion.finish_reason for completion in completions} == {"error"}
    assert all("out of everything" in (completion.error or "") for completion in completions)
    with pytest.raises(ShuttingDownError, match="out of everything"):
        engine.submit(one("beta"), lambda chunk: None)
