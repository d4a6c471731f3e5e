"""What a command tells beside its result, on stderr."""

from __future__ import annotations

from collections.abc import Iterable

import typer


def print_notes(notes: Iterable[str]) -> None:
    """One line each. Not through Rich, which would read brackets in a path as markup."""
    for note in notes:
        typer.secho(f"warning: {note}", err=True, fg=typer.colors.YELLOW)
