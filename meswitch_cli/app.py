"""The `meswitch` command. A subcommand's module is imported only when that subcommand is asked for."""

from __future__ import annotations

import importlib
import io
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence

import typer
from rich.markup import escape

from meswitch_cli import __version__
from meswitch_cli.errors import MeswitchError
from meswitch_cli.options import Command, CommandGroup, prepared

#: Subcommands in the order of `--help`, each with the line that is shown there.
COMMANDS = {
    "compress": "Compress a fine-tune to a low-bit delta against its base.",
    "inspect": "Show what an artifact holds and how faithful each of its tensors is.",
    "verify": "Check an artifact's every hash and tensor, and that a base is its base.",
    "restore": "Write an artifact back as an ordinary Hugging Face checkpoint.",
    "list": "List the artifacts in a folder: base, size, bits a weight, whether all of it is there.",
    "push": "Publish an artifact on the Hugging Face Hub.",
    "pull": "Fetch an artifact from the Hugging Face Hub, and check it.",
    "train-router": "Train a router: which expert a prompt belongs to, and how sure that is.",
    "router": "Add an expert to a router, remove one, or measure a router.",
    "route": "Say which expert a router chooses for a prompt.",
    "plan": "Say how many experts fit on a device, beside how much cache.",
    "serve": "Serve the base and its experts behind OpenAI's API, with a chat page.",
    "chat": "Talk to a server's experts in the terminal, or to those in this process.",
    "bench": "Load an OpenAI-compatible server and measure latency and throughput.",
    "eval": "Measure how close a compressed expert is to the full one, with statistics.",
    "env": "Show versions, backends and devices: what a report of a problem needs.",
}

#: Panels of `--help`, and the first command of each.
PANELS = {
    "compress": "Experts as artifacts",
    "train-router": "Which expert answers",
    "plan": "Serving and talking to them",
    "eval": "Measuring, and reporting a problem",
}

#: Every option is also a variable, named after its command: MESWITCH_SERVE_PORT is serve's --port.
VARIABLES = "MESWITCH"
#: Set by a shell that asks what a line may go on with; typer then takes the line from the environment.
COMPLETING = "_MESWITCH_COMPLETE"


def build_app(arguments: Sequence[str]) -> typer.Typer:
    """Make the command-line application, with the subcommand that the arguments name and the others' names alone."""
    app = _application(completion=True)
    app.callback(cls=CommandGroup, help="Serve a family of fine-tuned language models from one base.")(_options)
    requested = next((item for item in arguments if not item.startswith("-")), None)
    panel: str | None = None
    for name, line in COMMANDS.items():
        panel = PANELS.get(name, panel)
        if name != requested:
            app.command(name, help=line, rich_help_panel=panel)(_listed)
            continue
        module = importlib.import_module(f"meswitch_cli.commands.{name.replace('-', '_')}")
        panels = getattr(module, "PANELS", {})
        if not hasattr(module, "app"):
            _add(app, name, line, prepared(module.run, panels))
            continue
        commands = _application()
        for info in module.app.registered_commands:
            _add(commands, info.name or info.callback.__name__, info.help, prepared(info.callback, panels), name)
        app.add_typer(commands, name=name, cls=CommandGroup, help=line)
    return app


def words_to_complete(environment: Mapping[str, str]) -> list[str]:
    """The words after `meswitch` of a line that a shell wants completed; empty where none does."""
    if COMPLETING not in environment:
        return []
    line = environment.get("COMP_WORDS") or environment.get("_TYPER_COMPLETE_ARGS") or ""
    try:
        return shlex.split(line)[1:]
    except ValueError:  # a quote that is open yet
        return line.split()[1:]


def variable_prefix(*command: str) -> str:
    """What the variables of a command's options begin with."""
    return "_".join((VARIABLES, *command)).upper().replace("-", "_")


def _add(app: typer.Typer, name: str, line: str, run: Callable[..., None], *group: str) -> None:
    """A command with all its help and its variables."""
    variables = variable_prefix(*group, name)
    app.command(
        name,
        cls=Command,
        help=escape(f"{line}\n\n{run.__doc__}"),
        epilog=f"An option can also be given as a variable: {variables}_NAME, with _ for each -.",
        context_settings={"auto_envvar_prefix": variables},
    )(run)


def _application(*, completion: bool = False) -> typer.Typer:
    return typer.Typer(
        no_args_is_help=True,
        add_completion=completion,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["--help", "-h"]},
    )


def _listed() -> None:
    """Stands for a subcommand that was not asked for."""


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"meswitch {__version__}")
        raise typer.Exit()


def _options(
    version: bool = typer.Option(
        False, "--version", metavar="", is_eager=True, callback=_show_version, help="Show the version and exit."
    ),
) -> None:
    """Options that go before a command."""


def main() -> None:
    """Run the command line; a user's mistake ends in one line on stderr and exit status 1 or 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr has it: a terminal may know fewer characters
    try:
        build_app(words_to_complete(os.environ) or sys.argv[1:])(prog_name="meswitch")
    except MeswitchError as error:
        typer.secho(f"error: {error}", err=True, fg=typer.colors.RED)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # the reader of our output left; there is nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
