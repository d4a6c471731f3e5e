"""From messages and texts to an expert's own tokens."""

from __future__ import annotations

from collections.abc import Sequence

from meswitch_cli.engine.contract import Tokenizer
from meswitch_cli.server.errors import ApiError, InvalidValueError
from meswitch_cli.server.messages import Conversation
from meswitch_cli.server.service import Service
from meswitch_cli.server.tools import CallSyntax, Tool, for_syntax, syntax_of

_MAX_REASON = 300


def call_syntax(service: Service, expert: str, tools: bool) -> CallSyntax:
    """How the expert's own chat template has its model write calls.

    Raises:
        ApiError: it has no template.
    """
    tokenizer = service.engine.tokenizer(expert)
    if not tokenizer.chat_template:
        message = f"model {expert!r} has no chat template: use /v1/completions"
        raise ApiError(400, message, code="no_chat_template", parameter="model")
    return syntax_of(tokenizer.get_chat_template(tools=[] if tools else None))


async def chat_tokens(
    service: Service,
    expert: str,
    conversation: Conversation,
    add_generation_prompt: bool = True,
    *,
    tools: Sequence[Tool] = (),
    continues: bool = False,
) -> tuple[int, ...]:
    """The tokens of a conversation under the expert's own chat template.

    `continues`, they end within the last message.

    Raises:
        ApiError: it has no template, or its template refuses these messages.
    """
    tokenizer = service.engine.tokenizer(expert)
    messages, told = for_syntax(conversation, tools, call_syntax(service, expert, bool(tools)))

    def render() -> tuple[int, ...]:
        return tuple(
            tokenizer.apply_chat_template(
                messages,
                tools=told,
                add_generation_prompt=add_generation_prompt and not continues,
                continue_final_message=continues,
                tokenize=True,
                return_dict=False,
            )
        )

    try:
        return await service.tokenizing(render)
    except Exception as error:  # a template is a program: whatever it raises, it did not accept these messages
        reason = f"{type(error).__name__}: {error}"[:_MAX_REASON]
        refused = f"the chat template of {expert!r} does not accept these messages"
        raise ApiError(
            400, f"{refused}: {reason}", code="chat_template_error", parameter="messages", logged=refused
        ) from error


async def text_tokens(service: Service, expert: str, text: str, special: bool = True) -> tuple[int, ...]:
    """The tokens of a text, with the special ones that the expert's tokenizer adds by itself."""
    tokenizer = service.engine.tokenizer(expert)
    return tuple(await service.tokenizing(lambda: tokenizer.encode(text, add_special_tokens=special)))


def token_limit(
    service: Service,
    prompt: Sequence[int],
    asked: int | None,
    default: int | None,
    name: str,
    limit_name: str = "max_tokens",
) -> int:
    """How many tokens a choice may have: what was asked for, else `default`, else what the context leaves.

    Raises:
        ApiError: prompt and continuation do not fit the context; `name` is the prompt's parameter, `limit_name` that
            of `asked`.
    """
    room = service.engine.max_model_len - len(prompt)
    if not prompt:
        raise InvalidValueError(name, f"{name}: no tokens")
    if room < 1:
        message = f"{name}: {len(prompt)} tokens; with one for the answer, at most {service.engine.max_model_len} fit"
        raise ApiError(400, message, code="context_length_exceeded", parameter=name)
    if asked is not None and asked > room:
        message = f"{limit_name}: {asked} is too many; after a prompt of {len(prompt)} tokens, {room} fit"
        raise ApiError(400, message, code="context_length_exceeded", parameter=limit_name)
    return asked if asked is not None else min(room, default or room)


def decode(tokenizer: Tokenizer, tokens: Sequence[int], skip_special_tokens: bool = False) -> str:
    """The text of tokens.

    Raises:
        ApiError: one of them is not in the vocabulary.
    """
    try:
        return tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)
    except (OverflowError, IndexError, KeyError, TypeError, ValueError) as error:
        raise InvalidValueError("tokens", "tokens: there is an id that the vocabulary lacks") from error
