"""`POST /v1/responses`: a turn in the form of OpenAI's newer API, without its memory."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from fastapi import APIRouter, Request, Response

from meswitch_cli.server.answer import collect
from meswitch_cli.server.context import CLIENT_GONE
from meswitch_cli.server.errors import ApiError, envelope
from meswitch_cli.server.record import RequestRecord
from meswitch_cli.server.response_schemas import ResponseRequest
from meswitch_cli.server.service import Service
from meswitch_cli.server.streaming import Dialect, EventStream, named
from meswitch_cli.server.token_text import dumps
from meswitch_cli.server.turn import Turn, TurnEnd, begin_turn
from meswitch_cli.server.turn_items import ItemChange, TurnItem, TurnItems

endpoints = APIRouter()


class ResponseBody:
    """The object that a response is, as far as it has come."""

    def __init__(self, body: ResponseRequest, turn: Turn, record: RequestRecord) -> None:
        self._record = record
        self.items = TurnItems()
        sampling = turn.sampling
        given = body.model_dump(exclude_none=True, by_alias=True)
        self._head = {
            "id": f"resp_{turn.group.id}",
            "object": "response",
            "created_at": int(time.time()),
            "model": turn.expert,
            "error": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": sampling.temperature,
            "text": {"format": {"type": "text"}} | given.get("text", {}),
            "tool_choice": given.get("tool_choice", "auto"),
            "tools": [{"description": None, "strict": False} | tool for tool in given.get("tools", ())],
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "user": body.user,
        }

    def told(self, end: TurnEnd | None) -> dict[str, Any]:
        """The response; `end` is why it ended, None while it goes on."""
        if end is None:
            return self._head | {"status": "in_progress", "incomplete_details": None, "output": [], "usage": None}
        cut = end == "length"
        return self._head | {
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": [_item(item) for item in self.items.items],
            "usage": _usage(self._record),
        }


def _item(item: TurnItem, status: str | None = None) -> dict[str, Any]:
    status = status or ("completed" if item.complete else "incomplete")
    if item.name is not None:
        head = {"type": "function_call", "id": f"fc_{item.id}", "status": status}
        return head | {"call_id": item.call_id, "name": item.name, "arguments": item.text}
    content = [] if status == "in_progress" else [_text(item.text)]
    return {"type": "message", "id": f"msg_{item.id}", "status": status, "role": "assistant", "content": content}


def _text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(record: RequestRecord) -> dict[str, Any]:
    return {
        "input_tokens": record.prompt_tokens,
        "input_tokens_details": {"cached_tokens": record.cached_tokens},
        "output_tokens": record.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": record.prompt_tokens + record.completion_tokens,
    }


class EventWriter:
    """Gives the events of a stream their numbers."""

    def __init__(self) -> None:
        self._number = -1

    def event(self, kind: str, **members: Any) -> dict[str, Any]:
        self._number += 1
        return {"type": kind, "sequence_number": self._number} | members

    def failure(self, error: ApiError) -> dict[str, Any]:
        told = envelope(error.status, str(error), error.code, error.parameter)["error"]
        return self.event("error", **{name: told[name] for name in ("code", "message", "param")})

    def changes(self, change: ItemChange) -> Iterator[dict[str, Any]]:
        """The events of what happens to an item."""
        item = change.item
        call = item.name is not None
        place: dict[str, Any] = {"output_index": item.index}
        inner = place | {"item_id": _item(item)["id"]} | ({} if call else {"content_index": 0})
        if change.kind == "begin":
            yield self.event("response.output_item.added", **place, item=_item(item, "in_progress"))
            if not call:
                yield self.event("response.content_part.added", **inner, part=_text(""))
        elif change.kind == "text" and call:
            yield self.event("response.function_call_arguments.delta", **inner, delta=change.text)
        elif change.kind == "text":
            yield self.event("response.output_text.delta", **inner, delta=change.text, logprobs=[])
        else:
            if call:
                done = {"name": item.name, "arguments": item.text}
                yield self.event("response.function_call_arguments.done", **inner, **done)
            else:
                yield self.event("response.output_text.done", **inner, text=item.text, logprobs=[])
                yield self.event("response.content_part.done", **inner, part=_text(item.text))
            yield self.event("response.output_item.done", **place, item=_item(item))


async def _events(turn: Turn, told: ResponseBody, writer: EventWriter) -> AsyncIterator[dict[str, Any]]:
    yield writer.event("response.created", response=told.told(None))
    yield writer.event("response.in_progress", response=told.told(None))
    end: TurnEnd | None = None
    async for choice, chunk in turn.group.chunks():
        for change in told.items.push(turn.read(choice, chunk)):
            for event in writer.changes(change):
                yield event
        end = turn.end(choice, chunk)
    for change in told.items.finish(cut=end == "length"):
        for event in writer.changes(change):
            yield event
    kind = "response.incomplete" if end == "length" else "response.completed"
    yield writer.event(kind, response=told.told(end))


@endpoints.post("/v1/responses", summary="An answer in the form of the Responses API", response_model=None)
async def respond(request: Request, body: ResponseRequest) -> Response:
    turn = await begin_turn(request, body.chat(), "max_output_tokens")
    told, writer = ResponseBody(body, turn, RequestRecord.of(request)), EventWriter()
    await turn.group.submit()
    if body.stream:
        keep_alive = Service.of(request).settings.keep_alive_seconds
        dialect = Dialect(named, writer.failure)
        return EventStream(_events(turn, told, writer), turn.group.cancel, keep_alive, dialect)
    collected = await collect(request, turn.group)
    if collected is None:
        return Response(status_code=CLIENT_GONE)
    for chunk in collected[0]:
        for _ in told.items.push(turn.read(0, chunk)):
            pass
    end = turn.end(0, collected[0][-1])
    for _ in told.items.finish(cut=end == "length"):
        pass
    return Response(dumps(told.told(end)), media_type="application/json")
