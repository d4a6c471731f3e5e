"""Experts of different rates in one batch: scalar codes beside trellis codes, tensors with rates of their own, and
directions without codes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from engine.family import Kind, make_family, requests

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.engine import TransformersEngine, generate


def test_rates_mixed_in_a_batch(tmp_path: Path, start: Callable[..., TransformersEngine]) -> None:
    experts = {
        "eighth": Kind({"bits": 0.125, "salient": 4, "rank": 8}),
        "quarter": Kind(
            {"bits": 0.25, "salient": 4, "rank": 12, "embedding_bits": 0.25, "embedding_rank": 7}, added_rows=2
        ),
        "levels": Kind({"bits": 1, "code": "trellis", "salient": 0, "channel_scale": "rms"}),
        "two": Kind({"bits": 2, "salient": 3}),
        "directions": Kind({"bits": 0, "rank": 9}, added_rows=1),
        "chosen": Kind({"target_bits": 2, "calibration": "random", "steps": "output-unbiased"}),
    }
    own = make_family(tmp_path, experts=experts)
    alone = [entry for entry in Artifact.open(own.artifacts["directions"]).manifest.tensors if entry.kind == "linear"]
    assert alone and {(entry.bits, entry.rank) for entry in alone} == {(0, 9)}
    chosen = Artifact.open(own.artifacts["chosen"]).manifest.tensors
    assert len({(entry.bits, entry.code) for entry in chosen if entry.bits}) > 2
    engine = start(own, slots=3, max_wait=0.05)
    batch = requests(own, 16, seed=4)
    assert {request.expert for request in batch} >= set(experts)
    for request, completion in zip(batch, generate(engine, batch), strict=True):
        assert completion.error is None
        assert completion.tokens == own.greedy(request), request
