"""Generation in the calling process, all at once."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from meswitch_cli.engine.contract import Chunk, Engine, FinishReason, GenerationRequest, TokenLogprob


@dataclass(frozen=True)
class Completion:
    """A finished request."""

    request_id: str
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason
    stop_reason: str | int | None
    cached_tokens: int
    error: str | None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


def generate(engine: Engine, requests: Sequence[GenerationRequest]) -> list[Completion]:
    """Submit requests together and wait for all; the results are in their order.

    Raises:
        EngineError: as `Engine.submit`; those submitted before are cancelled.
    """
    chunks: dict[str, list[Chunk]] = {request.id: [] for request in requests}
    left = threading.Semaphore(0)

    def on_chunk(chunk: Chunk) -> None:
        chunks[chunk.request_id].append(chunk)
        if chunk.finish_reason is not None:
            left.release()

    submitted: list[str] = []
    try:
        for request in requests:
            engine.submit(request, on_chunk)
            submitted.append(request.id)
        for _ in requests:
            left.acquire()
    except BaseException:
        for request_id in submitted:
            engine.cancel(request_id)
        raise
    return [join_chunks(chunks[request.id]) for request in requests]


def join_chunks(chunks: Sequence[Chunk]) -> Completion:
    """What the chunks of a finished request say together."""
    last = chunks[-1]
    if last.finish_reason is None:
        raise ValueError(f"request {last.request_id} has not finished")
    return Completion(
        last.request_id,
        "".join(chunk.text for chunk in chunks),
        tuple(token for chunk in chunks for token in chunk.tokens),
        tuple(item for chunk in chunks for item in chunk.logprobs),
        last.finish_reason,
        last.stop_reason,
        chunks[0].cached_tokens,
        last.error,
        chunks[0].prompt_logprobs,
    )
