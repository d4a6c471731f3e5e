"""Requests that are submitted one by one, and what comes back of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from patience import PATIENCE

from meswitch_cli.engine import Completion, TransformersEngine
from meswitch_cli.engine.contract import (
    Chunk,
    GenerationRequest,
    Sampling,
)
from meswitch_cli.engine.generate import join_chunks

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
