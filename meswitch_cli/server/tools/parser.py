"""Reading text and calls out of an answer while it is generated."""

from __future__ import annotations

import secrets
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from meswitch_cli.server.tools.syntax import CallSyntax

_ID_LETTERS = string.ascii_letters + string.digits


@dataclass(frozen=True)
class CallPart:
    """What is new of a call. The first part, and it alone, has an id and a name.

    Attributes:
        index: of the call in the answer, from 0.
        arguments: a piece of its JSON text.
        complete: whether this was the last part.
    """

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""
    complete: bool = False


#: A piece of text, or of a call.
AnswerPart = str | CallPart


def call_id() -> str:
    """An identifier of a call: nine letters and digits, which is all that Mistral's chat templates accept."""
    return "".join(secrets.choice(_ID_LETTERS) for _ in range(9))


class CallParser:
    """Takes one answer apart as its text comes.

    The grammar has seen to it that what begins as a call is one; where the text ends within it, so does the call.
    White space around calls is no part of the text.

    Attributes:
        calls: how many calls have begun.
    """

    def __init__(self, syntax: CallSyntax, functions: Sequence[str]) -> None:
        self._syntax = syntax
        self._first = {syntax.before + syntax.head_of(name): name for name in functions}
        self._next = {syntax.between + syntax.head_of(name): name for name in functions}
        self._state: Literal["text", "first", "arguments", "tail", "next"] = "text"
        self._buffer = ""
        self._arguments = JsonEnd()
        self.calls = 0

    def push(self, text: str) -> list[AnswerPart]:
        """What this piece of the answer's text completes."""
        self._buffer += text
        parts: list[AnswerPart] = []
        while self._step(parts):
            pass
        return parts

    def finish(self) -> list[AnswerPart]:
        """What was held back, now that nothing follows."""
        rest, self._buffer = self._buffer, ""
        if self.calls and not rest.strip():
            return []
        return [rest] if rest and self._state in ("text", "first") else []

    def _step(self, parts: list[AnswerPart]) -> bool:
        """Take what can be taken from the buffer; return whether more may follow at once."""
        if self._state == "text":
            return self._take_text(parts)
        if self._state == "arguments":
            return self._take_arguments(parts)
        if self._state == "tail":
            return self._take([self._syntax.tail]) is not None and self._after_call()
        return self._take_head(parts)

    def _take_text(self, parts: list[AnswerPart]) -> bool:
        place = self._buffer.find(self._syntax.trigger)
        free = place if place >= 0 else len(self._buffer) - _overlap(self._buffer, self._syntax.trigger)
        text = self._buffer[:free].rstrip()  # white space may stand before a call
        if self.calls and not text:
            free = free if place >= 0 else 0
        elif place < 0:
            free = len(text)
        if text:
            parts.append(text)
        self._buffer = self._buffer[free:]
        if place >= 0:
            self._state = "first"
        return place >= 0

    def _take_head(self, parts: list[AnswerPart]) -> bool:
        heads = self._first if self._state == "first" else self._next
        ends = [self._syntax.after] if self._state == "next" else []
        found = self._take([*heads, *ends])
        if found is None:
            return False
        if found in heads:
            parts.append(CallPart(self.calls, call_id(), heads[found]))
            self.calls += 1
            self._state, self._arguments = "arguments", JsonEnd()
        else:
            self._state = "text"
        return True

    def _take_arguments(self, parts: list[AnswerPart]) -> bool:
        if not self._arguments.begun:
            self._buffer = self._buffer.lstrip()
        size = self._arguments.push(self._buffer)
        taken, self._buffer = self._buffer[:size], self._buffer[size:]
        complete = self._arguments.complete
        if taken or complete:
            parts.append(CallPart(self.calls - 1, arguments=taken, complete=complete))
        if complete:
            self._state = "tail"
        return complete

    def _after_call(self) -> bool:
        self._state = "next" if self._syntax.after else "text"
        return True

    def _take(self, literals: Iterable[str]) -> str | None:
        """Take one of the literals from the buffer; None while none is there whole."""
        for literal in literals:
            size = _match(self._buffer, literal)
            if size is not None:
                self._buffer = self._buffer[size:]
                return literal
        return None


class JsonEnd:
    """Finds the end of a JSON object in text that comes in pieces."""

    def __init__(self) -> None:
        self._depth, self._quoted, self._escaped = 0, False, False
        self.complete = False

    @property
    def begun(self) -> bool:
        """Whether its first bracket has come."""
        return self._depth > 0 or self.complete

    def push(self, text: str) -> int:
        """How many of these characters belong to the object."""
        for index, character in enumerate(text):
            if self._quoted:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._quoted = False
            elif character == '"':
                self._quoted = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.complete = True
                    return index + 1
        return len(text)


def _match(text: str, literal: str) -> int | None:
    """How many characters of the text are the literal, None where they are not or not yet.

    White space may be missing or be more: what stands behind a special token is decoded with a space or without one.
    """
    place = 0
    for character in literal:
        if character.isspace():
            continue
        while place < len(text) and text[place].isspace():
            place += 1
        if place == len(text) or text[place] != character:
            return None
        place += 1
    return place


def _overlap(text: str, trigger: str) -> int:
    """Length of the longest end of the text that begins the trigger."""
    longest = min(len(text), len(trigger) - 1)
    return next((size for size in range(longest, 0, -1) if trigger.startswith(text[len(text) - size :])), 0)
