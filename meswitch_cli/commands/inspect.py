"""`meswitch inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def run(
    artifact: Annotated[Path | None, typer.Argument(help="The artifact's folder, or a Hub id.")] = None,
    base: Annotated[
        str | None, typer.Option(help="Without an artifact: a base, with --expert; a folder, or a Hub id.")
    ] = None,
    expert: Annotated[str | None, typer.Option(help="A fine-tune of it: says what kind of fine-tune it is.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything the manifest says, with figures.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Write error and size by layer and projection to FILE.png or FILE.svg.")
    ] = None,
) -> None:
    """Of an artifact the manifest alone is read; nothing is proven about the shards (see verify).

    Example: meswitch inspect --base ./llama --expert ./llama-maths
    """
    from meswitch_cli.commands import report
    from meswitch_cli.commands.plot import plot_artifact
    from meswitch_cli.errors import UsageError
    from meswitch_cli.hub.fetch import open_artifact

    if (artifact is None) == (base is None and expert is None) or (base is None) != (expert is None):
        raise UsageError("give an artifact, or --base and --expert")
    if base is not None and expert is not None:
        if plot is not None:
            raise UsageError("--plot: shows an artifact; compress first")
        _print_fine_tune(base, expert, as_json)
        return
    assert artifact is not None
    manifest = open_artifact(artifact).manifest
    if plot is not None:
        plot_artifact(manifest, plot)
    if as_json:
        tensors = json.loads(manifest.to_json())["tensors"]
        typer.echo(json.dumps(report.summary(manifest) | {"tensor_list": tensors}))
        return
    report.print_summary(manifest)
    report.print_worst_layers(manifest)
    settings = ", ".join(f"{key} {value}" for key, value in manifest.settings.items() if _is_setting(value))
    typer.echo(f"settings: {settings}")
    typer.echo(f"base {manifest.base.id}, {manifest.base.fingerprint}; made with {manifest.created_with}")
    for key, (ours, theirs) in manifest.config_differences.items():
        typer.echo(f"config differs from the base's: {key}: base {ours!r}, expert {theirs!r}")


def _is_setting(value: object) -> bool:
    return value is not None and not isinstance(value, dict)


def _print_fine_tune(base: str, expert: str, as_json: bool) -> None:
    from dataclasses import asdict

    from meswitch_cli.checkpoint.checkpoint import Checkpoint
    from meswitch_cli.commands import report
    from meswitch_cli.commands.console import working
    from meswitch_cli.commands.notes import print_notes
    from meswitch_cli.compression.fine_tune import WHAT, describe_fine_tune
    from meswitch_cli.model.adapted import open_expert

    opened = Checkpoint.open(base)
    with working("reading every weight of both models"):
        found = describe_fine_tune(opened, open_expert(expert, opened))
    print_notes(found.warnings)
    if as_json:
        typer.echo(json.dumps({"base": base, "expert": expert} | asdict(found) | {"suggestion": WHAT[found.kind]}))
        return
    report.print_fine_tune(expert, base, found)
    typer.echo(f"looks like {WHAT[found.kind]}")
    if found.sizes and found.sizes.best == "exact":
        typer.echo("compress keeps it bit for bit by itself, as that takes no more than its code")
    if found.sizes and found.sizes.best == "product":
        typer.echo(f"compress keeps its products of rank {found.rank} alone by itself: nearer than a code of that size")
