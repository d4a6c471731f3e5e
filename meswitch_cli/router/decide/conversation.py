"""From a prompt or a conversation to the text that is routed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

#: A newest turn of this many characters (about 32 tokens) speaks for itself; a shorter one ("and the second?") is
#: read with what was said before it.
SHORT_TURN_CHARACTERS = 128
#: How much of what was said before is read with a short turn: enough to tell the subject, little enough that the
#: turn itself still counts in a mean over tokens.
HISTORY_CHARACTERS = 256

Prompt = str | Sequence[Mapping[str, Any]]


def routing_text(prompt: Prompt) -> str:
    """The newest user turn, after what was said before it where it is short; empty where there is no text of a user."""
    return next(reversed(routing_texts(prompt)), "")


def routing_texts(prompt: Prompt) -> tuple[str, ...]:
    """The texts to route: the newest user turn and, where it is short and not the first, that turn after earlier ones.

    A short turn may be a new subject or need the old one: who decides asks of the turn alone first. System and tool
    turns say what the application is, not what is asked, and are dropped. None where there is no user turn with text.
    """
    if isinstance(prompt, str):
        text = prompt.strip()
        return (text,) if text else ()
    turns = [(str(turn.get("role")), message_text(turn.get("content"))) for turn in prompt]
    turns = [(role, text) for role, text in turns if role in ("user", "assistant") and text]
    newest = max((index for index, (role, _) in enumerate(turns) if role == "user"), default=None)
    if newest is None:
        return ()
    text = turns[newest][1]
    if len(text) >= SHORT_TURN_CHARACTERS:
        return (text,)
    history = "\n\n".join(earlier for _, earlier in turns[:newest])[-HISTORY_CHARACTERS:]
    return (text, f"{history}\n\n{text}") if history else (text,)


def has_open_tool_call(prompt: Prompt) -> bool:
    """Whether the conversation stands in the middle of a tool call: the expert who made it is to read the result."""
    if isinstance(prompt, str) or not prompt:
        return False
    newest = prompt[-1]
    return newest.get("role") == "tool" or (newest.get("role") == "assistant" and bool(newest.get("tool_calls")))


def cached_characters(prompt: Prompt) -> int:
    """About how much of a conversation an expert has in its cache: all that came before the newest turn."""
    return 0 if isinstance(prompt, str) else sum(len(message_text(turn.get("content"))) for turn in prompt[:-1])


def message_text(content: Any) -> str:
    """The text of a message's content: a string, or a list of parts of which the text parts are joined."""
    if isinstance(content, str):
        return content.strip()
    if isinstance(content, Sequence):
        parts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
        return "\n".join(part for part in parts if isinstance(part, str)).strip()
    return ""


def is_binary(text: str) -> bool:
    """Whether it is no text: lone surrogates, NUL, or more than a tenth of it control and replacement characters."""
    sample = text[:4096]
    odd = sum(
        1 for character in sample if (ord(character) < 32 and character not in "\t\n\r\f") or character == "\ufffd"
    )
    return "\0" in sample or odd > len(sample) / 10 or any(0xD800 <= ord(character) < 0xE000 for character in text)


def clip_characters(text: str, budget_tokens: int) -> str:
    """Drop the middle of a text that is certainly longer than the budget, so that tokenizing it costs little.

    Sixteen characters a token leave every text alone that a tokenizer could fit into the budget.
    """
    half = 8 * budget_tokens
    return text if len(text) <= 2 * half else text[:half] + text[-half:]


def clip_tokens(token_ids: Sequence[int], budget: int) -> list[int]:
    """The first and the last half of the budget: a task is mostly stated at the start or at the end."""
    if len(token_ids) <= budget:
        return list(token_ids)
    return [*token_ids[: budget - budget // 2], *token_ids[len(token_ids) - budget // 2 :]]
