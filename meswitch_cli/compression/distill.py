"""End-to-end distillation of the steps: the compressed expert's logits are pulled to the full expert's.

Only steps learn. Codes, salient channels, embeddings and norms stay as they are; this is the one method that holds
whole models in memory.
"""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from meswitch_cli.artifact.artifact import expert_tensor
from meswitch_cli.artifact.disk import write_atomically
from meswitch_cli.artifact.manifest import shard_name
from meswitch_cli.artifact.shard import Shard
from meswitch_cli.artifact.workspace import UnitRecord, Workspace
from meswitch_cli.checkpoint.tensorfile import read_header, read_tensor
from meswitch_cli.compression.plan import Job, OnProgress
from meswitch_cli.compression.unit import shard_file
from meswitch_cli.compression.windows import calibration_windows
from meswitch_cli.delta.quantize import dequantize
from meswitch_cli.delta.steps import grouped
from meswitch_cli.delta.stored import StoredDelta, TensorEntry
from meswitch_cli.model.build import build_model
from meswitch_cli.model.weights import CheckpointWeights


@dataclasses.dataclass(frozen=True)
class DistillSettings:
    """Training of the steps: each is its starting value times a factor, and the factors are learned.

    Attributes:
        updates: optimiser steps.
        batch_tokens: tokens an update sees.
        learning_rate: of Adam on the factors, warmed up over a tenth of the updates, then a cosine to zero.
        save_every: updates between checkpoints of the training.
    """

    updates: int = 40
    batch_tokens: int = 512
    learning_rate: float = 5e-3
    save_every: int = 10


class _StepLinear(torch.autograd.Function):
    """y = x (fixed + step * multiples)^T, with a gradient for x and for the steps' factors alone."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factors: torch.Tensor, module: DistilledLinear) -> torch.Tensor:
        ctx.save_for_backward(x, factors)
        ctx.module = module
        return x @ module.weight(factors).T

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, factors = ctx.saved_tensors
        module, gradient = ctx.module, gradients[0]
        flat = gradient.reshape(-1, gradient.shape[-1])
        weight_gradient = flat.T @ x.reshape(-1, x.shape[-1])
        per_group = grouped(weight_gradient * module.values(), module.group_size).sum(-1)
        return gradient @ module.weight(factors), per_group * module.steps, None


class DistilledLinear(nn.Module):
    """A linear whose weight is a fixed part plus codes times trainable steps."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, delta: StoredDelta) -> None:
        """Split `weight` `[out, in]`, the compressed expert's, into what the steps make and the rest."""
        super().__init__()
        self.group_size = delta.group_size if delta.group_size < delta.in_features else 0
        multiples = (2 * delta.multiples()).to(torch.int8)
        multiples[:, delta.salient_channels] = 0  # what a salient channel holds must not move
        scale = torch.ones(delta.in_features) if delta.channel_scale is None else delta.channel_scale.float()
        device = weight.device
        self.register_buffer("doubled", multiples.to(device))
        self.register_buffer("scale", scale.to(device))
        self.register_buffer("steps", delta.coded[1].float().to(device))
        self.factors = nn.Parameter(torch.ones_like(self.get_buffer("steps")))
        self.register_buffer("fixed", torch.zeros_like(weight))
        self.register_buffer("fixed", weight - self.weight(self.factors.detach()))
        self.bias = bias

    def values(self) -> torch.Tensor:
        """What a step of one contributes, `[out, in]`."""
        return self.get_buffer("doubled").float() * (self.get_buffer("scale") / 2)

    def weight(self, factors: torch.Tensor) -> torch.Tensor:
        """The weight for these factors of the starting steps."""
        steps = self.get_buffer("steps") * factors
        spread = steps if steps.shape[1] == 1 else steps.repeat_interleave(self.group_size, dim=1)
        return self.get_buffer("fixed") + self.values() * spread[:, : self.get_buffer("doubled").shape[1]]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = _StepLinear.apply(x, self.factors, self)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias


