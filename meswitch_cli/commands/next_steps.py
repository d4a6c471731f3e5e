"""Which commands may come next, as a shell takes them; on stderr, since they are not the result."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import typer

from meswitch_cli.errors import UsageError
from meswitch_cli.names import check_name


def print_next(commands: Sequence[Sequence[object]]) -> None:
    """Each command in a line of its own, to be copied whole."""
    lines = [shlex.join(["meswitch", *map(str, words)]) for words in commands]
    typer.echo("\n".join(["next:", *(f"  {line}" for line in lines)]), err=True)


def after_compress(base: str, expert: str, out: Path) -> list[list[object]]:
    """Measuring an artifact on the user's own data, and serving it."""
    name = Path(expert.partition("@")[0]).name
    try:
        check_name(name)
    except UsageError:
        name = "NAME"
    report = f"{out.name}-eval"  # not beside the artifact: serve --experts-dir would take it for one
    return [
        ["eval", "--base", base, "--expert", expert, "--artifact", out, "--text", "HELD-OUT.jsonl", "--out", report],
        ["serve", "--base", base, "--expert", f"{name}={out}"],
    ]


def after_training(
    base: str | None, router: Path, labels: Iterable[str], artifacts: Mapping[str, Path]
) -> list[list[object]]:
    """Asking a router, and serving the experts that it chooses between."""
    experts = [word for label in labels for word in ("--expert", f"{label}={artifacts.get(label, 'ARTIFACT')}")]
    read = ["--base", base] if base else []
    return [
        ["route", "--router", router, *read, "--explain", "a prompt of your own"],
        ["serve", "--base", base or "BASE", *experts, "--router", router],
    ]
