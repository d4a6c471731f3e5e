"""`meswitch list`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from meswitch_cli.artifact.listing import Listed


def run(
    folder: Annotated[Path, typer.Argument(help="Where the artifacts are.")] = Path(),
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte and compare it with its hash.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False,
) -> None:
    """Reads manifests and the sizes of files; exit status 1 where an artifact cannot be used.

    Example: meswitch list ./experts --verify
    """
    from meswitch_cli.artifact.listing import artifacts_in

    found = list(artifacts_in(folder, verify=verify))
    rows = [_figures(item, verify) for item in found]
    if as_json:
        typer.echo(json.dumps(rows))
    elif rows:
        _print(rows)
    else:
        typer.echo(f"no artifacts in {folder}", err=True)
    if any(item.problem for item in found):
        raise typer.Exit(1)


def _figures(item: Listed, verified: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"name": item.path.resolve().name, "path": str(item.path)}
    if item.artifact is not None:
        from meswitch_cli.commands.report import form_of, summary

        manifest = item.artifact.manifest
        figures = summary(manifest)
        row |= {key: figures[key] for key in ("expert", "base", "base_fingerprint", "bytes", "bits_per_weight")}
        linears = [entry for entry in manifest.tensors if entry.kind == "linear" and (entry.bits or entry.rank)]
        row["linears"] = "/".join(sorted({form_of(entry) for entry in linears}))
        row["digest"] = item.artifact.digest
    return row | {"verified": verified and item.problem is None, "problem": item.problem}


def _print(rows: list[dict[str, Any]]) -> None:
    from meswitch_cli.commands.console import console, table
    from meswitch_cli.commands.report import megabytes

    shown = table("", "artifact", "expert", "base", "size", "linears", "bits a weight", "files")
    several = len({row["base_fingerprint"] for row in rows if "base" in row}) > len(
        {row["base"] for row in rows if "base" in row}
    )
    for row in rows:
        state = "unusable" if row["problem"] else "verified" if row["verified"] else "all there"
        if "base" not in row:
            shown.add_row(row["name"], "", "", "", "", "", state)
            continue
        base = row["base"] + (f" {row['base_fingerprint'][7:15]}" if several else "")
        rate = f"{row['bits_per_weight']:.2f}"
        shown.add_row(row["name"], row["expert"], base, megabytes(row["bytes"]), row["linears"], rate, state)
    out = console()
    out.print(shown)
    for row in rows:
        if row["problem"]:
            out.print(f"{row['name']}: {row['problem']}", soft_wrap=True)
