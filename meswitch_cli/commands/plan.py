"""`meswitch plan`."""

from __future__ import annotations

import json
from typing import Annotated, Literal

import typer

from meswitch_cli.commands.compress import Bits, Rate, rate
from meswitch_cli.delta.codes import CodeName


def run(
    base: Annotated[str, typer.Option(help="The base: a folder or a Hub id.")],
    experts: Annotated[int, typer.Option(min=1, help="How many experts are to be served.")],
    device_memory: Annotated[str, typer.Option(help="Memory of the device, as 80GB or 24GiB.")],
    bits: Annotated[
        Rate,
        typer.Option(help="Bits a weight of the experts' linear layers; a slot holds 1 where fewer are stored."),
    ] = "2",
    code: Annotated[
        CodeName | None,
        typer.Option(help="As for compress; a slot holds 2 bits of a trellis code at 1.", show_default="scalar from 1"),
    ] = None,
    slots: Annotated[int | None, typer.Option(min=1, help="Experts on the device at once.", show_default="all")] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens of a request, prompt and continuation together.")] = 4096,
    salient: Annotated[int, typer.Option(min=0, help="Input channels a tensor keeps in 16 bit.")] = 8,
    rank: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Leading singular directions a tensor keeps beside its codes.",
            show_default="16 up to 1 bit, else 0",
        ),
    ] = None,
    group_size: Annotated[int, typer.Option(min=0, help="Input channels that share a step; 0: a whole row.")] = 0,
    embedding_bits: Annotated[
        Bits | None,
        typer.Option(help="Bits a weight of embedding and head.", show_default="2, or --bits if more"),
    ] = None,
    added_rows: Annotated[int, typer.Option(min=0, help="Vocabulary rows that an expert added, at most.")] = 0,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Type of the weights and the cache.")
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """From metadata alone: no weight is read. Exit status 1 where the experts do not fit."""
    from meswitch_cli.checkpoint.checkpoint import Checkpoint
    from meswitch_cli.compression.settings import CompressionSettings
    from meswitch_cli.engine.memory import parse_bytes, plan_memory

    settings = CompressionSettings.with_defaults(
        bits=rate(bits),
        code=code,
        salient=salient,
        rank=rank,
        group_size=group_size,
        embedding_bits=int(embedding_bits) if embedding_bits else None,
    )
    plan = plan_memory(
        Checkpoint.describe(base),
        settings.by_kind(),
        device_nbytes=parse_bytes(device_memory),
        experts=experts,
        slots=slots,
        context=context,
        dtype=dtype,
        added_rows=added_rows,
    )
    fits = plan.requests > 0
    result = {
        "fits": fits,
        "device_bytes": plan.device_nbytes,
        "base_bytes": plan.base_nbytes,
        "slot_bytes": plan.slot_nbytes,
        "slots": plan.slots,
        "slots_bytes": plan.slots_nbytes,
        "most_slots": plan.most_slots,
        "cache_token_bytes": plan.token_nbytes,
        "cache_tokens": plan.cache_tokens,
        "requests": plan.requests,
        "experts": plan.experts,
        "context": plan.context,
    }
    if as_json:
        typer.echo(json.dumps(result))
    else:
        gigabytes = 1e9
        typer.echo(f"base              {plan.base_nbytes / gigabytes:9.3f} GB")
        typer.echo(
            f"{plan.slots} slots".ljust(17)
            + f" {plan.slots_nbytes / gigabytes:9.3f} GB  ({plan.slot_nbytes / gigabytes:.3f} GB each)"
        )
        typer.echo(
            f"left              {plan.left_nbytes / gigabytes:9.3f} GB  of {plan.device_nbytes / gigabytes:g} GB"
        )
        if fits:
            many = f"{plan.requests:,} requests of {plan.context:,} at once"
            typer.echo(f"cache             {plan.cache_tokens:,} tokens: {many}")
        typer.echo(f"at most           {plan.most_slots} slots beside one request of {plan.context:,} tokens")
        if plan.slots < plan.experts:
            typer.echo(f"{plan.experts - plan.slots} of {plan.experts} experts wait in host memory or on disk")
        if not fits:
            way_out = f"lower --slots to {plan.most_slots}, or --context"
            typer.echo(f"does not fit: {way_out if plan.most_slots else 'not even one slot'}", err=True)
    if not fits:
        raise typer.Exit(1)
