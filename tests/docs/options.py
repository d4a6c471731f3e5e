"""The option tables of docs/commands, made from the commands themselves.

`python tests/docs/options.py` rewrites them; a test fails where a page differs.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

from typer.models import ArgumentInfo, OptionInfo

from meswitch_cli.app import COMMANDS
from meswitch_cli.options import value_name

PAGES = Path(__file__).parents[2] / "docs" / "commands"
BEGIN, END = "<!-- options, generated -->\n", "<!-- end of options -->"


def table(command: str) -> str:
    """The Markdown table of a command's arguments and options; of a command with subcommands, one table for each."""
    import importlib

    module = importlib.import_module(f"meswitch_cli.commands.{command.replace('-', '_')}")
    if not hasattr(module, "app"):
        return _table(module.run)
    tables = [
        f"`{command} {info.name or info.callback.__name__}`\n\n{_table(info.callback)}"
        for info in module.app.registered_commands
        if info.callback
    ]
    return "\n".join(tables)


def _table(run: Callable[..., Any]) -> str:
    hints = get_type_hints(run, include_extras=True)
    lines = ["| option | default | meaning |", "|---|---|---|"]
    for name, parameter in inspect.signature(run).parameters.items():
        kind, info = get_args(hints[name])[:2]
        lines.append(f"| `{_spelling(name, kind, info)}` | {_default(parameter.default, info)} | {info.help} |")
    return "\n".join(lines) + "\n"


def _spelling(name: str, kind: Any, info: OptionInfo | ArgumentInfo) -> str:
    if isinstance(info, ArgumentInfo):
        return name.upper()
    # Inside Annotated, the first positional argument of typer.Option is a spelling, which typer keeps as `default`.
    flag = info.default if isinstance(info.default, str) else "--" + name.replace("_", "-")
    if kind is bool:
        return flag
    return f"{flag} {value_name(kind)}".replace("|", "\\|")


def _default(value: Any, info: OptionInfo | ArgumentInfo) -> str:
    if isinstance(info.show_default, str):
        return info.show_default
    return "required" if value is inspect.Parameter.empty else "" if value is None or value is False else str(value)


def with_table(page: str, command: str) -> str:
    """The page with its table made anew."""
    return re.sub(
        f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: BEGIN + table(command) + END, page, flags=re.DOTALL
    )


if __name__ == "__main__":
    for command in COMMANDS:
        path = PAGES / f"{command}.md"
        path.write_text(with_table(path.read_text(), command))
