"""Answers of both endpoints, streamed and whole; chat and text completions differ in the shape of a choice."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from meswitch_cli.engine.contract import Chunk, FinishReason, TokenLogprob
from meswitch_cli.server.generation import Generation
from meswitch_cli.server.record import RequestRecord
from meswitch_cli.server.service import Service
from meswitch_cli.server.streaming import ClientGone, EventStream, unless_gone
from meswitch_cli.server.token_text import dumps, system_fingerprint


@dataclass
class Collected:
    """What has come of a choice."""

    text: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, chunk: Chunk) -> None:
        self.text.append(chunk.text)
        self.tokens += chunk.tokens
        self.logprobs += chunk.logprobs
        self.finish_reason = chunk.finish_reason


class Shape(Protocol):
    """How a choice looks in one of the two endpoints."""

    id_prefix: str
    whole_object: str
    part_object: str

    def whole(self, index: int, collected: Collected) -> dict[str, Any]:
        """A complete choice."""

    def part(self, index: int, chunk: Chunk, first: bool) -> dict[str, Any]:
        """What a chunk adds to a choice."""


async def answer(
    service: Service,
    request: Request,
    generation: Generation,
    shape: Shape,
    *,
    stream: bool,
    include_usage: bool,
    token_ids: bool,
) -> Response:
    """Submit a generation and answer with it.

    Raises:
        EngineError, ApiError: it was refused, or failed before anything was sent.
    """
    record = RequestRecord.of(request)
    expert = service.experts().get(record.expert)
    head = {
        "id": shape.id_prefix + generation.id,
        "object": shape.part_object if stream else shape.whole_object,
        "created": int(time.time()),
        "model": record.expert,
        "system_fingerprint": system_fingerprint(expert.digest if expert else None),
    }
    await generation.submit()
    if stream:
        events = _events(head, generation, shape, include_usage, token_ids)
        return EventStream(events, at_end=generation.cancel)
    try:
        collected = await unless_gone(request.receive, _collect(generation))
    except ClientGone:
        return Response(status_code=499)
    finally:
        generation.cancel()
    choices = [shape.whole(index, one) for index, one in enumerate(collected)]
    if token_ids:
        for choice, one in zip(choices, collected, strict=True):
            choice["token_ids"] = one.tokens
    return Response(dumps(head | {"choices": choices, "usage": _usage(record)}), media_type="application/json")


async def _collect(generation: Generation) -> Sequence[Collected]:
    choices = [Collected() for _ in range(len(generation))]
    async for index, chunk in generation.chunks():
        choices[index].add(chunk)
    return choices


async def _events(
    head: dict[str, Any], generation: Generation, shape: Shape, include_usage: bool, token_ids: bool
) -> AsyncIterator[dict[str, Any]]:
    begun: set[int] = set()
    usage = {"usage": None} if include_usage else {}
    async for index, chunk in generation.chunks():
        choice = shape.part(index, chunk, index not in begun)
        begun.add(index)
        if token_ids:
            choice["token_ids"] = list(chunk.tokens)
        yield head | {"choices": [choice]} | usage
    if include_usage:
        yield head | {"choices": [], "usage": _usage(generation.record)}


def _usage(record: RequestRecord) -> dict[str, Any]:
    return {
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.completion_tokens,
        "total_tokens": record.prompt_tokens + record.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": record.cached_tokens},
    }