def distill(
    job: Job,
    space: Workspace,
    records: list[UnitRecord],
    device: torch.device | str,
    on_progress: OnProgress,
    *,
    stage: str,
    settings: DistillSettings | None = None,
) -> list[UnitRecord]:
    """Train the steps of quantised units and write the units anew; returns their records."""
    count = len(records)
    finished = [space.record(index, stage) for index in range(count)]
    if all(finished):
        return [record for record in finished if record]
    trained = _trained_steps(job, space, records, torch.device(device), on_progress, settings or DistillSettings())
    results = []
    for index, record in enumerate(records):
        data, final = _final_unit(job, space, record, trained, shard_name(index, count))
        space.finish_unit(index, stage, data, final)
        results.append(final)
    return results


def _final_unit(
    job: Job, space: Workspace, record: UnitRecord, trained: dict[str, torch.Tensor], name: str
) -> tuple[bytes, UnitRecord]:
    path = space.shard_path(record.shard.name)
    shard = Shard(path, list(record.tensors))
    tensors = {key: read_tensor(info) for key, info in read_header(path).items()}
    planned = {item.name: item for item in job.plan.tensors}
    entries: list[TensorEntry] = []
    for entry in record.tensors:
        changes: dict[str, Any] = {"shard": name}
        if entry.name in trained:
            delta = with_steps(shard.delta(entry.name), trained[entry.name])
            tensors |= delta.named(entry.name)
            item = planned[entry.name]
            exact = item.expert.read(job.expert).float() - item.base.read(job.base).float()
            error = float((exact - dequantize(delta)).double().square().sum())
            changes |= {"weight_error": error / float(entry.delta_energy or 1.0), "output_error": None}
        entries.append(dataclasses.replace(entry, **changes))
    data, file = shard_file(tensors, name)
    return data, dataclasses.replace(record, shard=file, tensors=tuple(entries))


def with_steps(delta: StoredDelta, steps: torch.Tensor) -> StoredDelta:
    """A delta with other steps, its salient channels' values kept by adapting their residuals."""
    replaced = dataclasses.replace(delta, steps=steps.to(delta.coded[1].dtype))
    if delta.salient_value is None:
        return replaced
    index = delta.salient_channels
    residual = dequantize(delta)[:, index] - dequantize(replaced)[:, index] + delta.salient_value.float()
    return dataclasses.replace(replaced, salient_value=residual.to(delta.salient_value.dtype))


