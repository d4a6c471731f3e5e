"""`meswitch plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from meswitch_cli.commands.compress import EMBEDDING_DEFAULT, EMBEDDING_RANK_DEFAULT, LinearRate, Rate, rate
from meswitch_cli.delta.codes import CodeName

if TYPE_CHECKING:
    from meswitch_cli.engine.memory import MemoryPlan
    from meswitch_cli.engine.speed import KnownCard, StepTime

#: Help's panels, and the options in each; the others come first.
PANELS = {
    "The experts": (
        "bits",
        "code",
        "salient",
        "rank",
        "exact",
        "adapter_rank",
        "group_size",
        "embedding_bits",
        "embedding_rank",
        "artifact",
        "added_rows",
    ),
    "Serving": ("slots", "context", "dtype", "card", "requests"),
}


def run(
    base: Annotated[str, typer.Option(help="The base: a folder or a Hub id.")],
    experts: Annotated[int, typer.Option(min=1, help="How many experts are to be served.")],
    device_memory: Annotated[str, typer.Option(help="Memory of the device, as 80GB or 24GiB.")],
    bits: Annotated[
        LinearRate | None,
        typer.Option(
            help="Bits a weight of the experts' linear layers, on disk and in a slot of a GPU; 0: directions alone, as "
            "for compress.",
            show_default="1; 2 with --exact",
        ),
    ] = None,
    code: Annotated[
        CodeName | None,
        typer.Option(help="As for compress.", show_default="scalar from 1"),
    ] = None,
    slots: Annotated[int | None, typer.Option(min=1, help="Experts on the device at once.", show_default="all")] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens of a request, prompt and continuation together.")] = 4096,
    exact: Annotated[
        bool, typer.Option("--exact", help="The experts are stored bit for bit, and coded when they are loaded.")
    ] = False,
    salient: Annotated[
        int | None,
        typer.Option(min=0, help="Input channels a tensor keeps in 16 bit.", show_default="8; 0 with --exact"),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Leading singular directions a tensor keeps, beside its codes if it has any.",
            show_default="16",
        ),
    ] = None,
    adapter_rank: Annotated[
        int | None,
        typer.Option(min=1, help="The experts are LoRA adapters of this rank, on every linear layer, nothing else."),
    ] = None,
    group_size: Annotated[int, typer.Option(min=0, help="Input channels that share a step; 0: a whole row.")] = 0,
    embedding_bits: Annotated[
        Rate | None,
        typer.Option(help="Bits a weight of embedding and head.", show_default=EMBEDDING_DEFAULT),
    ] = None,
    embedding_rank: Annotated[
        int | None,
        typer.Option(min=0, help="Leading directions kept of embedding and head.", show_default=EMBEDDING_RANK_DEFAULT),
    ] = None,
    artifact: Annotated[
        list[Path] | None,
        typer.Option(help="Experts are like this artifact, whatever --bits and the like say; repeatable."),
    ] = None,
    added_rows: Annotated[int, typer.Option(min=0, help="Vocabulary rows that an expert added, at most.")] = 0,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Type of the weights and the cache.")
    ] = "auto",
    card: Annotated[
        str | None,
        typer.Option(help="Also how fast, on a card of this name or part of it, as H200.", show_default="not reckoned"),
    ] = None,
    requests: Annotated[
        int | None, typer.Option(min=1, help="Requests that generate at once.", show_default="one an expert")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """From metadata alone: no weight is read. Exit status 1 where the experts do not fit.

    Where tensors have rates of their own, as compress --size chooses them, give --artifact: a slot holds any of them.
    """
    from meswitch_cli.artifact.artifact import Artifact
    from meswitch_cli.checkpoint.checkpoint import Checkpoint
    from meswitch_cli.compression.settings import CompressionSettings
    from meswitch_cli.engine.memory import parse_bytes, plan_memory
    from meswitch_cli.engine.speed import find_card
    from meswitch_cli.errors import UsageError

    if card and adapter_rank:
        raise UsageError("--card: how fast adapters are was not measured; leave it out with --adapter-rank")
    nbytes = parse_bytes(device_memory, "--device-memory")
    known = find_card(card) if card else None
    settings = CompressionSettings.with_defaults(
        bits=rate(bits) if bits else None,
        exact=exact,
        code=code,
        salient=salient,
        rank=rank,
        group_size=group_size,
        embedding_bits=rate(embedding_bits) if embedding_bits else None,
        embedding_rank=embedding_rank,
    )
    plan = plan_memory(
        Checkpoint.describe(base),
        settings.by_kind(),
        device_nbytes=nbytes,
        experts=experts,
        slots=slots,
        context=context,
        dtype=dtype,
        added_rows=added_rows,
        like=[Artifact.open(path).manifest for path in artifact or ()],
        adapter_rank=adapter_rank,
        messages=True,
    )
    fits = plan.requests > 0
    slot_bits = plan.bits or settings.linears().bits
    speed = _speed(plan, known, requests or experts, slot_bits) if known else None
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
        "speed": speed,
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
        if speed:
            typer.echo(_speed_lines(speed))
        if not fits:
            way_out = f"lower --slots to {plan.most_slots}, or --context"
            typer.echo(f"does not fit: {way_out if plan.most_slots else 'not even one slot'}", err=True)
    if not fits:
        raise typer.Exit(1)


def _speed(plan: MemoryPlan, card: KnownCard, requests: int, bits: float) -> dict[str, Any]:
    """Floor and expectation of three batches, each request half way through its context."""
    from meswitch_cli.engine.speed import DecodeBatch, load_seconds, prompt_rates, step_time

    active = min(requests, plan.experts, plan.slots)
    cached = plan.context // 2
    batches = [DecodeBatch(requests, 0, cached), DecodeBatch(1, 1, cached), DecodeBatch(requests, active, cached)]
    most, expected = prompt_rates(plan, card)
    return {
        "card": card.name,
        "measured": card.measured.commit if card.measured else None,
        "memory_bytes_per_second": card.memory,
        "cached_tokens": cached,
        "batches": [_batch(step_time(plan, card, batch, bits)) for batch in batches],
        "prompt_tokens_per_second": {"floor": most, "expected": expected},
        "load_seconds": load_seconds(plan, card),
    }


def _batch(time: StepTime) -> dict[str, Any]:
    return {
        "requests": time.batch.requests,
        "experts": time.batch.experts,
        "floor_seconds": time.floor,
        "floor_tokens_per_second": time.floor_rate,
        "expected_seconds": time.expected,
        "expected_tokens_per_second": time.expected_rate,
    }


def _speed_lines(speed: dict[str, Any]) -> str:
    lines = [
        f"on {speed['card']}, a step of requests with {speed['cached_tokens']:,} tokens each in the cache",
        f"{'':<30} {'no faster than':>26} {'expected':>26}",
    ]
    for batch in speed["batches"]:
        who = "the base" if not batch["experts"] else f"{batch['experts']} expert{'s'[: batch['experts'] != 1]}"
        many = f"{batch['requests']} request{'s'[: batch['requests'] != 1]} of {who}"
        lines.append(f"{many:<30} {_time(batch, 'floor')} {_time(batch, 'expected')}")
    prompt = speed["prompt_tokens_per_second"]
    rates = [f"{rate:,.0f} tokens/s" if rate else "not known" for rate in (prompt["floor"], prompt["expected"])]
    lines.append(f"{'prompts':<30} {rates[0]:>26} {rates[1]:>26}")
    if speed["load_seconds"]:
        lines.append(f"{'an expert from host memory':<30} {'':>26} {1e3 * speed['load_seconds']:>23.0f} ms")
    if speed["measured"]:
        lines.append(f"expected: by constants measured on this card, commit {speed['measured']}")
    else:
        lines.append("expected: not known, for meswitch was never measured on this card")
    return "\n".join(lines)


def _time(batch: dict[str, Any], which: str) -> str:
    seconds, rate = batch[f"{which}_seconds"], batch[f"{which}_tokens_per_second"]
    return f"{1e3 * seconds:8.2f} ms {rate:8,.0f} tok/s" if seconds else f"{'not known':>26}"
