"""`meswitch route`."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Annotated

import typer

from meswitch_cli.names import GateMode


def run(
    text: Annotated[str, typer.Argument(help="The prompt; - reads it from standard input.")],
    router: Annotated[Path, typer.Option(help="The router's folder.")],
    base: Annotated[str | None, typer.Option(help="The shared base; a probe needs it.", show_default="none")] = None,
    gate: Annotated[GateMode | None, typer.Option(help="How much is refused.", show_default="the router's")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the decision as one JSON object.")] = False,
) -> None:
    """Decides as a server would for a request without a session.

    Example: meswitch route --router ./router --base ./llama "What is the derivative of sin x?"
    """
    import sys

    from meswitch_cli.commands.router_tables import print_decision
    from meswitch_cli.router import open_router

    if text == "-":
        text = sys.stdin.buffer.read().decode("utf-8-sig", "replace")
    opened = open_router(router, base)
    logger, handler = logging.getLogger("meswitch_cli.router"), logging.StreamHandler(sys.stderr)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        decision = opened.route(text, gate=gate)
    finally:
        logger.removeHandler(handler)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(decision)))
    else:
        print_decision(decision)
