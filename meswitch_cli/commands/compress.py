"""`meswitch compress`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from meswitch_cli.delta.codes import RATES, CodeName

if TYPE_CHECKING:
    Rate = str
    LinearRate = str
    Factors = str
else:
    Rate = Literal[tuple(map(str, RATES))]
    LinearRate = Literal[tuple(map(str, (0, *RATES)))]
    Factors = Literal["4", "8", "16"]

#: Help's panels, and the options in each; the others come first.
PANELS = {
    "Codes": (
        "bits",
        "code",
        "salient",
        "rank",
        "factor_bits",
        "group_size",
        "channel_scale",
        "embedding_bits",
        "embedding_rank",
        "size",
        "target_bits",
        "exact",
    ),
    "Rounding and steps": ("rounding", "steps", "calibration", "samples", "sequence_length", "seed"),
}


EMBEDDING_DEFAULT = "as --bits, but 0.25 at least; 1 beside 2, 2 beside 4"
EMBEDDING_RANK_DEFAULT = "16; 0 with --rank 0 or --exact"


def rate(text: str) -> float:
    """What one of `Rate` stands for."""
    return int(text) if text.isdecimal() else float(text)


def run(
    base: Annotated[str, typer.Option(help="The base model: a checkpoint folder, or a Hub id (owner/name@revision).")],
    expert: Annotated[str, typer.Option(help="The fine-tune of it: a folder or a Hub id; a LoRA adapter will do.")],
    out: Annotated[Path, typer.Option(help="Folder to make; must not exist, or be an artifact and --force given.")],
    bits: Annotated[
        LinearRate | None,
        typer.Option(
            help="Bits a weight of the linear layers: below 1 by trellis codes, from 1 by scalar ones; 0: the leading "
            "directions alone, for a merged LoRA.",
            show_default="1",
        ),
    ] = None,
    code: Annotated[
        CodeName | None,
        typer.Option(help="At 1 bit: trellis chooses among four levels.", show_default="scalar from 1 bit"),
    ] = None,
    salient: Annotated[
        int | None,
        typer.Option(
            min=0, help="Input channels a tensor keeps in 16 bit: those whose rounding costs most.", show_default="8"
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Leading singular directions of a tensor kept, beside its codes if it has any.",
            show_default="16",
        ),
    ] = None,
    factor_bits: Annotated[
        Factors | None,
        typer.Option(
            help="Bits of each number in the factors of a LoRA adapter, or of the directions (--rank).",
            show_default="adapter 16; directions 8, beside codes below 2 bits 4",
        ),
    ] = None,
    exact: Annotated[
        bool,
        typer.Option(
            "--exact",
            help="Store the expert bit for bit. Without options of a code this is chosen where it is smallest; "
            "with it, --bits and the like say what code an engine makes of the expert.",
            show_default="where smaller",
        ),
    ] = False,
    group_size: Annotated[
        int, typer.Option(min=0, help="Input channels that share a step, a multiple of 32; 0: a whole row shares one.")
    ] = 0,
    channel_scale: Annotated[
        Literal["none", "rms"] | None,
        typer.Option(
            help="Scale input channels by the RMS of the delta's column.",
            show_default="rms for 1-bit scalar codes, else none",
        ),
    ] = None,
    rounding: Annotated[
        Literal["nearest", "feedback"],
        typer.Option(help="feedback passes rounding errors on (GPTQ); needs calibration data."),
    ] = "nearest",
    steps: Annotated[
        Literal["least-squares", "unbiased", "output-unbiased", "layerwise", "distill"] | None,
        typer.Option(
            help="How steps are fitted. unbiased keeps the delta's length, output-unbiased that of its outputs; "
            "layerwise and distill need calibration data, distill also holds both models in memory.",
            show_default="output-unbiased",
        ),
    ] = None,
    embedding_bits: Annotated[
        Rate | None,
        typer.Option(help="Bits a weight of embedding and head.", show_default=EMBEDDING_DEFAULT),
    ] = None,
    embedding_rank: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Leading singular directions kept of embedding and head, beside their codes.",
            show_default=EMBEDDING_RANK_DEFAULT,
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="Bytes the tensors may take, as 300MB: bits, rank and salient channels are chosen tensor by tensor.",
            show_default="what --bits takes",
        ),
    ] = None,
    target_bits: Annotated[
        float | None,
        typer.Option(help="The same, in bits a weight of the whole model.", show_default="what --bits takes"),
    ] = None,
    calibration: Annotated[
        str,
        typer.Option(
            help='JSONL whose lines have "text", "prompt" and "response", or "messages"; random: a few random tokens, '
            "which find most salient channels without data; none: no calibration.",
        ),
    ] = "random",
    samples: Annotated[int, typer.Option(min=1, help="Calibration windows used.")] = 128,
    sequence_length: Annotated[int, typer.Option(min=8, help="Tokens of a calibration window.")] = 512,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    seed: Annotated[int, typer.Option(help="Order of the calibration data, or the random tokens.")] = 0,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the artifact there, and drop unfinished work with other settings.")
    ] = False,
    keep_weak: Annotated[
        bool,
        typer.Option("--keep-weak", help="Write the artifact even if it is farther from the expert than the base is."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """An interrupted run loses at most one decoder layer: the same command goes on, and ends with the same bytes.

    Example: meswitch compress --base ./llama --expert ./llama-maths --out ./maths-1bit
    """
    from meswitch_cli.commands.console import say, working

    with working("reading both models' headers"):  # and the libraries, which take seconds to load
        from meswitch_cli.artifact.workspace import require_free
        from meswitch_cli.commands import report
        from meswitch_cli.commands.host_memory import share_one_arena
        from meswitch_cli.commands.next_steps import after_compress, print_next
        from meswitch_cli.commands.notes import print_notes
        from meswitch_cli.commands.progress import work_progress
        from meswitch_cli.commands.verdict import verdict
        from meswitch_cli.compression.form import choose_form
        from meswitch_cli.compression.job import compress, prepare
        from meswitch_cli.compression.settings import CompressionSettings
        from meswitch_cli.compression.windows import calibration_asked
        from meswitch_cli.engine.memory import parse_bytes
        from meswitch_cli.errors import Interrupted
        from meswitch_cli.model.device import choose_device

        share_one_arena()
        budget = parse_bytes(size, "--size") if size else None
        require_free(out, force=force)
        chosen = choose_device(device)
        data, recorded = calibration_asked(calibration)
        options: dict[str, Any] = {
            "bits": rate(bits) if bits else None,
            "code": code,
            "salient": salient,
            "rank": rank,
            "group_size": group_size,
            "channel_scale": channel_scale,
            "rounding": rounding,
            "steps": steps,
            "embedding_bits": rate(embedding_bits) if embedding_bits else None,
            "embedding_rank": embedding_rank,
            "factor_bits": int(factor_bits) if factor_bits else None,
            "exact": exact,
            "calibration": recorded,
            "samples": samples,
            "sequence_length": sequence_length,
            "seed": seed,
            "size": budget,
            "target_bits": target_bits,
        }
        job = prepare(base, expert, out, CompressionSettings.with_defaults(**options), data)
        job, sizes = choose_form(job, options)
    if not as_json:
        report.print_plan(job)
        if sizes and sizes.best != "code":
            report.print_form(sizes)
    notes = job.notes()
    print_notes(notes)
    weak: list[str] = []
    try:
        with work_progress(job.nbytes, len(job.plan.units)) as on_progress:
            manifest = compress(
                job, device=chosen, force=force, keep_weak=keep_weak, on_progress=on_progress, on_note=weak.append
            )
    except KeyboardInterrupt:
        raise Interrupted("stopped; the same command goes on from the last finished layer") from None
    print_notes(weak)
    if as_json:
        figures = report.summary(manifest, job.expert.nbytes)
        chosen_by = {"expected_bytes": asdict(sizes)} if sizes else {}
        typer.echo(json.dumps({"artifact": str(out)} | figures | chosen_by | {"warnings": [*notes, *weak]}))
    else:
        report.print_summary(manifest, job.expert.nbytes)
        report.print_worst_layers(manifest)
        for sentence in () if weak else verdict(manifest):
            say(sentence)
        typer.echo(f"{out}")
        if manifest.tensors:
            print_next(after_compress(base, expert, out))
