"""What the artifact commands print: the plan before the work, the sizes and errors after it."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from meswitch_cli.artifact.manifest import Manifest, mean_errors
from meswitch_cli.artifact.served import served_code, slot_entries
from meswitch_cli.commands.console import console, counted, table
from meswitch_cli.delta.stored import TensorEntry

if TYPE_CHECKING:
    from meswitch_cli.compression.fine_tune import FineTune
    from meswitch_cli.compression.form import FormSizes
    from meswitch_cli.compression.plan import Job

WORST_LAYERS = 3


def megabytes(nbytes: float) -> str:
    """A size in megabytes, in kilobytes where that would be nothing."""
    return f"{nbytes / 1e6:,.1f} MB" if nbytes >= 1e5 or not nbytes else f"{nbytes / 1e3:,.1f} kB"


def print_plan(job: Job) -> None:
    """What will be done, from metadata alone; on stderr, since it is not the result."""
    from meswitch_cli.compression.size import expected_bytes
    from meswitch_cli.model.adapted import AdaptedCheckpoint

    out = console(stderr=True)
    out.print(f"base    {job.base.source.path}", soft_wrap=True)
    out.print(f"expert  {job.expert.source.path}", soft_wrap=True)
    title = f"{job.expert.source.id} against {job.base.source.id} ({job.plan.architecture.model_type})"
    shown = table(title, "kind", "tensors", "weights", "to")
    for kind in ("linear", "embedding", "head", "dense"):
        items = [item for item in job.plan.tensors if item.kind == kind]
        found = [job.settings.of(kind, unrelated=item.unrelated) for item in items]
        widths = {settings.bits for settings in found if settings}
        bits = "/".join(str(width) for width in sorted(widths))
        form = "16 bit if changed" if kind == "dense" else f"{bits} bit"
        if kind == "linear" and not job.settings.bits:
            form = f"rank {job.settings.rank} if changed"
        if job.settings.exact:
            form = "bit for bit if changed"
        if job.budget is not None and kind != "dense":
            form = "what each is worth"
        if isinstance(job.expert, AdaptedCheckpoint):
            changed = [job.expert.parameters[item.expert.parameter.name] for item in items]
            ranks = sorted({item.rank for item in changed if item.rank and not item.scales_rows})
            products = sum(bool(item.rank) and not item.scales_rows for item in changed)
            others = sum(item.changed for item in changed) - products
            form = f"{products} of rank {'/'.join(map(str, ranks))}" if products else "the base's"
            form += f", {others} in {bits or 16} bit" if others else ""
        if items:
            weights = sum(math.prod(item.shape) for item in items)
            shown.add_row(kind, str(len(items)), f"{weights:,}", form)
    out.print(shown)
    if job.plan.added_rows:
        out.print(f"new: {job.plan.added_rows} vocabulary rows, kept in 16 bit")
    for key, (ours, theirs) in job.config_differences().items():
        out.print(f"config differs: {key}: base {ours!r}, expert {theirs!r}", style="yellow")
    if job.settings.exact:
        out.print(f"size: what its changes take, of {megabytes(job.expert.nbytes)}")
        return
    at_most = "at most " if job.budget is not None or not job.settings.bits else ""
    out.print(f"expected size {at_most}{megabytes(expected_bytes(job))}, from {megabytes(job.expert.nbytes)}")


def print_form(sizes: FormSizes) -> None:
    """Why an expert is stored in another form than the default code without being asked; on stderr."""
    exact, code = megabytes(sizes.exact), megabytes(sizes.code)
    told = f"bit for bit, since that takes about {exact} and the default code {code}"
    if sizes.best == "product" and sizes.product is not None:
        told = (
            f"a merged LoRA of rank {sizes.rank}: stored as its products alone, about {megabytes(sizes.product)}, "
            f"where the default code takes {code} and bit for bit {exact}"
        )
    console(stderr=True).print(f"{told}; --bits 1 stores the code", soft_wrap=True)


def print_fine_tune(expert: str, base: str, found: FineTune) -> None:
    """What a delta is like, before it is compressed."""

    def percent(share: float | None, digits: int = 1) -> str:
        return "-" if share is None else f"{100 * share:.{digits}f} %"

    shown = table(f"{expert} against {base}", "of the decoder's linears", "")
    shown.add_row("weights that are the base's", percent(found.unchanged))
    shown.add_row("||delta|| / ||weights||", percent(found.relative_delta, 3))
    shown.add_row(f"energy in 16 directions, {found.sampled} tensors", percent(found.leading_energy))
    shown.add_row(f"energy in 64 directions, {found.sampled} tensors", percent(found.lora_energy))
    shown.add_row(f"energy that rounding to {found.expert_dtype} leaves", percent(found.rounding))
    exact = "-" if found.exact_bits is None else f"{found.exact_bits:.2f} bits a weight"
    shown.add_row("bit for bit (--exact)", exact)
    if found.sizes:
        told = f"{megabytes(found.sizes.exact)}, {megabytes(found.sizes.code)}"
        shown.add_row("all tensors bit for bit, in the default code", told)
        if found.sizes.product is not None:
            shown.add_row(f"as products of rank {found.rank} alone", megabytes(found.sizes.product))
    shown.add_row("type, base and expert", f"{found.base_dtype}, {found.expert_dtype}")
    shown.add_row("added tokens", str(found.added_tokens))
    shown.add_row("tensors that are the base's, of all", f"{found.unchanged_tensors} of {found.tensors}")
    console().print(shown)


def summary(manifest: Manifest, expert_nbytes: int | None = None) -> dict[str, Any]:
    """The figures of an artifact, as `--json` gives them; errors are relative to the delta's energy."""
    weights = sum(entry.numel for entry in manifest.tensors)
    result: dict[str, Any] = {
        "base": manifest.base.id,
        "base_fingerprint": manifest.base.fingerprint,
        "expert": manifest.expert.id,
        "model_type": manifest.model_type,
        "settings": dict(manifest.settings),
        "bytes": manifest.nbytes,
        "weights": weights,
        "bits_per_weight": 8 * manifest.nbytes / weights if weights else 0.0,
        "tensors": len(manifest.tensors),
        "unchanged": len(manifest.unchanged),
        "errors": {kind: mean_errors(entries) for kind, entries in by_projection(manifest).items()},
    }
    if expert_nbytes is not None:
        result |= {"expert_bytes": expert_nbytes, "ratio": expert_nbytes / max(1, manifest.nbytes)}
    return result


