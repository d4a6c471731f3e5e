"""`meswitch restore`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def run(
    artifact: Annotated[Path, typer.Argument(help="The artifact's folder, or a Hub id.")],
    base: Annotated[str, typer.Option(help="The base it was made against: a folder or a Hub id.")],
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint; must not exist or be empty.")],
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="Type of the weights; auto is the expert's own."),
    ] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that is there.")] = False,
) -> None:
    """The result loads with AutoModelForCausalLM and AutoTokenizer, like the fine-tune it stands for."""
    from meswitch_cli.artifact.restore import restore
    from meswitch_cli.checkpoint.checkpoint import Checkpoint
    from meswitch_cli.commands.notes import print_notes
    from meswitch_cli.commands.progress import byte_progress
    from meswitch_cli.hub.fetch import open_artifact
    from meswitch_cli.model.dtype import DTYPES

    opened = open_artifact(artifact)
    opened_base = Checkpoint.open(base)
    print_notes(opened_base.notes)
    target = None if dtype == "auto" else DTYPES[dtype]
    with byte_progress("restore", opened_base.nbytes) as advance:
        written = restore(opened, opened_base, out, dtype=target, force=force, on_tensor=advance)
    typer.echo(f"{written}")
