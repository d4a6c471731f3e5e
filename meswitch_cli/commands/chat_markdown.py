"""An answer on the screen while it comes: as it is, or as the Markdown that models write."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import typer

from meswitch_cli.commands.console import console

if TYPE_CHECKING:
    from rich.live import Live
    from rich.markdown import Markdown

_FENCE = re.compile(r" {0,3}(```+|~~~+)")


class PlainStream:
    """Text as it comes, and a line's end after it."""

    def __enter__(self) -> PlainStream:
        return self

    def __exit__(self, *raised: object) -> None:
        typer.echo()

    def write(self, text: str) -> None:
        typer.echo(text, nl=False)


class MarkdownStream:
    """Blocks that are complete are printed for good; the one that is being written is drawn anew as it grows."""

    def __init__(self) -> None:
        self._console = console()
        self._text = ""
        self._live: Live | None = None
        self._some = False

    def __enter__(self) -> MarkdownStream:
        return self

    def __exit__(self, *raised: object) -> None:
        self._print(self._text)

    def write(self, text: str) -> None:
        finished, self._text = split_blocks(self._text + text)
        for block in finished:
            self._print(block)
        if not self._text.strip():
            return
        from rich.live import Live

        if self._live is None:
            self._live = Live(console=self._console, transient=True, auto_refresh=False)
            self._live.start()
        self._live.update(_markdown(self._text), refresh=True)

    def _print(self, block: str) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        if block.strip():
            if self._some:
                self._console.print()
            self._console.print(_markdown(block))
            self._some = True


def split_blocks(text: str) -> tuple[list[str], str]:
    """The complete blocks of a text, which end with an empty line outside a fence, and the rest."""
    blocks, start, position, fence = [], 0, 0, ""
    for line in text.splitlines(keepends=True):
        position += len(line)
        opened = _FENCE.match(line)
        if opened and not fence:
            fence = opened[1]
        elif opened and opened[1].startswith(fence) and not line.strip().strip(fence[0]):
            fence = ""
        elif not fence and not line.strip() and line.endswith("\n"):
            blocks.append(text[start:position])
            start = position
    return blocks, text[start:]


def _markdown(text: str) -> Markdown:
    """With the text's own line ends: models mean them, where Markdown makes one line of a paragraph."""
    from rich.markdown import Markdown

    made = Markdown(_shown(text))
    for token in made.parsed:
        for part in token.children or ():
            if part.type == "softbreak":
                part.type = "hardbreak"
    return made


def _shown(text: str) -> str:
    """The text without characters that would move the cursor or colour the terminal."""
    return "".join(character for character in text if character.isprintable() or character in "\n\t")