def by_projection(manifest: Manifest) -> dict[str, list[TensorEntry]]:
    """Quantised tensors by the last part of their name (q_proj, down_proj, ...), in order of appearance."""
    groups: dict[str, list[TensorEntry]] = defaultdict(list)
    for entry in manifest.tensors:
        if entry.bits or entry.rank:
            groups[entry.projection].append(entry)
    return dict(groups)


def print_summary(manifest: Manifest, expert_nbytes: int | None = None) -> None:
    """Size, ratio, bits a weight, and the error of each kind of projection."""
    out = console()
    if not manifest.tensors:
        out.print("The expert is identical to its base: nothing is stored.")
        return
    figures = summary(manifest, expert_nbytes)
    title = f"{manifest.expert.id} against {manifest.base.id}"
    columns = ("projection", "bits", "rank", "salient", "tensors", "size", "weight error", "output error")
    expected = manifest.settings.get("expected")
    parts = expected.get("by_projection") if isinstance(expected, dict) else None
    shown = table(title, *columns, *(("share of cost",) if isinstance(parts, dict) else ()))
    shown.columns[0].no_wrap = True
    for kind, entries in by_projection(manifest).items():
        errors = mean_errors(entries)
        shown.add_row(
            kind,
            _counted(form_of(entry) for entry in entries),
            _span(entry.rank for entry in entries),
            _span(entry.salient for entry in entries),
            str(len(entries)),
            megabytes(sum(entry.nbytes for entry in entries)),
            _percent(errors["weight_error"]),
            _percent(errors["output_error"]),
            *(_share(parts, kind) if isinstance(parts, dict) else ()),
        )
    exact = [entry for entry in manifest.tensors if entry.exact]
    if exact:
        nbytes = sum(item.nbytes for item in exact)
        shown.add_row("bit for bit", "", "", "", str(len(exact)), megabytes(nbytes), "0 %", "0 %")
    whole = [entry for entry in manifest.tensors if not (entry.bits or entry.rank or entry.exact)]
    if whole:
        shown.add_row(
            "stored whole", "", "", "", str(len(whole)), megabytes(sum(item.nbytes for item in whole)), "0 %", "0 %"
        )
    out.print(shown)
    line = f"{megabytes(manifest.nbytes)}, {figures['bits_per_weight']:.2f} bits a weight"
    if expert_nbytes is not None:
        line += f", {figures['ratio']:.2f} times smaller than the expert's {megabytes(expert_nbytes)}"
    out.print(line)
    if exact:
        out.print(_served(manifest))
    if isinstance(expected, dict) and _is_number(expected.get("kl")) and _is_number(expected.get("least_kl")):
        above = expected["kl"] / expected["least_kl"] - 1 if expected["least_kl"] > 0 else 0.0
        out.print(
            f"settings chosen tensor by tensor, by what errors cost on the tokens that were asked: within {above:.1%} "
            "of the least that any choice of as many bytes could cost there. What it costs on your prompts, meswitch "
            "eval measures."
        )
    if any((entry.weight_error or 0.0) > entry.usual_error for entry in manifest.tensors):
        out.print(
            "weight errors beyond the delta: these codes lie farther from the expert's weights than the base's weights "
            "do, as where an update leaves most weights alone. --bits 4 lowers them; meswitch eval says what they do "
            "to answers."
        )
    if manifest.unchanged:
        out.print(f"as the base's, without room of their own: {counted(len(manifest.unchanged), 'tensor')}")


