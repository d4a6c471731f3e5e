"""The most important test: what an expert generates in a mixed batch is what it generates alone, in full."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.family import Family, check_near_ties, make_family, requests
from engine.held import gathered
from patience import PATIENCE

from meswitch_cli.engine import TransformersEngine, generate
from meswitch_cli.engine.contract import Chunk, GenerationRequest
from meswitch_cli.engine.runner import Runner

Start = Callable[..., TransformersEngine]


def check(engine: TransformersEngine, family: Family, batch: list[GenerationRequest]) -> None:
    for request, completion in zip(batch, generate(engine, batch), strict=True):
        assert completion.error is None
        assert completion.tokens == family.greedy(request), request


@pytest.mark.parametrize("sharing", [True, False], ids=["sharing", "no-sharing"])
@pytest.mark.parametrize("slots", [1, 2, 4])
def test_mixed_batches_equal_plain_models(family: Family, start: Start, slots: int, sharing: bool) -> None:
    engine = start(family, slots=slots, prefix_sharing=sharing, max_wait=0.05)
    for count in (1, 2, 5, 32):
        check(engine, family, requests(family, count, seed=count, prefix=20 if count > 2 else 0))
    assert engine.drain(PATIENCE)
    statistics = engine.statistics()
    assert (statistics.running, statistics.waiting, statistics.cache_blocks_used) == (0, 0, 0)
    assert (statistics.slot_evictions > 0) == (slots < 3)


def test_random_arrivals(family: Family, start: Start) -> None:
    engine = start(family, slots=2, max_wait=0.02)
    batch = requests(family, 24, seed=7)
    got: dict[str, list[int]] = {request.id: [] for request in batch}
    done = threading.Semaphore(0)

    def on_chunk(chunk: Chunk) -> None:
        got[chunk.request_id] += chunk.tokens
        if chunk.finish_reason:
            done.release()

    rng = random.Random(3)
    for request in batch:
        engine.submit(request, on_chunk)
        time.sleep(rng.random() * 0.02)
    for _ in batch:
        assert done.acquire(timeout=PATIENCE)
    for request in batch:
        assert tuple(got[request.id]) == family.greedy(request)


def test_tokens_of_a_slot_lie_together(family: Family, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    set_slots = Runner.set_slots

    def noted(self: Runner, batch: list[Any]) -> None:
        set_slots(self, batch)
        seen.append(self.slot_of_token[: sum(item.query_length for item in batch)].tolist())

    monkeypatch.setattr(Runner, "set_slots", noted)
    engine = start(family)
    with gathered(engine, 24):
        check(engine, family, requests(family, 24, seed=11))
    assert any(len(set(slots)) == 4 for slots in seen)
    assert all(slots == sorted(slots) for slots in seen)


def test_full_cache_begins_requests_again(family: Family, start: Start) -> None:
    """A cache too small for all of them: transformers takes some out and computes them again."""
    engine = start(family, cache_tokens=128, max_batch_tokens=32)
    check(engine, family, requests(family, 16, seed=5, longest=60, max_tokens=40))
    assert engine.drain(PATIENCE)
    assert engine.statistics().cache_blocks_used == 0


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("qwen2", {}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {}),
        ("gemma", {}),
        ("gemma2", {"sliding_window": 16}),
        ("gemma3", {"sliding_window": 16}),
        ("mistral", {"sliding_window": 8}),
        ("phi", {}),
        ("phi3", {}),
        ("gpt_neox", {"num_key_value_heads": 4}),
        ("mixtral", {}),
        ("qwen3_moe", {}),
        ("olmoe", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "plain",
)
def test_families(name: str, config: dict[str, object], tmp_path: Path, start: Start) -> None:
    own = make_family(tmp_path, name, **config)
    engine = start(own, slots=2, max_wait=0.05)
    check(engine, own, requests(own, 12, seed=1))


def test_expert_with_a_head_of_its_own_on_a_tied_base(tmp_path: Path, start: Start) -> None:
    own = make_family(tmp_path, "llama", tie_word_embeddings=True, untie=("beta",))
    engine = start(own)
    check(engine, own, requests(own, 12, seed=2))


def test_bfloat16_up_to_near_ties(tmp_path: Path, start: Start) -> None:
    """Every chosen token is the best there is by float32 weights, or as near to it as the rounding of a plain bfloat16
    model is wide: in the logits before it, given what the engine itself has generated so far."""
    own = make_family(tmp_path, dtype=torch.bfloat16)
    exact = Family(own.base, own.artifacts, torch.float32)
    engine = start(own)
    batch = requests(exact, 24, seed=4, prefix=10)
    check_near_ties(exact, own, batch, generate(engine, batch))
