"""The choices of one HTTP request on their way through the engine."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

from meswitch_cli.engine.contract import Chunk, GenerationRequest, Sampling
from meswitch_cli.server.errors import ApiError, InvalidValueError
from meswitch_cli.server.record import RequestRecord
from meswitch_cli.server.service import Service


class GenerationGroup:
    """Submitted together, cancelled together. `cancel` must be called in the end; it does no harm to what has ended.

    Attributes:
        id: unique; the engine's requests are named after it.
        expert: who generates.
        prompts: token ids of each prompt; choices of prompt p are p·n to p·n + n - 1.
    """

    def __init__(
        self,
        service: Service,
        record: RequestRecord,
        expert: str,
        prompts: Sequence[tuple[int, ...]],
        samplings: Sequence[Sampling],
        n: int,
    ) -> None:
        self.id = uuid.uuid4().hex
        self.expert, self.prompts, self.n, self.record = expert, prompts, n, record
        self._service = service
        self._loop = asyncio.get_running_loop()
        self._requests = [
            GenerationRequest(
                f"{self.id}-{p * n + i}", expert, prompt, replace(sampling, seed=seed_of(sampling.seed, i))
            )
            for p, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True))
            for i in range(n)
        ]
        self._choices = {request.id: index for index, request in enumerate(self._requests)}
        self._running: set[str] = set()
        #: Chunks, each with its choice and the time at which the engine gave it (`time.perf_counter`).
        self._arrived: asyncio.Queue[tuple[int, Chunk, float]] = asyncio.Queue()
        self._last_token: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self._requests)

    async def submit(self) -> None:
        """Queue every choice, or none.

        Raises:
            EngineError: as the engine's `submit`.
            ApiError: there are more choices than the engine could ever hold, so that waiting would not help.
        """
        most = self._service.engine.max_requests
        if len(self) > most:
            message = f"{len(self)} choices (n times prompts) are more than the {most} that this server holds at once"
            parameter = "n" if self.n > 1 else "prompt"
            raise InvalidValueError(parameter, f"{parameter}: {message}")

        def on_chunk(chunk: Chunk) -> None:
            arrived = (self._choices[chunk.request_id], chunk, time.perf_counter())
            with contextlib.suppress(RuntimeError):  # the server is gone, and its loop with it
                self._loop.call_soon_threadsafe(self._arrived.put_nowait, arrived)

        try:
            for request in self._requests:
                self._running.add(request.id)
                if not request.sampling.constrained:
                    self._service.engine.submit(request, on_chunk)
                else:  # the engine compiles a grammar first, which may take seconds
                    await asyncio.shield(asyncio.to_thread(self._service.engine.submit, request, on_chunk))
        except BaseException:
            self.cancel()
            raise
        self.record.generates = True
        self.record.prompt_tokens = sum(len(prompt) for prompt in self.prompts)

    def cancel(self) -> None:
        """End what still runs; its blocks and slot are freed."""
        for request_id in self._running:
            self._service.engine.cancel(request_id)
        self._running.clear()

    async def chunks(self) -> AsyncIterator[tuple[int, Chunk]]:
        """Every chunk with its choice's index, until all choices have ended.

        Raises:
            ApiError: the engine failed, or was stopped.
        """
        while self._running:
            choice, chunk, now = await self._arrived.get()
            self._observe(choice, chunk, now)
            if chunk.finish_reason is not None:
                self._running.discard(chunk.request_id)
            if chunk.finish_reason == "error":
                self.record.error = chunk.error
                raise ApiError(500, chunk.error or "generation failed", code="generation_failed")
            if chunk.finish_reason == "cancelled":
                self.record.error = "the server stopped before the answer was complete"
                raise ApiError(503, self.record.error, code="shutting_down")
            yield choice, chunk

    def _observe(self, choice: int, chunk: Chunk, now: float) -> None:
        """Keep the record and the metrics of tokens up to date."""
        record, metrics = self.record, self._service.metrics
        if choice % self.n == 0:  # the other choices share the first one's prompt, which is counted once
            record.cached_tokens += chunk.cached_tokens
        if chunk.finish_reason is not None:
            record.finish_reasons.append(chunk.finish_reason)
        count = len(chunk.tokens)
        if not count:
            return
        record.completion_tokens += count
        self._service.tokens += count
        labels = record.labels
        first = choice not in self._last_token
        before = self._last_token.get(choice, record.started)
        self._last_token[choice] = now
        if first:
            metrics.queue.labels(*labels).observe(chunk.queued_seconds)
            if record.first_token is None:
                record.first_token = now - record.started
                metrics.first_token.labels(*labels).observe(record.first_token)
            count -= 1
        for _ in range(count):
            metrics.inter_token.labels(*labels).observe((now - before) / count)


def seed_of(seed: int | None, choice: int) -> int | None:
    """The seed of the n-th choice: the request's own for the first, one derived from it for each other."""
    if seed is None or choice == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}:{choice}".encode()).digest()[:8], "little") >> 1
