"""The model that a method's deltas make, and the candidate of `--baseline`."""

from __future__ import annotations

import torch

from meswitch_cli.delta.statistics import InputStatistics
from meswitch_cli.errors import UsageError
from meswitch_cli.evaluation.baselines.activations import Activations
from meswitch_cli.evaluation.baselines.method import Approximation, Method, Trained
from meswitch_cli.evaluation.baselines.registry import parse_method
from meswitch_cli.evaluation.subjects import Candidate, Expert
from meswitch_cli.model.matching import Plan, PlannedTensor, make_plan
from meswitch_cli.model.weights import CheckpointWeights

#: Models up to this size keep their approximated weights in memory between passes.
KEPT_BYTES = 4 << 30


class BaselineWeights:
    """The model that a method's deltas make on the base: linears by the method, embedding and head at `embedding`
    bits as an artifact has them, everything else as the expert's."""

    def __init__(
        self,
        method: Method,
        base: CheckpointWeights,
        expert: Expert,
        activations: Activations,
        trained: Trained | None = None,
    ) -> None:
        """`trained` stands for what the method would train; None: it does, when it is first asked for."""
        self.method, self.base, self.expert = method, base, expert
        self.name, self.config = f"{method} of {expert.label}", expert.weights.config
        self.plan: Plan = make_plan(base.checkpoint, expert.weights.checkpoint)
        self.architecture = self.plan.architecture
        self._planned = {item.name: item for item in self.plan.tensors}
        self._activations = activations
        self._kept: dict[str, torch.Tensor] = {}
        self._nbytes: dict[str, int] = {}
        self._trained = trained
        numel = sum(torch.Size(item.shape).numel() for item in self.plan.tensors)
        self._keep = 4 * numel <= KEPT_BYTES

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors read so far."""
        return sum(self._nbytes.values())

    @property
    def buffers(self) -> dict[str, torch.Tensor]:
        return self.expert.weights.checkpoint.read_buffers()

    def read(self, name: str) -> torch.Tensor:
        name = self.architecture.parameters[name].tied_to or name
        if name in self._kept:
            return self._kept[name]
        value, self._nbytes[name] = self._made(self._planned[name])
        if self._keep:
            self._kept[name] = value
        return value

    def _statistics(self, item: PlannedTensor) -> InputStatistics | None:
        return self.method.statistics(self._activations).get(item.name)

    @property
    def trained(self) -> Trained:
        if self._trained is None:
            start = BaselineWeights(self.method, self.base, self.expert, self._activations, {})
            self._trained = self.method.train(start, self.expert.weights, self.base, self._activations)
        return self._trained

    def _made(self, item: PlannedTensor) -> tuple[torch.Tensor, int]:
        stored = item.expert.read(self.expert.weights.checkpoint)
        base = item.base.read(self.base.checkpoint)
        kept_whole = item.kind != "linear" and self.method.embedding == 16
        if item.kind == "dense" or kept_whole:
            same = stored.shape == base.shape and torch.equal(stored.float(), base.float())
            return stored, 0 if same else stored.nbytes
        rows = item.shared_rows
        delta = stored[:rows].float() - base[:rows].float()
        if not delta.any():
            made = Approximation(delta, 0)
        elif item.kind != "linear":
            made = self.method.vocabulary(item.kind, delta, self._statistics(item))
        else:
            made = self.method.approximate(delta, self._statistics(item), item.name)
            made = made._replace(delta=self.trained.get(item.name, made.delta))
        value = base[:rows].float() + made.delta
        added = stored[rows:]
        return torch.cat([value, added.float()]), made.nbytes + added.nbytes


def baseline_candidate(
    spec: str, base: CheckpointWeights, expert: Expert, activations: Activations, *, several: bool
) -> Candidate:
    """The model of `--baseline spec` for an expert; `several` experts have theirs told apart by label.

    Raises:
        UsageError: the spec is wrong, or needs calibration data that was not given.
    """
    method = parse_method(spec)
    if method.needs_calibration and activations.path is None:
        raise UsageError(f"--baseline {spec} needs calibration data: give --calibration FILE.jsonl")
    label = f"{spec} ({expert.label})" if several else spec
    facts = {"method": spec.partition(":")[0], "options": method.options}
    return Candidate(label, expert.label, "baseline", BaselineWeights(method, base, expert, activations), facts)
