"""`meswitch eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from meswitch_cli.evaluation.baselines import BASELINES

#: Help's panels, and the options in each; the others come first.
PANELS = {
    "What is measured": ("text", "tasks", "include_path", "allow_task_code", "exact_match", "max_new_tokens", "limit"),
    "What is compared": ("baseline", "calibration", "router", "server", "server_model"),
    "Judgement": ("margin", "min_recovery", "max_kld"),
    "Arithmetic": ("mode", "dtype", "device", "seed"),
}


def run(
    base: Annotated[str, typer.Option(help="The base model: a checkpoint folder, or a Hub id.")],
    expert: Annotated[
        list[str], typer.Option(help="A full fine-tune, FOLDER or LABEL=FOLDER; give it again for more experts.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for report.json, report.md and report.html.")],
    artifact: Annotated[
        list[Path] | None, typer.Option(help="A compressed expert; again for more, of the same expert or of others.")
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(help=f"Another method beside it, NAME[:option=value,...]: {', '.join(BASELINES)}."),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            help='Held-out data, [LABEL=]FILE: JSONL with "prompt" and "response" or "messages" (answers count), or '
            "plain text. LABEL names the expert whose own prompts they are."
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            help="lm-evaluation-harness tasks, [LABEL=]NAME,...: YAML files, meswitch_maths, meswitch_code, "
            "meswitch_logic, meswitch_maths_choice, meswitch_logic_choice, or public names."
        ),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder with more tasks: YAML files and their JSONL.")
    ] = None,
    allow_task_code: Annotated[
        bool, typer.Option("--allow-task-code", help="Let task files run the Python that comes with them.")
    ] = False,
    margin: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Difference of task scores that you agree is small.")
    ] = 0.02,
    router: Annotated[
        Path | None,
        typer.Option(help="A router of these experts: also measure what its choices are worth on the labelled data."),
    ] = None,
    server: Annotated[
        str | None, typer.Option(help="Also run generating tasks on an OpenAI-compatible server at this URL.")
    ] = None,
    server_model: Annotated[
        str | None, typer.Option(help="The server's model.", show_default="each expert's label")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="JSONL for baselines that need activations; not the held-out data.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Examples used of each file and task, the first ones.")
    ] = None,
    exact_match: Annotated[
        bool,
        typer.Option(
            "--exact-match", help='Also let every model answer the prompts of --text that have an "answer", greedily.'
        ),
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer for --exact-match.")] = 128,
    min_recovery: Annotated[
        float | None, typer.Option(help="Exit with 1 where less than this part of the gap is recovered, 0.99 say.")
    ] = None,
    max_kld: Annotated[
        float | None, typer.Option(help="Exit with 1 where the mean KL to the full expert exceeds this, nats a token.")
    ] = None,
    mode: Annotated[
        Literal["auto", "resident", "stream"],
        typer.Option(help="resident holds one model in memory, stream one layer; auto: by the free memory."),
    ] = "auto",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],
        typer.Option(help="Arithmetic of all models; below float32, rounding hides small differences."),
    ] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of resampling and of random baselines.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace an evaluation that is in --out.")] = False,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the whole report.md, as where the output is no terminal.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Compares base, full expert and compressed expert on the same tokens; exit status 1 if a limit is missed.

    Example: meswitch eval --base ./llama --expert ./maths --artifact ./maths-1bit --text held-out.jsonl --out ./eval
    """
    import sys

    from meswitch_cli.commands.console import say
    from meswitch_cli.commands.eval_tables import judgements, print_tables
    from meswitch_cli.evaluation import Request, evaluate
    from meswitch_cli.evaluation.markdown import markdown
    from meswitch_cli.model.device import choose_device
    from meswitch_cli.model.dtype import DTYPES

    request = Request(
        base=base,
        experts=tuple(expert),
        out=out,
        artifacts=tuple(artifact or ()),
        baselines=tuple(baseline or ()),
        texts=tuple(text or ()),
        tasks=tuple(tasks or ()),
        include_path=include_path,
        allow_task_code=allow_task_code,
        margin=margin,
        router=router,
        server=server,
        server_model=server_model,
        calibration=calibration,
        limit=limit,
        exact_match=exact_match,
        max_new_tokens=max_new_tokens,
        device=choose_device(device),
        dtype=DTYPES[dtype],
        mode=None if mode == "auto" else mode,
        seed=seed,
        min_recovery=min_recovery,
        max_kld=max_kld,
        force=force,
    )

    def announce(what: str) -> None:
        typer.echo(f"eval: {what}", err=True)

    report = evaluate(request, announce)
    value = report.to_dict()
    if as_json:
        typer.echo(json.dumps(value))
    elif as_markdown or not sys.stdout.isatty():
        typer.echo(markdown(value))
    else:
        print_tables(value)
    if not as_json:
        for sentence in judgements(value):
            say(sentence)
        typer.echo(f"every figure, with pictures: {out / 'report.html'}", err=True)
    for problem in report.errors:
        typer.secho(f"error: {problem['where']}: {problem['message']}", err=True, fg=typer.colors.RED)
    for gate in report.gates:
        if not gate["passed"]:
            typer.secho(
                f"error: --{gate['gate']} {gate['limit']:g}: {gate['model']} on {gate['set']} has {gate['value']}",
                err=True,
                fg=typer.colors.RED,
            )
    if not report.passed:
        raise typer.Exit(1)
