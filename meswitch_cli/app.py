"""The `meswitch` command. A subcommand's module is imported only when that subcommand is asked for."""

from __future__ import annotations

import importlib
import io
import os
import sys
from collections.abc import Sequence

import typer
from rich.markup import escape

from meswitch_cli import __version__
from meswitch_cli.errors import MeswitchError
from meswitch_cli.options import Command, Group, prepared

#: Subcommands in the order of `--help`, each with the line that is shown there.
COMMANDS = {
    "compress": "Compress a fine-tune to a low-bit delta against its base.",
    "inspect": "Show what an artifact holds and how faithful each of its tensors is.",
    "verify": "Check an artifact's every hash and tensor, and that a base is its base.",
    "restore": "Write an artifact back as an ordinary Hugging Face checkpoint.",
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
}


def build_app(arguments: Sequence[str]) -> typer.Typer:
    """Make the command-line application, with the subcommand that the arguments name and the others' names alone."""
    app = _application()
    app.callback(cls=Group, help="Serve a family of fine-tuned language models from one base.")(_options)
    requested = next((item for item in arguments if not item.startswith("-")), None)
    for name, line in COMMANDS.items():
        if name != requested:
            app.command(name, help=line)(_listed)
            continue
        module = importlib.import_module(f"meswitch_cli.commands.{name.replace('-', '_')}")
        if not hasattr(module, "app"):
            app.command(name, cls=Command, help=escape(f"{line}\n\n{module.run.__doc__}"))(prepared(module.run))
            continue
        commands = _application()
        for info in module.app.registered_commands:
            said = escape(f"{info.help}\n\n{info.callback.__doc__}")
            commands.command(info.name, cls=Command, help=said)(prepared(info.callback))
        app.add_typer(commands, name=name, cls=Group, help=line)
    return app


def _application() -> typer.Typer:
    return typer.Typer(
        no_args_is_help=True,
        add_completion=False,
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
        build_app(sys.argv[1:])()
    except MeswitchError as error:
        typer.secho(f"error: {error}", err=True, fg=typer.colors.RED)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # the reader of our output left; there is nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
