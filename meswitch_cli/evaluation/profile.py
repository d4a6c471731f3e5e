"""Where an artifact's error is: by tensor, as its manifest says, and over the input channels, from the weights."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch

from meswitch_cli.artifact.weights import ArtifactWeights
from meswitch_cli.delta.quantize import dequantize
from meswitch_cli.delta.stored import TensorEntry
from meswitch_cli.evaluation.subjects import Candidate, Expert


def tensor_rows(candidate: Candidate) -> list[dict[str, Any]]:
    """Errors of an artifact's quantised tensors, relative to the delta's energy."""
    if not isinstance(candidate.weights, ArtifactWeights):
        return []
    members = ["name", "layer", "projection", "bits", "salient", "rank", "nbytes"]
    members += ["delta_energy", "weight_error", "output_error"]
    return [
        {"model": candidate.label} | {member: getattr(entry, member) for member in members}
        for entry in candidate.weights.artifact.manifest.tensors
        if entry.bits
    ]


def saliency_rows(candidate: Candidate, expert: Expert) -> list[dict[str, Any]]:
    """How an artifact's rounding error is spread over input channels, by projection, averaged over layers.

    `share[j]` is the part of the error Σ_o (Δ − codes)² that the `channels[j]` worst channels hold, before any of them
    is kept in 16 bit; `kept_share` the part that the channels hold which the artifact keeps, `kept` their number.
    Activations are not weighed in: the artifact may have chosen with them.
    """
    if not isinstance(candidate.weights, ArtifactWeights):
        return []
    shares: dict[str, list[torch.Tensor]] = defaultdict(list)
    kept: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for entry in candidate.weights.artifact.manifest.tensors:
        if entry.kind == "linear" and entry.bits:
            error = _column_error(candidate.weights, expert, entry)
            total = float(error.sum()) or 1.0
            kind = entry.projection
            shares[kind].append(error.sort(descending=True).values.cumsum(0) / total)
            chosen = candidate.weights.artifact.shard(entry.shard).delta(entry.name).salient_channels
            kept[kind].append((len(chosen), float(error[chosen].sum()) / total))
    rows = []
    for kind, curves in shares.items():
        mean = torch.stack([curve for curve in curves if len(curve) == len(curves[0])]).mean(0)
        channels = [1 << power for power in range(len(mean).bit_length()) if 1 << power <= len(mean)]
        rows.append(
            {
                "model": candidate.label,
                "projection": kind,
                "channels": channels,
                "share": [float(mean[count - 1]) for count in channels],
                "kept": max(count for count, _ in kept[kind]),
                "kept_share": sum(share for _, share in kept[kind]) / len(kept[kind]),
            }
        )
    return rows


def _column_error(weights: ArtifactWeights, expert: Expert, entry: TensorEntry) -> torch.Tensor:
    """Squared error of each column `[in]`, float64, without what salient channels correct."""
    delta = weights.artifact.shard(entry.shard).delta(entry.name)
    true = expert.weights.read(entry.name)[: entry.rows].float() - weights.base.read(entry.base)[: entry.rows].float()
    codes = replace(delta, salient_index=None, salient_value=None)
    return (true - dequantize(codes)).double().square().sum(0)