def _trained_steps(
    job: Job,
    space: Workspace,
    records: list[UnitRecord],
    device: torch.device,
    on_progress: OnProgress,
    settings: DistillSettings,
) -> dict[str, torch.Tensor]:
    teacher = build_model(CheckpointWeights(job.expert), device, torch.float32)
    student, linears = _student_model(job, space, records, device)
    windows = calibration_windows(job)
    per_batch = max(1, settings.batch_tokens // windows.shape[1])
    batches = _batches(len(windows), per_batch, settings.updates, job.settings.seed)
    parameters = [module.factors for module in linears.values()]
    optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate, betas=(0.9, 0.95))
    checkpoint = _TrainingState(space.state / "training.safetensors", optimizer, parameters)
    for update in range(checkpoint.load(), settings.updates):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * _schedule(update, settings.updates)
        batch = windows[batches[update]].to(device)
        with torch.no_grad():
            target = torch.log_softmax(teacher(batch, use_cache=False).logits.float(), dim=-1)
        logits = student(batch, use_cache=False).logits.float()
        loss = nn.functional.kl_div(
            torch.log_softmax(logits, dim=-1).flatten(0, 1),
            target.flatten(0, 1),
            reduction="batchmean",
            log_target=True,
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if (update + 1) % settings.save_every == 0:
            checkpoint.save(update + 1)
        on_progress(f"distill {update + 1}/{settings.updates}", 0, len(records))
    return {
        name: (module.get_buffer("steps") * module.factors.detach()).clamp(min=0).cpu()
        for name, module in linears.items()
    }


def _schedule(update: int, updates: int) -> float:
    warmup = max(1, updates // 10)
    if update < warmup:
        return (update + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (update - warmup) / max(1, updates - warmup)))


def _batches(windows: int, size: int, updates: int, seed: int) -> list[list[int]]:
    """Indices of the windows of each update: shuffled passes over all of them."""
    generator, order, batches = random.Random(seed), list[int](), list[list[int]]()
    for _ in range(updates):
        while len(order) < size:
            order += generator.sample(range(windows), windows)
        batches.append(order[:size])
        order = order[size:]
    return batches


class _TrainingState:
    """The factors and Adam's moments in one file, so that an interrupted training goes on with the same numbers."""

    def __init__(self, path: Path, optimizer: torch.optim.Adam, parameters: list[nn.Parameter]) -> None:
        self._path, self._optimizer, self._parameters = path, optimizer, parameters

    def save(self, update: int) -> None:
        tensors = {"update": torch.tensor([update])}
        for index, parameter in enumerate(self._parameters):
            state = self._optimizer.state[parameter]
            tensors[f"{index}.factors"] = parameter.detach().cpu()
            tensors[f"{index}.exp_avg"] = state["exp_avg"].cpu()
            tensors[f"{index}.exp_avg_sq"] = state["exp_avg_sq"].cpu()
        write_atomically(self._path, safetensors.torch.save(tensors))

    def load(self) -> int:
        """Return the number of updates done."""
        if not self._path.exists():
            return 0
        tensors = safetensors.torch.load_file(self._path)
        update = int(tensors["update"])
        for index, parameter in enumerate(self._parameters):
            with torch.no_grad():
                parameter.copy_(tensors[f"{index}.factors"])
            self._optimizer.state[parameter] = {
                "step": torch.tensor(float(update)),
                "exp_avg": tensors[f"{index}.exp_avg"].to(parameter.device),
                "exp_avg_sq": tensors[f"{index}.exp_avg_sq"].to(parameter.device),
            }
        return update


class _QuantisedWeights:
    """The compressed expert as the quantised units make it, fp32. Implements `model.weights.Weights`.

    Attributes:
        quantised: shard and entry of each tensor that differs from the base's.
    """

    def __init__(self, job: Job, space: Workspace, records: list[UnitRecord]) -> None:
        self.name, self.config = str(job.expert.source.path), job.expert.config
        self.architecture = job.plan.architecture
        self._base, self._expert, self._planned = job.base, job.expert, {item.name: item for item in job.plan.tensors}
        shards = [(Shard(space.shard_path(item.shard.name), list(item.tensors)), item.tensors) for item in records]
        self.quantised = {entry.name: (shard, entry) for shard, entries in shards for entry in entries}

    @property
    def buffers(self) -> dict[str, torch.Tensor]:
        return self._expert.read_buffers()

    def read(self, name: str) -> torch.Tensor:
        base = self._planned[name].base.read(self._base)
        return expert_tensor(*self.quantised[name], base) if name in self.quantised else base


def _student_model(
    job: Job, space: Workspace, records: list[UnitRecord], device: torch.device
) -> tuple[nn.Module, dict[str, DistilledLinear]]:
    """The compressed expert as a model whose quantised linears have trainable steps."""
    weights = _QuantisedWeights(job, space, records)
    model: nn.Module = build_model(weights, device, torch.float32)
    linears: dict[str, DistilledLinear] = {}
    for name, (shard, entry) in weights.quantised.items():
        if entry.kind != "linear" or not entry.bits or name not in weights.architecture.held:
            continue  # what a mixture of experts holds as one parameter keeps its steps
        path = name.removesuffix(".weight")
        parent, _, leaf = path.rpartition(".")
        plain: Any = model.get_submodule(path)
        weight = weights.architecture.parameters[name].from_stored(plain.weight.detach())
        linears[name] = DistilledLinear(weight, plain.bias, shard.delta(name))
        setattr(model.get_submodule(parent), leaf, linears[name])
    return model, linears
