"""Whether a compressed expert is nearer to the expert than the base is, asked where its weights leave a doubt.

Errors of weights do not tell: on real fine-tunes of which 2 % of the weights move, a delta whose error is seven times
its own energy leaves 0.6 % of the base's KL; on an update at random places half that error leaves several times the
base's KL. So the three models predict the same tokens, layer by layer, and their distributions are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from meswitch_cli.artifact.artifact import expert_tensor
from meswitch_cli.artifact.shard import Shard
from meswitch_cli.artifact.workspace import UnitRecord, Workspace
from meswitch_cli.calibration.data import random_window
from meswitch_cli.compression.form import can_be_exact
from meswitch_cli.compression.plan import Job
from meswitch_cli.compression.settings import RANDOM
from meswitch_cli.compression.windows import calibration_windows
from meswitch_cli.delta.quantize import quantize
from meswitch_cli.delta.settings import QuantizerSettings
from meswitch_cli.delta.stored import TensorEntry
from meswitch_cli.errors import CheckpointError, MeswitchError, reason_of
from meswitch_cli.model.matching import PlannedTensor
from meswitch_cli.model.streaming import StreamedModel

#: A weight error from which on the models are compared, over the usual one: of one tensor, or of all, each weighed by
#: its delta's energy. At 1 bit without a low-rank part a Gaussian delta has 0.36.
DOUBTFUL_TENSOR, DOUBTFUL_MODEL = 1.0, 0.5
#: The share of the base's KL from which on the user is told.
WEAK = 0.5
#: KLs, in nats a token, that fp32 arithmetic does not tell from none.
NO_KL = 1e-9
#: Calibration windows that are compared, and tokens of each; random tokens come in as many windows.
WINDOWS, WINDOW_TOKENS = 4, 128
#: What may help, least bytes first; and the weight error that does.
REMEDIES = {
    "--bits 4": QuantizerSettings(bits=4),
    "--bits 4 --group-size 32": QuantizerSettings(bits=4, group_size=32),
}
HELPFUL_ERROR = 0.5

#: A tensor of the plan to its values.
_Read = Callable[[PlannedTensor], torch.Tensor]


class WeakDeltaError(MeswitchError):
    """What a compression stores is farther from the expert than the base is."""


@dataclass(frozen=True)
class Closeness:
    """Mean KL of the expert's next-token distribution to the compressed expert's and to the base's, nats a token."""

    compressed: float
    base: float

    @property
    def share(self) -> float:
        """The compressed expert's KL over the base's; 0 where neither differs from the expert."""
        return self.compressed / self.base if self.base > NO_KL else float(self.compressed > NO_KL)


def doubtful(records: list[UnitRecord]) -> bool:
    """Whether the weights' errors leave it open if the delta is worth anything."""
    measured = _measured(records)
    energy = sum((entry.delta_energy or 0.0) * entry.usual_error for entry in measured)
    error = sum((entry.weight_error or 0.0) * (entry.delta_energy or 0.0) for entry in measured)
    worst = max(((entry.weight_error or 0.0) / entry.usual_error for entry in measured), default=0.0)
    return worst > DOUBTFUL_TENSOR or error > DOUBTFUL_MODEL * energy


@torch.no_grad()
def closeness(job: Job, space: Workspace, records: list[UnitRecord], device: torch.device | str) -> Closeness:
    """Compare the finished units with base and expert, one decoder layer in memory at a time.

    Raises:
        CheckpointError: a buffer of this family does not follow from its config, so that no layer can be run alone.
    """
    tokens = _tokens(job).to(device)
    expert = _log_probabilities(job, lambda item: item.expert.read(job.expert), tokens)
    base = _log_probabilities(job, lambda item: item.base.read(job.base), tokens)
    compressed = _log_probabilities(job, _compressed(job, space, records), tokens)
    return Closeness(_divergence(expert, compressed), _divergence(expert, base))


