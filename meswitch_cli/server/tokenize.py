"""`POST /tokenize` and `POST /detokenize`, with the tokenizer of the named expert."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from meswitch_cli.names import AUTO, BASE
from meswitch_cli.server.errors import InvalidValueError
from meswitch_cli.server.messages import for_template
from meswitch_cli.server.prompts import chat_tokens, decode, text_tokens
from meswitch_cli.server.record import RequestRecord
from meswitch_cli.server.routing import choose
from meswitch_cli.server.schemas import DetokenizeRequest, TokenizeRequest
from meswitch_cli.server.service import Service

endpoints = APIRouter()


@endpoints.post("/tokenize", summary="The tokens of a text or a conversation")
async def tokenize(request: Request, body: TokenizeRequest) -> dict[str, Any]:
    service = Service.of(request)
    expert = await _named(service, request, body.model)
    if (body.messages is None) == (body.prompt is None):
        raise InvalidValueError("prompt", "give prompt or messages, one of them")
    if body.messages is not None:
        tokens = await chat_tokens(service, expert, for_template(body.messages), body.add_generation_prompt)
    else:
        tokens = await text_tokens(service, expert, body.prompt or "", body.add_special_tokens)
    return {"model": expert, "tokens": tokens, "count": len(tokens), "max_model_len": service.engine.max_model_len}


@endpoints.post("/detokenize", summary="The text of tokens")
async def detokenize(request: Request, body: DetokenizeRequest) -> dict[str, Any]:
    service = Service.of(request)
    expert = await _named(service, request, body.model)
    tokenizer = service.engine.tokenizer(expert)
    if None in await service.tokenizing(lambda: tokenizer.convert_ids_to_tokens(body.tokens)):
        raise InvalidValueError("tokens", "tokens: there is an id that the vocabulary lacks")
    text = await service.tokenizing(lambda: decode(tokenizer, body.tokens, body.skip_special_tokens))
    return {"model": expert, "prompt": text}


async def _named(service: Service, request: Request, model: str) -> str:
    if model == AUTO:
        raise InvalidValueError("model", f"each expert has its own tokenizer: name one, or {BASE!r}")
    choice = RequestRecord.of(request).choice = await choose(service, request, model, None)
    return choice.expert
