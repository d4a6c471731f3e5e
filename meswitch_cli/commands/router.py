"""`meswitch router add`, `remove` and `eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from meswitch_cli.router.store.artifact import RouterArtifact
    from meswitch_cli.router.train.editing import Edit

app = typer.Typer(no_args_is_help=True)


@app.command(help="Add an expert from its prompts, or learn from feedback; the other prompts are not needed again.")
def add(
    router: Annotated[Path, typer.Option(help="The router's folder.")],
    expert: Annotated[str | None, typer.Option(help="Name of the new expert.", show_default="none")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help='JSONL with "prompt" or "messages": the new expert\'s domain.', show_default="none"),
    ] = None,
    feedback: Annotated[
        Path | None,
        typer.Option(help="JSONL of `serve --feedback`: prompts and their right experts.", show_default="none"),
    ] = None,
    base: Annotated[str | None, typer.Option(help="The shared base; a probe needs it.", show_default="none")] = None,
    artifact: Annotated[
        Path | None, typer.Option(help="The expert's artifact, whose hash is kept.", show_default="none")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to make.", show_default="replaces the router")] = None,
    max_regression: Annotated[
        float, typer.Option(min=0, max=1, help="Refuse if another expert loses more recall than this.")
    ] = 0.02,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Refits head, temperature and gates on stored features, in seconds."""
    from meswitch_cli.errors import UsageError
    from meswitch_cli.hub.fetch import find_artifact
    from meswitch_cli.router.decide.labels import check_label
    from meswitch_cli.router.store import RouterArtifact, open_router
    from meswitch_cli.router.store.artifact import manifest_digest
    from meswitch_cli.router.train.data import read_examples
    from meswitch_cli.router.train.editing import add_expert, learn

    if feedback is not None:
        if expert is not None or data is not None:
            raise UsageError("--feedback goes without --expert and --data: its lines say whose they are")
        opened = RouterArtifact.open(router)
        edit = learn(opened, open_router(opened, base).backend, read_examples(feedback))
        return _finish(opened, edit, out, max_regression, as_json)
    if expert is None or data is None:
        raise UsageError("--expert NAME and --data FILE are needed, or --feedback FILE")
    examples = read_examples(data, domain=check_label(expert, "--expert"))
    digest = manifest_digest(find_artifact(artifact)) if artifact is not None else None
    opened = RouterArtifact.open(router)
    edit = add_expert(opened, open_router(opened, base).backend, expert, examples, digest=digest)
    _finish(opened, edit, out, max_regression, as_json)


@app.command(help="Remove an expert and its prompts.")
def remove(
    router: Annotated[Path, typer.Option(help="The router's folder.")],
    expert: Annotated[str, typer.Option(help="Name of the expert.")],
    out: Annotated[Path | None, typer.Option(help="Folder to make.", show_default="replaces the router")] = None,
    max_regression: Annotated[
        float, typer.Option(min=0, max=1, help="Refuse if another expert loses more recall than this.")
    ] = 0.02,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Needs neither the base nor any prompt."""
    from meswitch_cli.router.store.artifact import RouterArtifact
    from meswitch_cli.router.train.editing import remove_expert

    opened = RouterArtifact.open(router)
    _finish(opened, remove_expert(opened, expert), out, max_regression, as_json)


@app.command(name="eval", help="Measure a router on labelled prompts that it was not trained on.")
def evaluate(
    router: Annotated[Path, typer.Option(help="The router's folder.")],
    data: Annotated[list[Path], typer.Option(help="JSONL as train-router takes it.")],
    base: Annotated[str | None, typer.Option(help="The shared base; a probe needs it.", show_default="none")] = None,
    artifact: Annotated[
        list[str] | None,
        typer.Option(help="NAME=DIR of every expert: adds their loss on the data's responses, however chosen."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for report.json, report.md and plots.", show_default="none")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Figures are of the data given; the training report, on the router's own test part, lies in its folder."""
    from meswitch_cli.artifact.disk import disk_errors, write_atomically
    from meswitch_cli.commands.router_progress import router_progress
    from meswitch_cli.commands.router_tables import print_report
    from meswitch_cli.commands.train_router import pairs
    from meswitch_cli.hub.fetch import find_artifact
    from meswitch_cli.router.store import RouterArtifact, open_router
    from meswitch_cli.router.train.data import only_known_domains, read_examples, without_duplicates
    from meswitch_cli.router.train.evaluation import evaluation_report
    from meswitch_cli.router.train.report import markdown, plots

    models = {name: find_artifact(path) for name, path in pairs(artifact or [], "--artifact").items()}
    examples, _ = without_duplicates([item for path in data for item in read_examples(path)])
    opened = RouterArtifact.open(router)
    only_known_domains(examples, opened.manifest.labels)
    with router_progress() as on_progress:
        report = evaluation_report(opened, open_router(opened, base), examples, models, base, on_progress)
    if out is not None:
        with disk_errors(out):
            out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "report.json", (json.dumps(report, indent=1) + "\n").encode())
        write_atomically(out / "report.md", markdown(report).encode())
        for name, picture in plots(report).items():
            write_atomically(out / name, picture)
    if as_json:
        typer.echo(json.dumps(report))
    else:
        print_report(report)


def _finish(opened: RouterArtifact, edit: Edit, out: Path | None, max_regression: float, as_json: bool) -> None:
    """Refuse or write, then print."""
    from meswitch_cli.commands.router_tables import print_edit
    from meswitch_cli.router.store.artifact import write_router

    edit.refuse_regression(max_regression)
    target = out or opened.path
    written = write_router(
        target, edit.manifest, edit.model, None, edit.store, known=edit.known, source=opened, force=out is None
    )
    if as_json:
        figures = {"before": edit.before, "after": edit.after, "added": edit.added}
        seconds = {"feature_seconds": edit.feature_seconds, "refit_seconds": edit.refit_seconds}
        typer.echo(json.dumps({"router": str(target), "bytes": written.nbytes} | figures | seconds))
    else:
        print_edit(edit)
        typer.echo(f"{target}: {', '.join(written.manifest.labels)}")
