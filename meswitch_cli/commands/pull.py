"""`meswitch pull`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def run(
    name: Annotated[str, typer.Argument(help="OWNER/NAME, or OWNER/NAME@REVISION.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder to make of it.", show_default="it stays in the Hub's cache")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an artifact that is in --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Checks every byte. From then on its id names it wherever an artifact is asked for, without a net too.

    Example: meswitch pull ann/llama-maths-1bit --out ./maths-1bit
    """
    from meswitch_cli.hub.fetch import pull

    artifact = pull(name, out, force=force)
    manifest = artifact.manifest
    if as_json:
        value = {"artifact": str(artifact.path), "base": manifest.base.id, "expert": manifest.expert.id}
        typer.echo(json.dumps(value | {"bytes": manifest.nbytes, "digest": artifact.digest}))
        return
    typer.echo(f"ok: {manifest.expert.id} against {manifest.base.id}, {manifest.nbytes:,} bytes", err=True)
    typer.echo(f"{artifact.path}")
