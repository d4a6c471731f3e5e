"""What kind of fine-tune a delta is, read off the two checkpoints before anything is compressed."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.compression.form import FormSizes, form_sizes
from meswitch_cli.compression.product import product_rank
from meswitch_cli.compression.settings import CompressionSettings
from meswitch_cli.delta.exact import encode
from meswitch_cli.errors import CheckpointError
from meswitch_cli.model.dtype import dtype_name, stored_dtype
from meswitch_cli.model.matching import Plan, PlannedTensor, make_plan

FineTuneKind = Literal["none", "sparse", "lora", "full", "pretraining"]

#: Leading singular directions whose energy is given.
FEW, MANY = 16, 64
#: Linears whose singular values are taken, spread evenly over the model; of smaller ones these directions are much.
SAMPLED, LEAST_WIDTH = 8, 4 * MANY
#: Share of unchanged weights from which an update is sparse. On SmolLM2-135M, bf16: 0.31 and 0.34 of strong full
#: fine-tunes of 80 to 100 steps at 1e-4, 0.43 to 0.51 of 14 steps; a random update of 3e-4 of the weights' norm 0.92,
#: of 1e-3 0.75. Reinforcement learning is reported to leave 0.7 to 0.95.
SPARSE = 0.8
#: ||delta|| / ||weights|| from which a fine-tune is a long one, six times the strong fine-tunes' 0.0045 and 0.0048, and
#: from which the base is in doubt. Neither was measured on such a pair; weights that have nothing in common give 1.4.
LONG, DOUBTFUL = 0.03, 0.15

WHAT: dict[FineTuneKind, str] = {
    "none": "every weight is the base's: there is nothing to compress",
    "sparse": "a sparse update, as reinforcement learning or a low learning rate leaves it",
    "lora": "a merged LoRA or the like: products of a low rank, and rounding",
    "full": "a full fine-tune",
    "pretraining": "long training: continued pretraining, or fine-tuning on very much data",
}


@dataclass(frozen=True, kw_only=True)
class FineTune:
    """A fine-tune's delta over the decoder's linears.

    Attributes:
        unchanged: share of weights with the base's bits, both rounded to the coarser type of the two files.
        relative_delta: ||delta|| / ||base's weights||, Frobenius norms over all of them.
        leading_energy, lora_energy: share of the delta's energy in its first 16 and 64 singular directions, the mean of
            sampled linears; None where the delta is zero.
        rounding: energy that rounding to the expert's file type leaves, over the delta's, of the same linears.
        exact_bits: bits a weight that they take bit for bit (`--exact`).
        sizes: bytes of the whole model bit for bit, in the default code and as products of `rank`, by a sample; None of
            an expert that is not stored as the weights that it has.
        rank: of products that explain every linear, see `delta.rank`; None where none do.
        sampled: how many those are.
        base_dtype, expert_dtype: of the files.
        added_tokens: embedding rows that the base has not.
        tensors, unchanged_tensors: of the whole model.
        kind: see `WHAT`.
        warnings: why the base may be another one than the fine-tune's.
    """

    unchanged: float
    relative_delta: float
    leading_energy: float | None
    lora_energy: float | None
    rounding: float | None
    exact_bits: float | None
    sizes: FormSizes | None
    rank: int | None
    sampled: int
    base_dtype: str
    expert_dtype: str
    added_tokens: int
    tensors: int
    unchanged_tensors: int
    kind: FineTuneKind
    warnings: tuple[str, ...]


def describe_fine_tune(base: Checkpoint, expert: Checkpoint) -> FineTune:
    """Read every weight of both, a tensor at a time.

    Raises:
        CheckpointError: the two are not of one architecture, or a weight is NaN or infinite.
    """
    plan = make_plan(base, expert)
    types = stored_dtype(base), stored_dtype(expert)
    coarser = max(types, key=lambda dtype: torch.finfo(dtype).eps)
    chosen = _sampled(plan)
    sampled = {item.name for item in chosen}
    same = count = unchanged_tensors = 0
    own = energy = 0.0
    spectra = []
    exact_nbytes = exact_weights = 0
    for item in plan.tensors:
        weight, tuned = item.base.read(base), item.expert.read(expert)
        unchanged_tensors += weight.shape == tuned.shape and torch.equal(weight.float(), tuned.float())
        if item.kind != "linear":
            continue
        same += int((weight.to(coarser) == tuned.to(coarser)).sum())
        count += weight.numel()
        delta = tuned.float() - weight.float()
        changed = float(delta.square().sum(dtype=torch.float64))
        own += float(weight.float().square().sum(dtype=torch.float64))
        energy += changed
        if not math.isfinite(changed):
            raise CheckpointError(f"{item.name}: NaN or infinity in {expert.source.path} or {base.source.path}")
        if item.name in sampled:
            exact_nbytes += len(encode(weight, tuned))
            exact_weights += weight.numel()
        if item.name in sampled and changed:
            spectra.append((*_leading(delta), rounding_energy(tuned, types[1]) / changed))
    leading, lora, rounding = (sum(part) / len(part) for part in zip(*spectra, strict=True)) if spectra else (None,) * 3
    relative = math.sqrt(energy / own) if own else math.inf
    unchanged = same / count if count else 1.0
    rank = product_rank(base, expert, plan)
    default = CompressionSettings.with_defaults()
    return FineTune(
        unchanged=unchanged,
        relative_delta=relative,
        leading_energy=leading,
        lora_energy=lora,
        rounding=rounding,
        exact_bits=8 * exact_nbytes / exact_weights if exact_weights else None,
        sizes=form_sizes(base, expert, plan, default, rank) if same < count else None,
        rank=rank,
        sampled=len(spectra),
        base_dtype=dtype_name(types[0]),
        expert_dtype=dtype_name(types[1]),
        added_tokens=plan.added_rows,
        tensors=len(plan.tensors),
        unchanged_tensors=unchanged_tensors,
        kind=kind_of(unchanged, relative, rank),
        warnings=tuple(base_doubts(relative, base.source.path, expert.source.path)),
    )


def kind_of(unchanged: float, relative: float, rank: int | None) -> FineTuneKind:
    """The kind of a fine-tune of these figures."""
    if not relative:
        return "none"
    if rank is not None:  # of some projections only, it leaves most weights alone
        return "lora"
    if unchanged >= SPARSE:
        return "sparse"
    return "pretraining" if relative >= LONG else "full"


def base_doubts(relative: float, base: Path, expert: Path) -> list[str]:
    """Why a base may not be the one that the expert was fine-tuned from."""
    found = []
    if relative >= DOUBTFUL:
        found.append(
            f"the expert is {100 * relative:.0f} % of the weights' norm away from {base}: fine-tunes are hundredths of "
            "that; is it another version of the base, or another model of its shape?"
        )
    if _has_chat_template(expert) and not _has_chat_template(base):
        found.append(
            f"{expert} has a chat template, {base} has none: if the expert was fine-tuned from an instruct version, "
            "that version is its base, and gives a smaller delta"
        )
    return found


def rounding_energy(values: torch.Tensor, dtype: torch.dtype) -> float:
    """The squared error that rounding values to a type is expected to leave: a twelfth of their steps' squares."""
    info = torch.finfo(dtype)
    magnitudes = values.double().abs().clamp(min=info.smallest_normal)
    steps = torch.exp2(torch.floor(torch.log2(magnitudes))) * info.eps
    return float(steps.square().sum()) / 12


def _leading(delta: torch.Tensor) -> tuple[float, float]:
    """Shares of a matrix's energy in its first `FEW` and `MANY` singular directions."""
    narrow = delta if delta.shape[0] <= delta.shape[1] else delta.T
    energies = torch.linalg.eigvalsh((narrow @ narrow.T).double()).flip(0).clamp(min=0)
    total = float(energies.sum())
    return float(energies[:FEW].sum()) / total, float(energies[:MANY].sum()) / total


def _sampled(plan: Plan) -> list[PlannedTensor]:
    """Linears that are wide enough to tell a rank by, or all where none is."""
    linears = [item for item in plan.tensors if item.kind == "linear"]
    linears = [item for item in linears if min(item.shape) >= LEAST_WIDTH] or linears
    return linears[:: math.ceil(len(linears) / SAMPLED)] if linears else []


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    try:
        return bool(json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template"))
    except (OSError, ValueError, AttributeError):
        return False
