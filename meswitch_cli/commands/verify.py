"""`meswitch verify`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from meswitch_cli.artifact.artifact import Artifact
    from meswitch_cli.checkpoint.checkpoint import Checkpoint


def run(
    artifact: Annotated[Path, typer.Argument(help="The artifact's folder, or a Hub id.")],
    base: Annotated[str | None, typer.Option(help="Also prove that this checkpoint is the artifact's base.")] = None,
    full: Annotated[
        bool,
        typer.Option("--full", help="Also prove, on a small model, that the engine serves --base rightly."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Reads every byte once. Exit status 0 only if everything is as the manifest says."""
    from meswitch_cli.artifact.base import check_base_shapes, refuse_other_base
    from meswitch_cli.checkpoint.checkpoint import Checkpoint
    from meswitch_cli.commands.notes import print_notes
    from meswitch_cli.commands.progress import byte_progress
    from meswitch_cli.errors import UsageError
    from meswitch_cli.hub.fetch import open_artifact
    from meswitch_cli.model.weights import CheckpointWeights

    if full and base is None:
        raise UsageError("--full: give --base too, whose family is proven")
    opened = open_artifact(artifact)
    manifest = opened.manifest
    opened_base = Checkpoint.open(base) if base else None
    print_notes(opened_base.notes if opened_base else ())
    if opened_base:
        check_base_shapes(manifest, opened_base)
    total = manifest.nbytes + (opened_base.nbytes if opened_base else 0)
    with byte_progress("verify", total) as advance:
        files = 0
        for file in opened.verify():
            files += 1
            advance(file.nbytes)
        if opened_base:
            found = CheckpointWeights(opened_base).take_fingerprint(advance)
            refuse_other_base(manifest, found, opened_base.source.path)
        why = _prove(opened, opened_base) if opened_base and full else None
    result = {
        "artifact": str(artifact),
        "files": files,
        "tensors": len(manifest.tensors),
        "bytes": manifest.nbytes,
        "base_checked": opened_base is not None,
        "engine_proven": full,
        "one_request_at_a_time": why,
    }
    if as_json:
        typer.echo(json.dumps(result))
        return
    typer.echo(f"ok: {files} files, {len(manifest.tensors)} tensors, {manifest.nbytes:,} bytes")
    typer.echo(f"ok: {base} is its base" if base else f"base not checked (give --base; it was {manifest.base.id})")
    if full:
        way = "" if why is None else f", one request at a time; not in batches: {why}"
        typer.echo(f"ok: the embedded engine computes its family as transformers does{way}")


def _prove(artifact: Artifact, base: Checkpoint) -> str | None:
    """Try what `serve` tries when it starts; return why it would compute one request at a time, if it would."""
    from meswitch_cli.engine.base_model import served_dtype
    from meswitch_cli.engine.expert import refuse_other_computation
    from meswitch_cli.engine.proof import why_one_by_one
    from meswitch_cli.engine.settings import EngineSettings
    from meswitch_cli.engine.version import check_transformers

    check_transformers()
    refuse_other_computation(artifact, base)
    settings = EngineSettings(str(base.source.path))
    return why_one_by_one(base.config, str(base.source.path), settings.torch_device, served_dtype(base, settings))
