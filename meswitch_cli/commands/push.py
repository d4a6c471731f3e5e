"""`meswitch push`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer


def run(
    artifact: Annotated[Path, typer.Argument(help="The artifact's folder.")],
    repo: Annotated[str, typer.Option(help="The repository, OWNER/NAME; made if it is not there.")],
    revision: Annotated[
        str | None, typer.Option(help="A branch, made if it is not there.", show_default="main")
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="A repository that is made is seen by everybody, not by you alone.")
    ] = False,
    base_model: Annotated[
        str | None,
        typer.Option(help="The fine-tune's own repository, for the card.", show_default="where it was read from"),
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option(help="For the card, as the Hub spells it.", show_default="what the fine-tune's card says"),
    ] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.", show_default="Add and the expert")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Checks every byte first. The token is that of `hf auth login`, or HF_TOKEN. Run again, it sends what is missing.

    Example: meswitch push ./maths-1bit --repo ann/llama-maths-1bit
    """
    from meswitch_cli.artifact.artifact import Artifact
    from meswitch_cli.commands.notes import print_notes
    from meswitch_cli.commands.progress import byte_progress
    from meswitch_cli.hub.publish import push

    opened = Artifact.open(artifact)
    with byte_progress("verify", opened.manifest.nbytes) as advance:
        done = push(
            opened,
            repo,
            revision=revision,
            public=public,
            base_model=base_model,
            licence=licence,
            message=message,
            on_file=advance,
        )
    print_notes(done.notes)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(done) | {"name": done.name}))
        return
    typer.echo(f"{done.url} has it, as {done.name}")
