"""`POST /v1/completions`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response

from meswitch_cli.engine.contract import Chunk, Tokenizer
from meswitch_cli.server.answer import answer
from meswitch_cli.server.generation_group import GenerationGroup
from meswitch_cli.server.prompts import decode, text_tokens, token_limit
from meswitch_cli.server.record import RequestRecord
from meswitch_cli.server.routing import choose
from meswitch_cli.server.schemas import CompletionRequest, listed
from meswitch_cli.server.service import Service
from meswitch_cli.server.token_text import TokenTexts

#: What OpenAI's API generates where nothing is asked for.
DEFAULT_MAX_TOKENS = 16

endpoints = APIRouter()


@dataclass(frozen=True)
class Echo:
    """A prompt as it is echoed.

    Attributes:
        special: whether the text holds those of special tokens.
    """

    text: str
    tokens: tuple[int, ...]
    special: bool


class CompletionShape:
    """A choice is a text, behind the prompt where that is to be echoed, with its log-probabilities."""

    id_prefix = "cmpl-"
    whole_object = part_object = "text_completion"

    def __init__(self, texts: TokenTexts | None, echoes: Sequence[Echo], n: int) -> None:
        self._texts, self._echoes, self._n = texts, echoes, n
        self._offsets: dict[int, int] = {}

    def whole(self, index: int, chunks: Sequence[Chunk]) -> dict[str, Any]:
        parts = [self.part(index, chunk, chunk is chunks[0]) for chunk in chunks]
        told = [part["logprobs"] for part in parts if part["logprobs"] is not None]
        logprobs = {name: [item for part in told for item in part[name]] for name in told[0]} if told else None
        text = "".join(part["text"] for part in parts)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": chunks[-1].finish_reason}

    def part(self, index: int, chunk: Chunk, first: bool) -> dict[str, Any]:
        echo = self._echoes[index // self._n] if first and self._echoes else None
        text, logprobs = chunk.text, None
        offset = self._offsets.get(index, 0)
        if echo is not None:
            text, offset = echo.text + text, len(echo.text)
        if self._texts:
            logprobs = self._texts.completion(chunk.logprobs, offset)
            self._offsets[index] = offset + sum(len(token) for token in logprobs["tokens"])
            if echo is not None:
                prompt = self._texts.prompt(echo.tokens, chunk.prompt_logprobs, echo.special)
                logprobs = {name: prompt[name] + own for name, own in logprobs.items()}
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": chunk.finish_reason}


def _echo(tokenizer: Tokenizer, prompt: str | list[int], tokens: tuple[int, ...]) -> Echo:
    if isinstance(prompt, str):
        return Echo(prompt, tokens, special=False)
    return Echo(decode(tokenizer, tokens), tokens, special=True)


@endpoints.post("/v1/completions", summary="A continuation of a text", response_model=None)
async def complete(request: Request, body: CompletionRequest) -> Response:
    service, record = Service.of(request), RequestRecord.of(request)
    service.admit()
    n = body.choices(service.settings.max_choices)
    given = listed(body.prompt, service.settings.max_prompts, "prompt")
    record.user, record.hints = body.user, body.hints()
    if service.settings.log_prompts:
        record.prompt = given
    subject = given[0] if len(given) == 1 and isinstance(given[0], str) else None
    choice = record.choice = await choose(service, request, body.model, subject)
    tokenizer = service.engine.tokenizer(choice.expert)
    prompts = [
        await text_tokens(service, choice.expert, prompt) if isinstance(prompt, str) else tuple(prompt)
        for prompt in given
    ]
    limits = [token_limit(service, prompt, body.max_tokens, DEFAULT_MAX_TOKENS, "prompt") for prompt in prompts]
    defaults = service.engine.sampling_defaults(choice.expert)
    samplings = [body.sampling(limit, defaults) for limit in limits]
    echoes = [_echo(tokenizer, prompt, tokens) for prompt, tokens in zip(given, prompts, strict=True) if body.echo]
    texts = TokenTexts(tokenizer) if body.logprobs is not None else None
    group = GenerationGroup(service, record, choice.expert, prompts, samplings, n)
    return await answer(request, body, group, CompletionShape(texts, echoes, n))