def _served(manifest: Manifest) -> str:
    """What an engine makes of an artifact that is bit for bit."""
    code, held = served_code(manifest), slot_entries(manifest)
    linears, embedding = code["linear"], code["embedding"]
    parts = [f"{linears.bits} bits" + (f" in groups of {linears.group_size}" if linears.group_size else "")]
    parts += [f"{linears.rank} directions"] * bool(linears.rank)
    nbytes = sum(entry.expected_nbytes(2) for entry in held)
    return f"coded when it is loaded: {' and '.join(parts)}, embedding {embedding.bits} bits, {megabytes(nbytes)}"


def form_of(entry: TensorEntry) -> str:
    """Bits of a tensor's codes; of a low-rank part that stands alone, its rank."""
    return f"{entry.bits}{' trellis' if entry.trellis else ''}" if entry.bits else f"rank {entry.rank}"


def print_worst_layers(manifest: Manifest) -> None:
    """The tensors with the largest error."""
    measured = [entry for entry in manifest.tensors if entry.bits and entry.weight_error is not None]
    if not measured:
        return
    by_output = any(entry.output_error is not None for entry in measured)
    which = "output error" if by_output else "weight error"
    worst = sorted(measured, key=lambda item: -(_error_of(item, by_output) or 0.0))[:WORST_LAYERS]
    named = ", ".join(f"{_short(item.name)} {_percent(_error_of(item, by_output))}" for item in worst)
    console().print(f"largest {which}: {named}")


def _short(name: str) -> str:
    return name.removeprefix("model.").removesuffix(".weight")


def _counted(names: Iterable[str]) -> str:
    """Each name, and how often it occurs where there are several."""
    counts = Counter(names)
    return ", ".join(f"{name} ({counts[name]})" if len(counts) > 1 else name for name in sorted(counts))


def _span(numbers: Iterable[int]) -> str:
    found = sorted(set(numbers))
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


def _share(parts: dict[str, Any], kind: str) -> tuple[str]:
    """A kind's part of the cost that chose settings; of a manifest from elsewhere, nothing that is no number."""
    numbers = {name: value for name, value in parts.items() if _is_number(value)}
    total = sum(numbers.values())
    return (_percent(numbers[kind] / total) if kind in numbers and total else "",)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _error_of(entry: TensorEntry, by_output: bool) -> float | None:
    return entry.output_error if by_output else entry.weight_error


def _percent(value: float | None) -> str:
    """An error as a part of the delta; one that is larger than all of it, as a multiple."""
    if value is None:
        return ""
    return f"{100 * value:.2f} %" if value <= 1 else f"{value:,.1f} x delta"
