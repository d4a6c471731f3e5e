"""Reading what is typed: with editing, history and completion on a terminal, as it comes elsewhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prompt_toolkit.history import History


def line_reader(words: Sequence[str], *, keep: bool) -> Callable[[str], str]:
    """A function from a prompt to the line typed after it; `words` are completed with Tab at a line's beginning.

    With `keep` lines are written to `history_file`, for the next conversation. Without prompt_toolkit, or a terminal on
    both sides, lines are read as they come. The function raises EOFError at the end of the input, and KeyboardInterrupt
    for Ctrl-C on a terminal.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return _read_piped
    if find_spec("prompt_toolkit") is None:
        return input
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: object) -> None:
        event.current_buffer.insert_text("\n")  # type: ignore[attr-defined]

    session: PromptSession[str] = PromptSession(
        history=_history(keep),
        completer=WordCompleter(list(words), sentence=True),
        complete_while_typing=False,
        key_bindings=keys,
    )
    return session.prompt


def history_file() -> Path:
    """Where lines are kept: below $XDG_STATE_HOME, by default ~/.local/state."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "meswitch" / "chat_history"


def _read_piped(prompt: str) -> str:
    """The prompt would stand among the answers."""
    try:
        line = sys.stdin.readline()
    except KeyboardInterrupt:  # whoever stops a script wants it to end
        raise EOFError from None
    if not line:
        raise EOFError
    return line


def _history(keep: bool) -> History:
    """The file, readable by its owner alone; memory where it is not wanted, or cannot be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    if not keep:
        return InMemoryHistory()
    file = history_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        file.chmod(0o600)
    except OSError:
        return InMemoryHistory()
    return FileHistory(file)
