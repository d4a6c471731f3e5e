"""Families that batches do not take: each request goes through transformers' own code, and comes out the same."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.family import EXPERTS, Family, Kind, make_family, requests
from engine.held import held
from patience import PATIENCE

from meswitch_cli.engine import TransformersEngine, generate
from meswitch_cli.engine.contract import BASE, Chunk, GenerationRequest, Sampling
from meswitch_cli.engine.decoding import Decoding
from meswitch_cli.engine.one_by_one import OneByOne

Start = Callable[..., TransformersEngine]


def check(engine: TransformersEngine, family: Family, batch: list[GenerationRequest]) -> None:
    for request, completion in zip(batch, generate(engine, batch), strict=True):
        assert completion.error is None
        assert completion.tokens == family.greedy(request), request


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A tiny Qwen3.5 in fp32 with three experts, that change its convolutions and states too."""
    return make_family(tmp_path_factory.mktemp("hybrid"), "qwen3_5")


@pytest.mark.parametrize("name", ["gpt_oss", "granitemoe", "deepseek_v3", "lfm2", "gemma4", "gpt2"])
def test_families(name: str, tmp_path: Path, start: Start) -> None:
    # Tokens that are added to Gemma 4 have embeddings for every layer, which makes another model of it.
    experts = {key: kind for key, kind in EXPERTS.items() if name != "gemma4" or not kind.added_rows}
    own = make_family(tmp_path, name, experts=experts)
    engine = start(own, slots=len(experts) - 1, max_wait=0.05, strict=True)
    assert engine.one_by_one is not None
    check(engine, own, requests(own, 12, seed=1))


@pytest.mark.parametrize("slots", [1, 4])
def test_slots_hold_what_no_bank_holds(hybrid: Family, start: Start, slots: int) -> None:
    engine = start(hybrid, slots=slots, max_wait=0.05)
    for count in (1, 5, 16):
        check(engine, hybrid, requests(hybrid, count, seed=count))
    assert engine.drain(PATIENCE)
    statistics = engine.statistics()
    assert (statistics.running, statistics.waiting, statistics.cache_blocks_used) == (0, 0, 0)
    assert (statistics.slot_evictions > 0) == (slots < 3)


def test_bfloat16_up_to_near_ties(tmp_path: Path, start: Start) -> None:
    own = make_family(tmp_path, "qwen3_5", dtype=torch.bfloat16, experts={"alpha": EXPERTS["alpha"]})
    engine = start(own, dtype="bfloat16")
    for request, completion in zip(batch := requests(own, 8, seed=3), generate(engine, batch), strict=True):
        ids = torch.tensor([[*request.prompt_tokens, *completion.tokens]])
        with torch.inference_mode():
            logits = own.references[request.expert](ids).logits[0, len(request.prompt_tokens) - 1 : -1].float()
        chosen = logits[torch.arange(len(completion.tokens)), list(completion.tokens)]
        assert float((logits.amax(1) - chosen).max()) <= 0.05 * float(logits.std())


def test_an_expert_comes_and_goes(hybrid: Family, start: Start) -> None:
    first, *others = hybrid.artifacts
    engine = start(hybrid, experts={first: hybrid.artifacts[first]})
    for name in others:
        engine.load_expert(name, hybrid.artifacts[name])
    check(engine, hybrid, requests(hybrid, 12, seed=4))
    engine.unload_expert(first)
    check(engine, hybrid, [item for item in requests(hybrid, 12, seed=5) if item.expert != first])


