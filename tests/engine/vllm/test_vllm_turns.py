"""Experts that are more than the slots take turns in plain `vllm serve`: vLLM's own schedulers, and its server."""

from __future__ import annotations

import itertools
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine.family import Family, requests
from engine.vllm.conftest import NEEDS_VLLM
from engine.vllm.plain_server import PlainServer

from meswitch_cli.engine.contract import EngineError, GenerationRequest, Sampling
from meswitch_cli.engine.vllm.turns import SlotTurns

pytestmark = NEEDS_VLLM

STEPS, TOKENS = 200, 4
BUSY = GenerationRequest("busy", "alpha", (5, 6, 7))


def configured(family: Family, *, asynchronous: bool = False, **asked: Any) -> Any:
    """vLLM's configuration of a server of one slot, as its engine core gets it."""
    from vllm.engine.arg_utils import EngineArgs

    from meswitch_cli.engine.vllm.plain import take_turns
    from meswitch_cli.engine.vllm.plugin import register

    register()
    config = EngineArgs(
        model=str(family.base),
        dtype="float32",
        max_model_len=128,
        block_size=32,
        enable_lora=True,
        max_loras=1,
        max_cpu_loras=2,
        kv_cache_memory_bytes=1 << 24,
        additional_config={"meswitch": {"experts": [str(family.artifacts["alpha"])], **asked}},
    ).create_engine_config()
    if asynchronous:  # never chosen on a CPU
        config.scheduler_config.async_scheduling, config.scheduler_config.scheduler_cls = True, None
        take_turns(config)
    return config


def first_steps(config: Any) -> dict[int, int]:
    """Of each adapter the step at which its first request begins: one of the first comes at every other step, one of
    the second at step 5; a batch is planned before the last one's tokens are known where scheduling is asynchronous."""
    import torch
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request
    from vllm.v1.structured_output import StructuredOutputManager

    config.cache_config.num_gpu_blocks = 1000
    spec = FullAttentionSpec(block_size=32, num_kv_heads=1, head_size=32, dtype=torch.float32)
    scheduler = config.scheduler_config.get_scheduler_cls()(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(1000, [], [KVCacheGroupSpec(["layer"], spec)]),
        structured_output_manager=StructuredOutputManager(config),
        block_size=32,
        hash_block_size=32,
    )
    began: dict[int, int] = {}
    of: dict[str, int] = {}
    pending: list[Any] = []

    def finish(output: Any) -> None:
        names = list(output.num_scheduled_tokens)
        tokens = [[7] for _ in names]
        told = ModelRunnerOutput(names, {name: place for place, name in enumerate(names)}, tokens)
        scheduler.update_from_output(output, told)

    for step in range(STEPS):
        for adapter in [1] * (step % 2 == 0) + [2] * (step == 5):
            name = f"{adapter}-{step}"
            of[name] = adapter
            params = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
            scheduler.add_request(
                Request(name, [1, 2, 3], params, None, lora_request=LoRARequest(str(adapter), adapter, "absent"))
            )
        output = scheduler.schedule()
        for name in output.num_scheduled_tokens:
            began.setdefault(of[name], step)
        assert len({of[name] for name in output.num_scheduled_tokens}) <= 1
        pending.append(output)
        if len(pending) > config.scheduler_config.async_scheduling:
            finish(pending.pop(0))
    return began


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second passes between two plans."""
    seconds, held = itertools.count(), SlotTurns.held
    monkeypatch.setattr(
        SlotTurns, "held", lambda turns, running, waiting, now: held(turns, running, waiting, float(next(seconds)))
    )


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_vllms_schedulers_pass_over_those_who_must_let_others_have_the_slot(
    asynchronous: bool, family: Family, clock: None
) -> None:
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    config = configured(family, asynchronous=asynchronous, max_wait=10)
    assert issubclass(config.scheduler_config.get_scheduler_cls(), AsyncScheduler) == asynchronous
    began = first_steps(config)
    # Ten seconds pass, and what then runs of the first ends.
    assert began[1] == 0 and 5 + 10 < began[2] <= 5 + 10 + 1 + TOKENS + 2


def test_vllms_own_scheduler_never_comes_to_an_expert_that_finds_no_slot(family: Family) -> None:
    config = configured(family, max_wait=None)
    assert config.scheduler_config.scheduler_cls is None
    assert first_steps(config) == {1: 0}


@pytest.mark.parametrize("wrong", [-1, "2", True])
def test_a_longest_wait_that_is_no_time_is_refused(wrong: Any, family: Family) -> None:
    with pytest.raises(EngineError, match="max_wait must be seconds"):
        configured(family, max_wait=wrong)


def test_an_expert_is_served_while_another_is_asked_without_a_pause(family: Family, tmp_path: Path) -> None:
    """Its tokens, and those of the other, are what they are without turns."""
    adapters = {name: family.artifacts[name] for name in ("alpha", "beta")}
    asked = json.dumps({"meswitch": {"max_wait": 1.0}})
    greedy = Sampling(temperature=0, max_tokens=100, ignore_eos=True)
    # Of different lengths, so that others are under way when one ends.
    busy = [replace(BUSY, sampling=replace(greedy, max_tokens=length)) for length in (100, 89, 83, 71)]
    (late,) = (item for item in requests(family, 4, seed=2) if item.expert == "beta")
    over = threading.Event()

    with PlainServer(family.base, adapters, tmp_path, "--max-loras", "1", "--additional-config", asked) as server:

        def keep_asking(request: GenerationRequest) -> set[tuple[int, ...]]:
            told = set()
            while not over.is_set():
                told.add(server.complete(request))
            return told

        with ThreadPoolExecutor(len(busy)) as pool:
            others = [pool.submit(keep_asking, request) for request in busy]
            try:
                time.sleep(2)
                assert server.complete(late) == family.greedy(late)
                assert not any(item.done() for item in others)
            finally:
                over.set()
            assert [item.result() for item in others] == [{family.greedy(request)} for request in busy]
