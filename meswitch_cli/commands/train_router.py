"""`meswitch train-router`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated

import typer

from meswitch_cli.names import GateMode
from meswitch_cli.router.backends import Kind

#: Help's panels, and the options in each; the others come first.
PANELS = {
    "Prompts": ("data", "expert", "artifact", "auto", "auto_label", "max_prompts", "max_tokens"),
    "Features": ("backend", "model", "layer", "lm_steps", "seed"),
    "Decision": ("fallback", "target_precision", "gate", "sticky_margin"),
}


def run(
    out: Annotated[Path, typer.Option(help="Folder to make; must not exist, or be a router and --force given.")],
    base: Annotated[
        str | None,
        typer.Option(help="The shared base, folder or Hub id; the probe reads it.", show_default="none"),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(help='JSONL whose lines have "prompt" or "messages", and "domain" (null: no expert\'s).'),
    ] = None,
    expert: Annotated[
        list[str] | None, typer.Option(help="NAME=FILE: JSONL whose every prompt is of this expert's domain.")
    ] = None,
    artifact: Annotated[
        list[str] | None,
        typer.Option(help="NAME=DIR: the expert itself; its hash is kept, and --auto-label needs it."),
    ] = None,
    backend: Annotated[Kind, typer.Option(help="What makes features of prompts.")] = "probe",
    model: Annotated[
        Path | None,
        typer.Option(help="Folder of the sentence encoder, or of the small causal LM.", show_default="lm: the base"),
    ] = None,
    layer: Annotated[
        str, typer.Option(help="Decoder layer that the probe reads, 1 the first; auto: chosen on validation.")
    ] = "auto",
    max_prompts: Annotated[
        int, typer.Option(min=20, help="Of a domain that has more, so many are taken, spread over its groups.")
    ] = 500,
    max_tokens: Annotated[int, typer.Option(help="Tokens of a prompt that are read; the middle is cut.")] = 256,
    fallback: Annotated[str, typer.Option(help="Where prompts go that pass no gate: base, or an expert.")] = "base",
    target_precision: Annotated[
        float, typer.Option(help="Of what is routed, this share must be right; sets the confidence threshold.")
    ] = 0.95,
    gate: Annotated[
        GateMode,
        typer.Option(help="How much is refused: strict, all that is doubtful; off, nothing; serve may differ."),
    ] = "normal",
    sticky_margin: Annotated[
        float, typer.Option(help="A session leaves its expert for one that is likelier by this much.")
    ] = 0.2,
    auto_label: Annotated[
        bool, typer.Option("--auto-label", help="Label (prompt, response) pairs by the experts' loss on the response.")
    ] = False,
    auto: Annotated[
        bool,
        typer.Option("--auto", help="An --artifact without prompts gets those of its model card and of its field."),
    ] = False,
    lm_steps: Annotated[int, typer.Option(min=1, help="Most optimiser steps of the lm backend, 8 prompts each.")] = 240,
    seed: Annotated[int, typer.Option(help="Of the split, the gates and the lm backend.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace the router that is there.")] = False,
    no_excerpts: Annotated[
        bool, typer.Option("--no-excerpts", help="Keep no beginnings of prompts, which `route --explain` shows.")
    ] = False,
    plot: Annotated[bool, typer.Option("--plot", help="Add report.png and report.svg.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Its report lies in the router's folder as report.md and report.json.

    What an interrupted training has read of the prompts is not read again: give the same options once more.

    Example: meswitch train-router --base ./llama --data prompts.jsonl --out ./router
    """
    from meswitch_cli.commands.next_steps import after_training, print_next
    from meswitch_cli.commands.router_progress import announce, router_progress
    from meswitch_cli.commands.router_tables import print_report
    from meswitch_cli.errors import UsageError
    from meswitch_cli.hub.fetch import find_artifact
    from meswitch_cli.router.decide.labels import check_label
    from meswitch_cli.router.store.artifact import manifest_digest, write_router
    from meswitch_cli.router.train.auto import examples_from_card
    from meswitch_cli.router.train.autolabel import label_by_loss
    from meswitch_cli.router.train.data import gather, read_examples, thinned
    from meswitch_cli.router.train.losses import expert_losses
    from meswitch_cli.router.train.report import markdown, plots
    from meswitch_cli.router.train.settings import TrainingSettings
    from meswitch_cli.router.train.training import train_router

    files = pairs(expert or [], "--expert")
    models = {name: find_artifact(path) for name, path in pairs(artifact or [], "--artifact").items()}
    if not data and not files and not (auto and models):
        raise UsageError("--data FILE or --expert NAME=FILE is needed: prompts to learn from; or --auto and --artifact")
    if layer != "auto" and (not layer.isdecimal() or int(layer) < 1):
        raise UsageError(f"--layer must be auto or a number from 1, not {layer!r}")
    settings = TrainingSettings(
        backend=backend,
        layer=None if layer == "auto" else int(layer),
        max_tokens=max_tokens,
        fallback=fallback,
        target_precision=target_precision,
        sticky_margin=sticky_margin,
        gate=gate,
        excerpts=not no_excerpts,
        lm_steps=lm_steps,
        seed=seed,
    )
    examples = [item for path in data or [] for item in read_examples(path, need_domain=not auto_label)]
    for name, path in files.items():
        examples += read_examples(path, domain=check_label(name, "--expert"))
    given = {item.domain for item in examples}
    for name, path in models.items() if auto else ():
        if name not in given:
            found = examples_from_card(name, path)
            announce(f"{name}: {len(found)} prompts of its card and of its field; some of your own make it surer")
            examples += found
    digests = {check_label(name, "--artifact"): manifest_digest(path) for name, path in models.items()}
    if auto_label:
        if len(models) < 2:
            raise UsageError("--auto-label needs the experts: --artifact NAME=DIR for at least two")
        unlabelled = [item for item in examples if item.domain is None]
        labels = label_by_loss(unlabelled, expert_losses(models, unlabelled, base))
        examples = [item for item in examples if item.domain is not None] + list(labels.examples)
        counts = ", ".join(f"{name} {count}" for name, count in labels.certain.items())
        announce(f"labelled by loss: {counts}; {labels.uncertain} too close to call, used for training alone")
    gathered = gather(examples)
    if gathered.duplicates:
        announce(f"{gathered.duplicates} duplicates dropped")
    gathered, had = thinned(gathered, max_prompts, seed)
    for name, count in had.items():
        which = "no domain" if name == "None" else name
        announce(f"{which}: {max_prompts} of {count} prompts are taken; --max-prompts takes more, and longer")
    read = read_ahead_folder(out)
    if read.is_dir():
        announce(f"an interrupted training has left hidden states in {read}; what fits is not read again")
    with router_progress() as on_progress:
        trained = train_router(
            gathered,
            settings,
            base=base,
            model=model,
            experts=digests,
            read_ahead=read,
            on_progress=on_progress,
        )
    cut = trained.report["cut_prompts"]
    if cut:
        announce(f"{cut} prompts are longer than {max_tokens} tokens and were cut; --max-tokens reads more of them")
    written = write_router(
        out,
        trained.manifest,
        trained.router.model,
        trained.backend,
        trained.store,
        known=trained.known,
        report={"report.json": json.dumps(trained.report, indent=1) + "\n", "report.md": markdown(trained.report)},
        plots=plots(trained.report) if plot else None,
        force=force,
    )
    shutil.rmtree(read, ignore_errors=True)
    if as_json:
        typer.echo(json.dumps({"router": str(out), "bytes": written.nbytes} | trained.report))
    else:
        print_report(trained.report)
        typer.echo(f"{out}: a router of {written.nbytes:,} bytes")
        print_next(after_training(base, out, written.manifest.labels, models))


def read_ahead_folder(out: Path) -> Path:
    """Where the hidden states of a training lie until its router is there: beside the router, hidden."""
    out = out.expanduser().absolute()
    return out.parent / f".{out.name}.read"


def pairs(values: list[str], option: str) -> dict[str, Path]:
    """NAME=PATH options as a mapping. Raises UsageError for any other form and for a name given twice."""
    from meswitch_cli.errors import UsageError
    from meswitch_cli.paths import user_path

    result: dict[str, Path] = {}
    for value in values:
        name, separator, path = value.partition("=")
        if not separator or not name or not path:
            raise UsageError(f"{option} {value!r}: must be NAME=PATH")
        if name in result:
            raise UsageError(f"{option}: {name!r} is given twice")
        result[name] = user_path(path)
    return result