def test_the_cache_is_shared_out(hybrid: Family, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests wait whose answers might not fit; one alone may take more than there is."""
    reserved: list[tuple[int, int]] = []
    step = OneByOne._step

    def noted(self: OneByOne, item: Any) -> None:
        reserved.append((self.tokens_reserved, len(self._running)))
        step(self, item)

    monkeypatch.setattr(OneByOne, "_step", noted)
    engine = start(hybrid, cache_tokens=60, max_running=8)
    sampling = Sampling(temperature=0, max_tokens=10, ignore_eos=True)
    lengths = (70, 10, 10, 10, 10)
    batch = [GenerationRequest(f"{index}", BASE, (7,) * count, sampling) for index, count in enumerate(lengths)]
    check(engine, hybrid, batch)
    assert max(reserved) == (80, 1)
    assert max(count for tokens, count in reserved if tokens <= 60) == 3


def test_the_room_for_caches_is_measured(hybrid: Family, start: Start) -> None:
    engine = start(hybrid, cache_tokens=None)
    model = engine._base.model  # type: ignore[union-attr]
    with torch.inference_mode():
        short, long = (Decoding(model, [7] * count, 64) for count in (16, 32))
        short.forward(), long.forward()
    # Keys and values of the one layer of attention, 2 heads of 24 in fp32, and positions.
    assert long.nbytes - short.nbytes == 16 * (2 * 2 * 24 * 4 + 8)
    blocks = engine.statistics().cache_blocks
    assert blocks == (512 << 20) * 16 // short.nbytes


def test_a_request_that_fails_fails_alone(hybrid: Family, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start(hybrid)
    forward = Decoding.forward

    def failing(self: Decoding, every: bool = False) -> torch.Tensor:
        if self._ids.shape[1] == 9:
            raise RuntimeError("out of something")
        return forward(self, every)

    monkeypatch.setattr(Decoding, "forward", failing)
    sampling = Sampling(temperature=0, max_tokens=2, ignore_eos=True)
    good, bad = (GenerationRequest(name, "alpha", (5,) * count, sampling) for name, count in (("g", 4), ("b", 9)))
    answers = generate(engine, [good, bad])
    assert answers[1].error == "out of something"
    assert answers[0].tokens == hybrid.greedy(good)
    check(engine, hybrid, [good])


def test_a_request_is_cancelled(hybrid: Family, start: Start) -> None:
    engine = start(hybrid)
    begun, over = threading.Event(), threading.Event()
    chunks: list[Chunk] = []

    def on_chunk(chunk: Chunk) -> None:
        chunks.append(chunk)
        begun.set()
        if chunk.finish_reason:
            over.set()

    long = Sampling(temperature=0, max_tokens=100, ignore_eos=True)
    with held(engine, after=3):
        engine.submit(GenerationRequest("long", "alpha", (5, 6), long), on_chunk)
        assert begun.wait(PATIENCE)
        engine.cancel("long")
    assert over.wait(PATIENCE)
    assert chunks[-1].finish_reason == "cancelled" and len(chunks) < 100
    assert engine.drain(PATIENCE) and engine.statistics().cache_blocks_used == 0


def test_prompts_are_scored(hybrid: Family, start: Start) -> None:
    engine = start(hybrid)
    prompt = (9, 8, 7, 6, 5)
    sampling = Sampling(temperature=0, max_tokens=1, ignore_eos=True, prompt_logprobs=0)
    (answer,) = generate(engine, [GenerationRequest("scored", "beta", prompt, sampling)])
    with torch.inference_mode():
        logits = hybrid.references["beta"](torch.tensor([prompt])).logits[0]
    expected = torch.log_softmax(logits.float(), 1)[torch.arange(4), list(prompt[1:])]
    found = torch.tensor([item.logprob for item in answer.prompt_logprobs])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_hidden_states_are_the_bases_while_an_expert_generates(hybrid: Family, start: Start) -> None:
    engine = start(hybrid)
    expected = engine.pooled_hidden_states([[5, 6, 7]], 1)
    with torch.inference_mode():
        states = hybrid.references[BASE](torch.tensor([[5, 6, 7]]), output_hidden_states=True).hidden_states
    torch.testing.assert_close(expected, states[1].mean(1), rtol=1e-4, atol=1e-5)
    over = threading.Event()
    sampling = Sampling(temperature=0, max_tokens=100, ignore_eos=True)
    request = GenerationRequest("long", "alpha", (5, 6), sampling)
    engine.submit(request, lambda chunk: over.set() if chunk.finish_reason else None)
    seen = 0
    while not over.is_set():
        assert torch.equal(engine.pooled_hidden_states([[5, 6, 7]], 1), expected)
        seen += 1
    assert seen > 1


def test_what_a_slot_holds_counts(tmp_path: Path, start: Start) -> None:
    """Of a mixture that only transformers computes, a slot holds the matrices of its own."""
    own = make_family(tmp_path, "granitemoe", experts={"alpha": Kind({"bits": 2, "salient": 4})})
    engine = start(own)
    banks = engine._loader.banks
    matrices = 2 * 4 * (2 * 72 * 96 + 96 * 72) * 4
    held = banks.base.own_parameters.nbytes
    assert matrices < held < 1.1 * matrices and banks.nbytes > held
