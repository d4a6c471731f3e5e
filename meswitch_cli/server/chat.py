"""`POST /v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from meswitch_cli.engine.contract import Chunk, TokenLogprob
from meswitch_cli.server.answer import answer
from meswitch_cli.server.schemas import ChatRequest
from meswitch_cli.server.service import Service
from meswitch_cli.server.token_text import TokenTexts
from meswitch_cli.server.tools import AnswerPart, CallPart
from meswitch_cli.server.turn import Turn, begin_turn

endpoints = APIRouter()


class ChatShape:
    """A choice is a message; a part of one, a delta of it."""

    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    part_object = "chat.completion.chunk"

    def __init__(self, turn: Turn, texts: TokenTexts | None) -> None:
        self._turn, self._texts = turn, texts

    def whole(self, index: int, chunks: Sequence[Chunk]) -> dict[str, Any]:
        parts = [part for chunk in chunks for part in self._turn.read(index, chunk)]
        text = "".join(part for part in parts if isinstance(part, str))
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls := whole_calls(parts):
            message |= {"content": text or None, "tool_calls": calls}
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs([item for chunk in chunks for item in chunk.logprobs]),
            "finish_reason": self._turn.end(index, chunks[-1]),
        }

    def part(self, index: int, chunk: Chunk, first: bool) -> dict[str, Any]:
        parts = self._turn.read(index, chunk)
        text = "".join(part for part in parts if isinstance(part, str))
        calls = [_call_delta(part) for part in parts if isinstance(part, CallPart) and (part.name or part.arguments)]
        delta: dict[str, Any] = {"role": "assistant"} if first else {}
        if text or not (calls or self._turn.calling(index)):
            delta["content"] = text
        if calls:
            delta["tool_calls"] = calls
        return {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs(chunk.logprobs),
            "finish_reason": self._turn.end(index, chunk),
        }

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if self._texts is None:
            return None
        return {"content": [self._texts.chat(logprob) for logprob in logprobs], "refusal": None}


def whole_calls(parts: Sequence[AnswerPart]) -> list[dict[str, Any]]:
    """The calls that these parts make, as a message has them."""
    calls: list[dict[str, Any]] = []
    for part in parts:
        if isinstance(part, str):
            continue
        if part.name is not None:
            calls.append({"id": part.id, "type": "function", "function": {"name": part.name, "arguments": ""}})
        calls[-1]["function"]["arguments"] += part.arguments
    return calls


def _call_delta(part: CallPart) -> dict[str, Any]:
    function = {"arguments": part.arguments}
    if part.name is None:
        return {"index": part.index, "function": function}
    return {"index": part.index, "id": part.id, "type": "function", "function": {"name": part.name} | function}


@endpoints.post("/v1/chat/completions", summary="An answer to a conversation", response_model=None)
async def chat(request: Request, body: ChatRequest) -> Response:
    turn = await begin_turn(request, body)
    texts = TokenTexts(Service.of(request).engine.tokenizer(turn.expert)) if body.logprobs else None
    return await answer(request, body, turn.group, ChatShape(turn, texts))
