"""Command functions as Typer is given them: what help calls each value, and paths as users write them."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import typer
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup
from typer.models import ArgumentInfo

from meswitch_cli.errors import plain_reason

#: Characters that a column of help holds on a terminal of 80 columns.
_NARROW = 20


def prepared(run: Callable[..., None], panels: Mapping[str, Sequence[str]] = {}) -> Callable[..., None]:
    """The function, with help that names each option's value and is shown as written, and `~` made out in its paths.

    `panels` names the panels of its help, and the parameters in each; all others stand under "Options".
    """
    from meswitch_cli.paths import user_path

    hints = get_type_hints(run, include_extras=True)
    panel_of = {name: panel for panel, names in panels.items() for name in names}
    parameters = []
    for name, parameter in inspect.signature(run).parameters.items():
        kind, info = get_args(hints[name])[:2]
        if info.metavar is None:
            info.metavar = name.upper() if isinstance(info, ArgumentInfo) else _in_columns(value_name(kind))
        info.help = escape(info.help or "")
        info.show_envvar = False  # the command's last line says it of all
        info.rich_help_panel = panel_of.get(name)
        parameters.append(parameter.replace(annotation=hints[name]))

    def call(**arguments: Any) -> None:
        def made_out(value: Any) -> Any:
            if isinstance(value, list):
                return [made_out(item) for item in value]
            return user_path(value) if isinstance(value, Path) else value

        run(**{name: made_out(value) for name, value in arguments.items()})

    call.__name__, call.__doc__ = run.__name__, run.__doc__
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return call


def value_name(kind: Any) -> str:
    """What help calls a value of a type: its choices, PATH, N or TEXT; nothing for a flag."""
    leaves = _leaves(kind)
    choices = [leaf for leaf in leaves if isinstance(leaf, str)]
    if choices:
        return "|".join(choices)
    if bool in leaves:
        return ""
    return "PATH" if Path in leaves else "N" if {int, float} & set(leaves) else "TEXT"


def _in_columns(value: str) -> str:
    """With blanks where help may break the line: a terminal of 80 columns would break long choices within a word."""
    return value if len(value) <= _NARROW else value.replace("|", " | ")


def _leaves(kind: Any) -> list[Any]:
    """The types, and values of Literals, that a type is made of."""
    return [leaf for part in get_args(kind) for leaf in _leaves(part)] or [kind]


class Command(TyperCommand):
    """A command whose flags are shown without a value, --help among them, and its arguments without a type."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _plain(super().get_params(ctx))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with _plain_reasons():
            return super().parse_args(ctx, args)


class CommandGroup(TyperGroup):
    """As `Command`, for commands that have subcommands."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _plain(super().get_params(ctx))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with _plain_reasons():
            return super().parse_args(ctx, args)


@contextlib.contextmanager
def _plain_reasons() -> Iterator[None]:
    try:
        yield
    except typer.BadParameter as error:
        error.message = plain_reason(error.message)
        raise


def _plain(parameters: list[Any]) -> list[Any]:
    for parameter in parameters:
        if parameter.param_type_name == "argument":
            parameter.display_type_rich = lambda ctx: None  # its name says it
        elif parameter.is_flag:
            parameter.metavar = ""
    return parameters