def advice(job: Job, records: list[UnitRecord]) -> str:
    """What to do about a weak delta: the first remedy that helps the tensor with the largest error, by trying it."""
    worst = max(_measured(records), key=lambda entry: (entry.weight_error or 0.0) * (entry.delta_energy or 0.0))
    item = next(item for item in job.plan.tensors if item.name == worst.name)
    rows = item.shared_rows
    base, expert = item.base.read(job.base)[:rows], item.expert.read(job.expert)[:rows]
    moved = float((base.float() != expert.float()).float().mean())
    found = f"{worst.name} has a weight error of {worst.weight_error:.0%}"
    if moved < 0.5:
        found += f": {moved:.1%} of its weights change, and the codes have no zero"
    for option, settings in REMEDIES.items():
        result = quantize(base, expert, settings)
        if result is not None and result[1].weight_error < HELPFUL_ERROR:
            return f"{found}. With {option} it would be {result[1].weight_error:.0%}"
    instead = (
        "--exact keeps it bit for bit" if can_be_exact(job.expert) else "keep the expert as a checkpoint of its own"
    )
    return f"{found}. No code of this version fits it: {instead}"


def _measured(records: list[UnitRecord]) -> list[TensorEntry]:
    coded = [entry for record in records for entry in record.tensors if entry.bits or entry.rank]
    return [entry for entry in coded if entry.weight_error is not None and entry.delta_energy]


def _tokens(job: Job) -> torch.Tensor:
    """Token ids `[windows, tokens]` that base and expert both know."""
    known = min(min(item.shape[0], item.base_shape[0]) for item in job.plan.tensors if item.kind == "embedding")
    if job.settings.calibration in (None, RANDOM):
        return torch.cat([random_window(known, job.settings.seed + index) for index in range(WINDOWS)])
    windows = calibration_windows(job)[:WINDOWS, :WINDOW_TOKENS]
    return windows.clamp(max=known - 1)


def _compressed(job: Job, space: Workspace, records: list[UnitRecord]) -> _Read:
    where = {entry.name: (record, entry) for record in records for entry in record.tensors}

    def read(item: PlannedTensor) -> torch.Tensor:
        base = item.base.read(job.base)
        if item.name not in where:
            return base
        record, entry = where[item.name]
        return expert_tensor(Shard(space.shard_path(record.shard.name), list(record.tensors)), entry, base)

    return read


def _log_probabilities(job: Job, read: _Read, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities `[windows, tokens, vocabulary]` float64 under the expert's config with these weights."""
    model = StreamedModel(_PlannedWeights(job, read), tokens.device, torch.float32)
    return torch.log_softmax(model.logits(tokens).double(), dim=-1)


def _divergence(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL over the tokens; a vocabulary that is longer in one than in the other is compared where both have it."""
    shared = min(reference.shape[-1], other.shape[-1])
    first, second = (torch.log_softmax(item[..., :shared], dim=-1) for item in (reference, other))
    return float((first.exp() * (first - second)).sum(-1).mean())


class _PlannedWeights:
    """A model with the expert's config and any weights of the plan's tensors. Implements `model.weights.Weights`."""

    def __init__(self, job: Job, read: _Read) -> None:
        self.name, self.config, self.architecture = (
            str(job.expert.source.path),
            job.expert.config,
            job.plan.architecture,
        )
        self._planned = {item.name: item for item in job.plan.tensors}
        self._read, self._expert = read, job.expert

    @property
    def buffers(self) -> dict[str, torch.Tensor]:
        return self._expert.read_buffers()

    def read(self, name: str) -> torch.Tensor:
        return self._read(self._planned[name if name in self._planned else self.architecture.holder(name).name])


def refuse_weak(
    job: Job, space: Workspace, records: list[UnitRecord], device: torch.device | str, *, keep: bool
) -> str | None:
    """Compare where there is a doubt; returns what to tell the user, None where all is well.

    Raises:
        WeakDeltaError: the delta is farther from the expert than the base is, and `keep` is not set.
    """
    if not doubtful(records):
        return None
    try:
        found = closeness(job, space, records, device)
    except (CheckpointError, RuntimeError) as error:
        weak, told = True, f"how near cannot be measured, since the layers do not run one by one: {reason_of(error)}"
    else:
        if found.share < WEAK:
            return None
        weak = not found.share <= 1  # or not a number
        told = f"KL {found.compressed:.2g} to the expert, the base's {found.base:.2g} nats a token"
    nearness = "no nearer" if weak else "little nearer"
    text = f"{job.out}: what is stored is {nearness} to the expert than the base is ({told}); {advice(job, records)}"
    if weak and not keep:
        raise WeakDeltaError(f"{text}; --keep-weak writes this artifact all the same")
    return text
