"""`POST /v1/chat/completions`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from meswitch_cli.engine.contract import Chunk
from meswitch_cli.server.answer import Collected, answer
from meswitch_cli.server.generation_group import GenerationGroup
from meswitch_cli.server.prompts import chat_tokens, token_limit
from meswitch_cli.server.record import RequestRecord
from meswitch_cli.server.routing import choose
from meswitch_cli.server.schemas import ChatRequest, for_template
from meswitch_cli.server.service import Service
from meswitch_cli.server.token_text import TokenTexts

endpoints = APIRouter()


class ChatShape:
    """A choice is a message; a part of one, a delta of it."""

    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    part_object = "chat.completion.chunk"

    def __init__(self, texts: TokenTexts | None) -> None:
        self._texts = texts

    def whole(self, index: int, collected: Collected) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": "".join(collected.text), "refusal": None},
            "logprobs": self._logprobs(collected),
            "finish_reason": collected.finish_reason,
        }

    def part(self, index: int, chunk: Chunk, first: bool) -> dict[str, Any]:
        delta = {"role": "assistant", "content": chunk.text} if first else {"content": chunk.text}
        return {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs(chunk),
            "finish_reason": chunk.finish_reason,
        }

    def _logprobs(self, part: Collected | Chunk) -> dict[str, Any] | None:
        if self._texts is None:
            return None
        return {"content": [self._texts.chat(logprob) for logprob in part.logprobs], "refusal": None}


@endpoints.post("/v1/chat/completions", summary="An answer to a conversation", response_model=None)
async def chat(request: Request, body: ChatRequest) -> Response:
    service, record = Service.of(request), RequestRecord.of(request)
    service.admit()
    n, asked = body.choices(service.settings.max_choices), body.token_limit()
    conversation = for_template(body.messages)
    record.user = body.user
    if service.settings.log_prompts:
        record.prompt = conversation
    choice = record.choice = await choose(service, request, body.model, conversation)
    prompt = await chat_tokens(service, choice.expert, conversation)
    sampling = body.sampling(token_limit(service, prompt, asked, None, "messages"))
    texts = TokenTexts(service.engine.tokenizer(choice.expert)) if body.logprobs else None
    group = GenerationGroup(service, record, choice.expert, [prompt], [sampling], n)
    return await answer(request, body, group, ChatShape(texts))
