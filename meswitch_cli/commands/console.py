"""Where Rich's consoles, tables and bars are made: what they show is shown as it is, never read as markup or emoji.

Names of models, config entries and messages come from outside and may hold square brackets or colons.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, ProgressColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table


def console(*, stderr: bool = False) -> Console:
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def say(text: str) -> None:
    """A sentence on stdout: wrapped between words on a terminal, one line elsewhere."""
    out = console()
    out.print(text, soft_wrap=not out.is_terminal)


def counted(number: int, noun: str) -> str:
    """A number and its noun: `1 expert`, `2 experts`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def table(title: str, *columns: str, text: Collection[str] = ()) -> Table:
    """A table whose first column stands at the left, as do those named in `text`, and the others at the right."""
    made = Table(title=title)
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index == 0 or column in text else "right")
    return made


@contextmanager
def working(text: str) -> Iterator[None]:
    """Say on stderr what is being done; on a terminal the seconds move below it until it is."""
    on = console(stderr=True)
    on.print(text, soft_wrap=True)
    with Progress(SpinnerColumn(), TimeElapsedColumn(), console=on, transient=True, disable=not on.is_terminal) as bar:
        bar.add_task("", total=None)
        yield


def progress_bar(*columns: ProgressColumn) -> Progress:
    """A bar on stderr, after its task's description; nothing where stderr is not a terminal."""
    on = console(stderr=True)
    described = TextColumn("{task.description}", markup=False)
    return Progress(described, *columns, console=on, transient=True, disable=not on.is_terminal)
