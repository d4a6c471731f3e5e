"""`POST /v1/messages` and `/v1/messages/count_tokens`: a turn in the form of Anthropic's API."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

from fastapi import APIRouter, Request, Response

from meswitch_cli.engine.contract import Chunk
from meswitch_cli.server.answer import collect
from meswitch_cli.server.anthropic_schemas import CountRequest, MessagesRequest
from meswitch_cli.server.context import CLIENT_GONE
from meswitch_cli.server.errors import anthropic_envelope
from meswitch_cli.server.record import RequestRecord
from meswitch_cli.server.service import Service
from meswitch_cli.server.streaming import Dialect, EventStream, named
from meswitch_cli.server.token_text import dumps
from meswitch_cli.server.turn import Turn, begin_turn, turn_prompt
from meswitch_cli.server.turn_items import ItemChange, TurnItem, TurnItems

endpoints = APIRouter()

_ANTHROPIC = Dialect(named, anthropic_envelope)


def _head(turn: Turn) -> dict[str, Any]:
    return {"id": f"msg_{turn.group.id}", "type": "message", "role": "assistant", "model": turn.expert}


def _stop(turn: Turn, last: Chunk) -> dict[str, Any]:
    """Why a turn ended, in Anthropic's words."""
    end = turn.end(0, last)
    if isinstance(last.stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": last.stop_reason}
    reason = {"length": "max_tokens", "tool_calls": "tool_use"}.get(str(end), "end_turn")
    return {"stop_reason": reason, "stop_sequence": None}


def _usage(record: RequestRecord) -> dict[str, Any]:
    return {
        "input_tokens": record.prompt_tokens - record.cached_tokens,
        "cache_read_input_tokens": record.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": record.completion_tokens,
    }


def _block(item: TurnItem) -> dict[str, Any]:
    if item.name is None:
        return {"type": "text", "text": item.text}
    return {"type": "tool_use", "id": item.call_id, "name": item.name, "input": json.loads(item.text)}


def _changes(change: ItemChange) -> Iterator[dict[str, Any]]:
    """The events of what happens to a block."""
    item, index = change.item, change.item.index
    if change.kind == "begin":
        begun = TurnItem(index, item.call_id, item.name, "" if item.name is None else "{}")
        yield {"type": "content_block_start", "index": index, "content_block": _block(begun)}
    elif change.kind == "text":
        call = item.name is not None
        delta = {"type": "input_json_delta", "partial_json": change.text}
        yield {
            "type": "content_block_delta",
            "index": index,
            "delta": delta if call else {"type": "text_delta", "text": change.text},
        }
    else:
        yield {"type": "content_block_stop", "index": index}


async def _events(turn: Turn, record: RequestRecord) -> AsyncIterator[dict[str, Any]]:
    begun: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None, "usage": _usage(record)}
    yield {"type": "message_start", "message": _head(turn) | begun}
    items, last = TurnItems(), Chunk("", "")
    async for choice, chunk in turn.group.chunks():
        for change in items.push(turn.read(choice, chunk)):
            for event in _changes(change):
                yield event
        last = chunk
    for change in items.finish(cut=last.finish_reason == "length"):
        for event in _changes(change):
            yield event
    yield {"type": "message_delta", "delta": _stop(turn, last), "usage": _usage(record)}
    yield {"type": "message_stop"}


@endpoints.post("/v1/messages", summary="An answer in the form of Anthropic's API", response_model=None)
async def messages(request: Request, body: MessagesRequest) -> Response:
    turn = await begin_turn(request, body.generation())
    record = RequestRecord.of(request)
    await turn.group.submit()
    if body.stream:
        keep_alive = Service.of(request).settings.keep_alive_seconds
        return EventStream(_events(turn, record), turn.group.cancel, keep_alive, _ANTHROPIC)
    collected = await collect(request, turn.group)
    if collected is None:
        return Response(status_code=CLIENT_GONE)
    items, chunks = TurnItems(), collected[0]
    for chunk in chunks:
        for _ in items.push(turn.read(0, chunk)):
            pass
    for _ in items.finish(cut=chunks[-1].finish_reason == "length"):
        pass
    # Of a call that was cut off there is no input to tell.
    content = [_block(item) for item in items.items if item.complete or item.name is None]
    told = _head(turn) | {"content": content} | _stop(turn, chunks[-1]) | {"usage": _usage(record)}
    return Response(dumps(told), media_type="application/json")


@endpoints.post("/v1/messages/count_tokens", summary="How many tokens a conversation has, as Anthropic's API says it")
async def count_tokens(request: Request, body: CountRequest) -> dict[str, int]:
    prompt = await turn_prompt(request, body.chat())
    return {"input_tokens": len(prompt.tokens)}
