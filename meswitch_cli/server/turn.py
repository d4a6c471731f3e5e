"""An assistant's turn in a conversation, whichever API asks for it: who answers, with which tools, and what is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from starlette.requests import Request

from meswitch_cli.engine.contract import Chunk, FinishReason, Sampling, Tokenizer
from meswitch_cli.server.generation_group import GenerationGroup
from meswitch_cli.server.messages import for_template
from meswitch_cli.server.prompts import call_syntax, chat_tokens, token_limit
from meswitch_cli.server.record import RequestRecord
from meswitch_cli.server.routing import choose
from meswitch_cli.server.schemas import ChatRequest
from meswitch_cli.server.service import Service
from meswitch_cli.server.tool_schemas import callable_tools, offered
from meswitch_cli.server.tools import AnswerPart, CallParser, CallSyntax, Tool, ToolChoice, structural_tag

#: Why a turn ended: as the engine has it, or because the model waits for what it has called.
TurnEnd = FinishReason | Literal["tool_calls"]


class Turn:
    """The choices of a turn on their way, each taken apart as it comes.

    Attributes:
        expert: who answers.
        sampling: how, the model's own defaults included.
    """

    def __init__(self, group: GenerationGroup, sampling: Sampling, parsers: Sequence[CallParser]) -> None:
        self.group, self.expert, self.sampling = group, group.expert, sampling
        self._parsers = parsers

    def read(self, choice: int, chunk: Chunk) -> list[AnswerPart]:
        """Text and calls that a chunk completes."""
        if not self._parsers:
            return [chunk.text] if chunk.text else []
        parser = self._parsers[choice]
        parts = parser.push(chunk.text)
        return parts + parser.finish() if chunk.finish_reason is not None else parts

    def calling(self, choice: int) -> bool:
        """Whether the choice has begun to call."""
        return bool(self._parsers) and self._parsers[choice].calls > 0

    def end(self, choice: int, chunk: Chunk) -> TurnEnd | None:
        """Why the choice ended, None while it goes on."""
        return "tool_calls" if self.calling(choice) and chunk.finish_reason == "stop" else chunk.finish_reason


@dataclass(frozen=True)
class TurnPrompt:
    """What a conversation becomes for the one who answers it."""

    expert: str
    tokens: tuple[int, ...]
    syntax: CallSyntax
    tools: Sequence[Tool]
    choice: ToolChoice


async def turn_prompt(request: Request, body: ChatRequest) -> TurnPrompt:
    """Choose who answers, and write the conversation in their template.

    Raises:
        ApiError: nobody can answer it.
    """
    service, record = Service.of(request), RequestRecord.of(request)
    conversation, continues = for_template(body.messages), body.continues()
    tools, tool_choice = callable_tools(offered(body.tools or ()), body.tool_choice)
    record.user, record.hints = body.user, body.hints()
    if service.settings.log_prompts:
        record.prompt = conversation
    choice = record.choice = await choose(service, request, body.model, conversation)
    told = tools if tool_choice != "none" else ()
    generates = body.add_generation_prompt is not False
    tokens = await chat_tokens(service, choice.expert, conversation, generates, tools=told, continues=continues)
    return TurnPrompt(choice.expert, tokens, call_syntax(service, choice.expert, bool(told)), tools, tool_choice)


async def begin_turn(request: Request, body: ChatRequest, limit_name: str = "max_tokens") -> Turn:
    """Choose who answers and prepare the generation, which `Turn.group` submits.

    Raises:
        ApiError: the request cannot be honoured; `limit_name` is what its API calls the most tokens.
    """
    service, record = Service.of(request), RequestRecord.of(request)
    service.admit()
    n, asked = body.choices(service.settings.max_choices), body.token_limit()
    prompt = await turn_prompt(request, body)
    limit = token_limit(service, prompt.tokens, asked, None, "messages", limit_name)
    sampling = body.sampling(limit, service.engine.sampling_defaults(prompt.expert))
    if prompt.tools:
        sampling = with_tools(sampling, body, prompt, service.engine.tokenizer(prompt.expert))
    group = GenerationGroup(service, record, prompt.expert, [prompt.tokens], [sampling], n)
    reads_calls = prompt.tools and prompt.choice != "none"
    names = [tool.name for tool in prompt.tools]
    return Turn(group, sampling, [CallParser(prompt.syntax, names) for _ in range(n)] if reads_calls else [])


def with_tools(sampling: Sampling, body: ChatRequest, prompt: TurnPrompt, tokenizer: Tokenizer) -> Sampling:
    """Sampling under the grammar of an answer with calls."""
    tag = structural_tag(
        prompt.syntax,
        prompt.tools,
        prompt.choice,
        several=body.parallel_tool_calls is not False,
        text=body.schema_of_text(),
    )
    markers = [tokenizer.encode(marker, add_special_tokens=False) for marker in prompt.syntax.markers]
    shown = [tokens[0] for tokens in markers if len(tokens) == 1]
    hidden = tuple(token for token in shown if not tokenizer.decode([token], skip_special_tokens=True))
    return replace(sampling, json_schema=None, json_object=False, structural_tag=tag, shown_tokens=hidden)
