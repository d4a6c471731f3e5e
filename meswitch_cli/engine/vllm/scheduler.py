"""vLLM's schedulers, with turns for adapters that are more than the slots."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Set
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from meswitch_cli.engine.vllm.names import WorkerConfig
from meswitch_cli.engine.vllm.turns import SlotTurns


class _Turns:
    """Goes before a scheduler of vLLM's, and has it pass over requests as over those that are not ready yet.

    Where users set priorities, those decide.
    """

    lora_config: Any
    vllm_config: Any
    policy: Any
    running: Iterable[Any]
    waiting: Iterable[Any]
    kv_holding_waiting: Iterable[Any]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        max_wait = WorkerConfig.of(self.vllm_config.additional_config).max_wait
        self._turns = SlotTurns(self.lora_config.max_loras, math.inf if max_wait is None else max_wait)
        self._held: Set[int] = frozenset()

    def schedule(self, *arguments: Any, **options: Any) -> Any:
        if self.policy == SchedulingPolicy.FCFS:
            ready = (
                request
                for request in itertools.chain(self.kv_holding_waiting, self.waiting)
                if request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED)
            )
            self._held = self._turns.held(_adapters(self.running), _adapters(ready), time.monotonic())
        return super().schedule(*arguments, **options)  # type: ignore[misc]

    def _handle_blocked_waiting_request(self, request: Any) -> bool:
        ready: bool = super()._handle_blocked_waiting_request(request)  # type: ignore[misc]
        return ready and not (request.lora_request and request.lora_request.lora_int_id in self._held)


class TurnsScheduler(_Turns, Scheduler):  # type: ignore[misc]
    """vLLM's scheduler that plans a batch when the one before it has ended."""


class AsyncTurnsScheduler(_Turns, AsyncScheduler):  # type: ignore[misc]
    """vLLM's scheduler that plans a batch while the one before it runs."""


def _adapters(requests: Iterable[Any]) -> Set[int]:
    return {request.lora_request.lora_int_id for request in requests if request.lora_request}
