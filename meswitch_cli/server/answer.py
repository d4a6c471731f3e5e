"""Answers of both endpoints, streamed and whole; chat and text completions differ in the shape of a choice."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from meswitch_cli.engine.contract import Chunk
from meswitch_cli.server.context import CLIENT_GONE
from meswitch_cli.server.generation_group import GenerationGroup
from meswitch_cli.server.record import RequestRecord
from meswitch_cli.server.schemas import GenerationParameters
from meswitch_cli.server.service import Service
from meswitch_cli.server.streaming import ClientGone, EventStream, unless_gone
from meswitch_cli.server.token_text import dumps, system_fingerprint


class Shape(Protocol):
    """How a choice looks in one of the two endpoints."""

    id_prefix: str
    whole_object: str
    part_object: str

    def whole(self, index: int, chunks: Sequence[Chunk]) -> dict[str, Any]:
        """A complete choice."""

    def part(self, index: int, chunk: Chunk, first: bool) -> dict[str, Any]:
        """What a chunk adds to a choice."""


async def answer(request: Request, body: GenerationParameters, group: GenerationGroup, shape: Shape) -> Response:
    """Submit the choices of a request and answer with them.

    Raises:
        EngineError, ApiError: it was refused, or failed before anything was sent.
    """
    token_ids = bool(body.return_token_ids)
    head = {
        "id": shape.id_prefix + group.id,
        "object": shape.part_object if body.stream else shape.whole_object,
        "created": int(time.time()),
        "model": group.expert,
        "system_fingerprint": system_fingerprint(Service.of(request).engine.digest(group.expert)),
    }
    await group.submit()
    if body.stream:
        events = _events(head, group, shape, body, token_ids)
        return EventStream(events, group.cancel, Service.of(request).settings.keep_alive_seconds)
    collected = await collect(request, group)
    if collected is None:
        return Response(status_code=CLIENT_GONE)
    choices = [shape.whole(index, chunks) for index, chunks in enumerate(collected)]
    if token_ids:
        for choice, chunks in zip(choices, collected, strict=True):
            choice["token_ids"] = [token for chunk in chunks for token in chunk.tokens]
    return Response(dumps(head | {"choices": choices, "usage": _usage(group.record)}), media_type="application/json")


async def collect(request: Request, group: GenerationGroup) -> Sequence[Sequence[Chunk]] | None:
    """The chunks of every choice of a group that has been submitted; None where the client has left."""
    try:
        return await unless_gone(request.receive, _collect(group))
    except ClientGone:
        return None
    finally:
        group.cancel()


async def _collect(group: GenerationGroup) -> Sequence[Sequence[Chunk]]:
    choices: list[list[Chunk]] = [[] for _ in range(len(group))]
    async for index, chunk in group.chunks():
        choices[index].append(chunk)
    return choices


async def _events(
    head: dict[str, Any], group: GenerationGroup, shape: Shape, body: GenerationParameters, token_ids: bool
) -> AsyncIterator[dict[str, Any]]:
    begun: set[int] = set()
    include_usage = body.include_usage()
    async for index, chunk in group.chunks():
        choice = shape.part(index, chunk, index not in begun)
        begun.add(index)
        if token_ids:
            choice["token_ids"] = list(chunk.tokens)
        usage = _usage(group.record) if body.continuous_usage() else None
        yield head | {"choices": [choice]} | ({"usage": usage} if include_usage else {})
    if include_usage:
        yield head | {"choices": [], "usage": _usage(group.record)}


def _usage(record: RequestRecord) -> dict[str, Any]:
    return {
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.completion_tokens,
        "total_tokens": record.prompt_tokens + record.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": record.cached_tokens},
    }
