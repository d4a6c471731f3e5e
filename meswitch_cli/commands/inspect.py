"""`meswitch inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def run(
    artifact: Annotated[Path, typer.Argument(help="The artifact's folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything the manifest says, with figures.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Write error and size by layer and projection to FILE.png or FILE.svg.")
    ] = None,
) -> None:
    """Reads the manifest alone; nothing is proven about the shards (see verify)."""
    from meswitch_cli.artifact.artifact import Artifact
    from meswitch_cli.commands import report
    from meswitch_cli.commands.plot import plot_artifact

    manifest = Artifact.open(artifact).manifest
    if plot is not None:
        plot_artifact(manifest, plot)
    if as_json:
        tensors = json.loads(manifest.to_json())["tensors"]
        typer.echo(json.dumps(report.summary(manifest) | {"tensor_list": tensors}))
        return
    report.print_summary(manifest)
    report.print_worst_layers(manifest)
    settings = ", ".join(f"{key} {value}" for key, value in manifest.settings.items() if value is not None)
    typer.echo(f"settings: {settings}")
    typer.echo(f"base {manifest.base.id}, {manifest.base.fingerprint}; made with {manifest.created_with}")
    for key, (ours, theirs) in manifest.config_differences.items():
        typer.echo(f"config differs from the base's: {key}: base {ours!r}, expert {theirs!r}")
