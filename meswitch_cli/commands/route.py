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
    explain: Annotated[
        bool, typer.Option("--explain", help="Show both gates' figures and the known prompts nearest to this one.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the decision as one JSON object.")] = False,
) -> None:
    """Decides as a server would for a request without a session.

    Example: meswitch route --router ./router --base ./llama "What is the derivative of sin x?"
    """
    import sys

    from meswitch_cli.commands.progress import quiet_loading
    from meswitch_cli.commands.router_tables import print_decision, print_explanation
    from meswitch_cli.router.store import RouterArtifact, open_router

    if text == "-":
        text = sys.stdin.buffer.read().decode("utf-8-sig", "replace")
    quiet_loading()
    artifact = RouterArtifact.open(router)
    opened = open_router(artifact, base)
    known = artifact.known() if explain else ()
    logger, handler = logging.getLogger("meswitch_cli.router"), logging.StreamHandler(sys.stderr)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        decision = opened.route(text, gate=gate)
        explanation = opened.explain(text) if explain else None
    finally:
        logger.removeHandler(handler)
    if as_json:
        value = dataclasses.asdict(decision)
        if explanation is not None:
            value["explanation"] = dataclasses.asdict(explanation)
            if known:
                value["explanation"]["prompts"] = [known[item.point].excerpt for item in explanation.nearest]
        typer.echo(json.dumps(value))
        return
    print_decision(decision)
    if explanation is not None:
        print_explanation(explanation, known)
