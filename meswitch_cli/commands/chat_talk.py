"""A conversation in the terminal: lines in, answers out, commands that begin with a slash."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import typer

from meswitch_cli.commands.chat_markdown import MarkdownStream, PlainStream
from meswitch_cli.errors import MeswitchError

if TYPE_CHECKING:
    from meswitch_cli.client.conversation import Conversation

#: What /help says, by command and what it takes.
HELP = {
    "/expert [NAME]": "who answers from now on; without a name, who there is",
    "/new": "forget what was said",
    "/stats": "tokens and speed of this conversation",
    "/help": "this",
    "/exit": "end; so does Ctrl-D",
}
_OTHER_NAMES = {"/model": "/expert", "/quit": "/exit", "/?": "/help"}

#: A prompt to the line that is typed after it.
ReadLine = Callable[[str], str]


class Talk:
    """Asks a conversation what is typed, and prints the words on stdout, who says them and how fast on stderr."""

    def __init__(self, conversation: Conversation, names: list[str], *, markdown: bool) -> None:
        self.conversation, self.names, self._markdown = conversation, names, markdown
        self._answers = self._tokens = 0
        self._seconds = 0.0

    @property
    def words(self) -> list[str]:
        """What a line may begin with, or name."""
        return [*(command.partition(" ")[0] for command in HELP), *(f"/expert {name}" for name in self.names)]

    def run(self, read: ReadLine) -> None:
        """Until /exit, or the end of what is read."""
        typer.echo(f"{', '.join(self.names)}; /expert NAME, /new, /help, /exit", err=True)
        while True:
            try:
                line = read(f"{self.conversation.model}> ").strip()
            except EOFError:
                typer.echo(err=True)
                return
            except KeyboardInterrupt:
                typer.echo("Ctrl-D or /exit ends", err=True)
                continue
            if line.startswith("/"):
                if not self._obey(*line.split(maxsplit=1)):
                    return
            elif line:
                self._try(line)

    def answer(self, text: str) -> None:
        """Ask, and print the answer as it comes.

        Raises:
            MeswitchError: the server does not answer, refuses, or fails on the way.
        """
        started, first, tokens, prompt = time.perf_counter(), None, 0, 0
        with MarkdownStream() if self._markdown else PlainStream() as screen:
            for chunk in self.conversation.ask(text):
                if chunk.expert:
                    sure = f", {_percent(chunk.confidence)} sure" if chunk.reason in ("routed", "sticky") else ""
                    typer.secho(f"{chunk.expert} ({chunk.reason}{sure})", err=True, fg=typer.colors.CYAN)
                if chunk.text and first is None:
                    first = time.perf_counter() - started
                tokens, prompt = chunk.completion_tokens or tokens, chunk.prompt_tokens or prompt
                screen.write(chunk.text)
        seconds = time.perf_counter() - started
        self._answers, self._tokens, self._seconds = self._answers + 1, self._tokens + tokens, self._seconds + seconds
        if first is not None and sys.stderr.isatty():
            after_first = f", {(tokens - 1) / (seconds - first):.1f} a second" if tokens > 1 and seconds > first else ""
            told = f"{tokens} tokens{after_first}, the first after {first:.1f} s; {prompt} tokens read"
            typer.secho(told, err=True, dim=True)

    def _try(self, line: str) -> None:
        try:
            self.answer(line)
        except KeyboardInterrupt:
            typer.echo("broken off; not part of the conversation", err=True)
        except MeswitchError as error:
            _complain(f"error: {error}")

    def _obey(self, word: str, argument: str = "") -> bool:
        """Do a command; False where it ends the conversation."""
        command = _OTHER_NAMES.get(word, word)
        if command == "/exit":
            return False
        if command == "/new":
            self.conversation.forget()
            typer.echo("forgotten", err=True)
        elif command == "/stats":
            speed = f", {self._tokens / self._seconds:.1f} a second" if self._tokens else ""
            typer.echo(f"{self._answers} answers, {self._tokens} tokens{speed}", err=True)
        elif command == "/help":
            typer.echo("\n".join(f"{name:<16} {what}" for name, what in HELP.items()), err=True)
        elif command == "/expert" and argument in self.names:
            self.conversation.model = argument
        elif command == "/expert":
            there = ", ".join(self.names)
            if argument:
                _complain(f"there is no {argument!r}; there are {there}")
            else:
                typer.echo(f"{self.conversation.model} answers; there are {there}", err=True)
        else:
            _complain(f"there is no {word}; /help names what there is")
        return True


def _complain(text: str) -> None:
    typer.secho(text, err=True, fg=typer.colors.RED)


def _percent(share: float) -> str:
    """A share, never 100 % of what is not certain; as the page writes it."""
    value = 100 * share
    return f"{min(value, 99.9):.1f} %" if value < 10 or 99 < value < 100 else f"{value:.0f} %"
