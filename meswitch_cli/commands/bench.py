"""`meswitch bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from rich.table import Table

#: Help's panels, and the options in each; the others come first.
PANELS = {
    "Workload": ("requests", "concurrency", "popularity", "zipf_exponent", "prompts", "prompt_words", "seed"),
    "Answers": ("max_tokens", "ignore_eos", "temperature"),
}


def run(
    url: Annotated[str, typer.Option(help="An OpenAI-compatible server.")] = "http://127.0.0.1:8000",
    model: Annotated[
        list[str] | None, typer.Option(help="A model to ask. Repeatable.", show_default="every expert that it serves")
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="How many.")] = 64,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight at once.")] = 8,
    popularity: Annotated[
        Literal["uniform", "zipf"],
        typer.Option(help="How often each model is asked; zipf: the r-th of the list in proportion to 1/r."),
    ] = "uniform",
    zipf_exponent: Annotated[float, typer.Option(min=0, help="zipf: in proportion to r to the minus this.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 64,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Exactly --max-tokens, where the server knows ignore_eos.")
    ] = False,
    prompts: Annotated[
        Path | None, typer.Option(help='JSONL whose lines have "prompt" or "text".', show_default="random words")
    ] = None,
    prompt_words: Annotated[int, typer.Option(min=1, help="Words of a random prompt.")] = 32,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    api_key_file: Annotated[
        Path | None, typer.Option(help="A file with the server's key.", show_default="none")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of models and random prompts.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Draw latencies by expert: a .png or .svg.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Exit status 1 where a request failed, or nothing was measured.

    Example: meswitch bench --url http://127.0.0.1:8000 --concurrency 16 --popularity zipf --plot load.png
    """
    from meswitch_cli.commands.extras import require_extra

    require_extra("serve", "httpx2")
    import asyncio
    import time

    from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn

    from meswitch_cli.client import Endpoint, figures, make_workload, run_load
    from meswitch_cli.client.figures import check_plot
    from meswitch_cli.client.figures import plot as draw
    from meswitch_cli.client.workload import read_prompts
    from meswitch_cli.commands.console import console, progress_bar
    from meswitch_cli.errors import MeswitchError
    from meswitch_cli.server.settings import read_keys

    if plot is not None:
        check_plot(plot)
    endpoint = Endpoint(url, read_keys(api_key_file)[0] if api_key_file else None)
    workload = make_workload(
        model or endpoint.experts(),
        requests=requests,
        concurrency=concurrency,
        max_tokens=max_tokens,
        popularity=popularity,
        zipf_exponent=zipf_exponent,
        prompts=read_prompts(prompts) if prompts else (),
        prompt_words=prompt_words,
        temperature=temperature,
        ignore_eos=ignore_eos,
        seed=seed,
    )
    with progress_bar(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task("requests", total=requests)
        started = time.perf_counter()
        outcomes = asyncio.run(run_load(endpoint, workload, lambda outcome: progress.advance(task)))
        seconds = time.perf_counter() - started
    result: dict[str, Any] = {
        "url": url,
        "concurrency": concurrency,
        "popularity": popularity,
        "max_tokens": max_tokens,
    }
    result |= figures(outcomes, seconds)
    if as_json:
        typer.echo(json.dumps(result))
    else:
        console().print(_table(result))
    if plot is not None and result["requests"]:
        draw(outcomes, plot)
    if result["failed"]:
        why = next(iter(result["errors"]))
        raise MeswitchError(f"{result['failed']} of {requests} requests failed, most of them: {why}")
    if not result["completion_tokens"]:
        raise MeswitchError(f"{url}: every answer was empty, so nothing was measured")


def _table(result: dict[str, Any]) -> Table:
    from meswitch_cli.commands.console import table

    title = f"{result['requests']} requests in {result['seconds']:.1f} s, {result['concurrency']} at once; times in ms"
    columns = ("model", "requests", "failed", "tokens/s", "TTFT p50", "p99", "ITL p50", "p99")
    shown = table(title, *columns)
    for name, row in (*result["experts"].items(), ("all", result)):
        times = [
            f"{row[kind][which]:,.1f}" if row[kind] else ""
            for kind in ("ttft_ms", "itl_ms")
            for which in ("p50", "p99")
        ]
        shown.add_row(name, str(row["requests"]), str(row["failed"]), f"{row['tokens_per_second']:,.1f}", *times)
    return shown
