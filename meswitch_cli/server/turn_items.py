"""An assistant's turn as a list of texts and calls, which two of the APIs answer with."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from meswitch_cli.server.tools import AnswerPart


@dataclass
class TurnItem:
    """A text, or a call.

    Attributes:
        id: unique.
        text: the text, or the JSON text of the call's arguments.
        call_id, name: of a call, None of a text.
        complete: whether it was not cut off.
    """

    index: int
    call_id: str | None = None
    name: str | None = None
    text: str = ""
    complete: bool = False
    id: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(frozen=True)
class ItemChange:
    """What happens to an item: it begins, gets text, or ends."""

    kind: Literal["begin", "text", "end"]
    item: TurnItem
    text: str = ""


class TurnItems:
    """Collects the items of a turn from its parts.

    Attributes:
        items: so far, the last one perhaps not complete.
    """

    def __init__(self) -> None:
        self.items: list[TurnItem] = []
        self._open: TurnItem | None = None

    def push(self, parts: Sequence[AnswerPart]) -> Iterator[ItemChange]:
        """The changes that these parts make, in order."""
        for part in parts:
            if isinstance(part, str):
                if self._open is None or self._open.name is not None:
                    yield from self._close(True)
                    yield self._begin(TurnItem(len(self.items)))
                yield self._add(part)
                continue
            if part.name is not None:
                yield from self._close(True)
                yield self._begin(TurnItem(len(self.items), part.id, part.name))
            if part.arguments:
                yield self._add(part.arguments)
            if part.complete:
                yield from self._close(True)

    def finish(self, cut: bool) -> Iterator[ItemChange]:
        """The changes of the end; a turn that says nothing is an empty text. `cut`, the answer is not whole."""
        if not self.items:
            yield self._begin(TurnItem(0))
        yield from self._close(not cut)

    def _begin(self, item: TurnItem) -> ItemChange:
        self._open = item
        self.items.append(item)
        return ItemChange("begin", item)

    def _add(self, text: str) -> ItemChange:
        assert self._open is not None
        self._open.text += text
        return ItemChange("text", self._open, text)

    def _close(self, complete: bool) -> Iterator[ItemChange]:
        item, self._open = self._open, None
        if item is not None:
            item.complete = complete
            yield ItemChange("end", item)
