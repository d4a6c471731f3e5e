"""Reading an event stream as the HTML standard has it: https://html.spec.whatwg.org/multipage/server-sent-events.html."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """An event; `kind` is "message" unless the stream gives another."""

    kind: str
    data: str


class EventDecoder:
    """Makes events out of a stream's bytes, in pieces of any size.

    An event is there with its empty line, however lines end; what the stream leaves unfinished is none.
    """

    def __init__(self) -> None:
        self._characters = codecs.getincrementaldecoder("utf-8-sig")("replace")
        self._line: list[str] = []
        self._after_return = False
        self._kind = ""
        self._data: list[str] = []

    def push(self, content: bytes) -> Iterator[Event]:
        """The events that these bytes complete."""
        for line in self._lines(self._characters.decode(content)):
            if line:
                self._take(line)
                continue
            kind, data = self._kind or "message", self._data
            self._kind, self._data = "", []
            if data:
                yield Event(kind, "\n".join(data))

    def _lines(self, text: str) -> Iterator[str]:
        """Whole lines. A line that ends in CR is given at once; the LF that may follow belongs to it."""
        if self._after_return and text.startswith("\n"):
            text = text[1:]
            self._after_return = False
        if not text:
            return
        self._after_return = text.endswith("\r")
        *whole, rest = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        for line in whole:
            yield "".join([*self._line, line])
            self._line = []
        self._line.append(rest)

    def _take(self, line: str) -> None:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._kind = value
