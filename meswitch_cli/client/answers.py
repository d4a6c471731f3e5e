"""What a streamed chat completion says, whichever server streams it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from meswitch_cli.client.events import EventDecoder
from meswitch_cli.errors import MeswitchError

_END = "[DONE]"
#: Members of a delta that a model's tokens end up in: some servers name a model's thinking in one of two ways.
_GENERATED = ("content", "reasoning_content", "reasoning", "refusal", "tool_calls")


class FailedAnswerError(MeswitchError):
    """The server says in the middle of an answer that it failed."""


@dataclass(frozen=True)
class Progress:
    """What an event tells.

    Attributes:
        text: of the answer, empty where the event brings none.
        generated: whether it brings tokens: text, thinking or calls.
        ended: whether a choice ended with it.
        model: who answers, as the server says.
        prompt_tokens, completion_tokens: of the usage; None where it is not told.
    """

    text: str = ""
    generated: bool = False
    ended: bool = False
    model: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class AnswerDecoder:
    """Follows an answer from the bytes of its event stream. A member that is null is read as one that is absent."""

    def __init__(self) -> None:
        self._events = EventDecoder()
        self._some = self._ended = self._done = False

    def push(self, content: bytes) -> Iterator[Progress]:
        """What these bytes complete.

        Raises:
            FailedAnswerError: the server failed.
            ValueError, LookupError, AttributeError, TypeError: these are not OpenAI's events.
        """
        for event in self._events.push(content):
            self._some = True
            if event.kind not in ("message", "error") or not event.data.strip():  # to keep the connection alive
                continue
            self._done = self._done or event.data.strip() == _END
            if self._done:
                return
            progress = _progress(json.loads(event.data))
            self._ended = self._ended or progress.ended
            yield progress

    def finish(self) -> None:
        """Make sure that the stream that ends here held a whole answer.

        Raises:
            ValueError: it held no event, or broke off.
        """
        if not self._some:
            raise ValueError("the answer holds no event: the server does not stream")
        if not (self._done or self._ended):
            raise ValueError(f"the stream ended before the answer did: neither a finish_reason nor {_END} came")


def _progress(chunk: Mapping[str, Any]) -> Progress:
    if (error := chunk.get("error")) is not None:
        raise FailedAnswerError(error_message(error))
    choices, usage = chunk.get("choices") or (), chunk.get("usage") or {}
    if "choices" not in chunk and not usage:
        raise LookupError("an event has neither choices nor usage")
    deltas = [choice.get("delta") or {} for choice in choices]
    return Progress(
        text="".join(_text(delta.get("content")) for delta in deltas),
        generated=any(delta.get(name) for delta in deltas for name in _GENERATED),
        ended=any(choice.get("finish_reason") for choice in choices),
        model=chunk.get("model"),
        prompt_tokens=usage["prompt_tokens"] if usage else None,
        completion_tokens=usage["completion_tokens"] if usage else None,
    )


def _text(content: Any) -> str:
    """The text of a delta's content, which some servers send in parts."""
    if isinstance(content, list):
        return "".join(_text(part.get("text")) for part in content)
    return "" if content is None else str(content)


def error_message(error: Any) -> str:
    """What an error says, in OpenAI's form or as a bare text."""
    message = error.get("message") if isinstance(error, Mapping) else error
    return str(message or error)


def message_of(content: bytes, status: int) -> str:
    """What an error's body says, in OpenAI's envelope or not."""
    try:
        return f"{status}: {error_message(json.loads(content)['error'])}"
    except (ValueError, KeyError, TypeError):
        return f"{status}: {content[:200].decode('utf-8', 'replace')}"
