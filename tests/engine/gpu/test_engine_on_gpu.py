"""The engine on a card: what no CPU can show. Random models of two layers, made on the spot."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.family import Family, make_family, requests
from patience import PATIENCE

from meswitch_cli.engine import TransformersEngine, generate
from meswitch_cli.engine.contract import BASE, GenerationRequest, Sampling
from meswitch_cli.engine.proof import prove

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

Start = Callable[..., TransformersEngine]


@pytest.fixture(autouse=True)
def _small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt's padding and a few captures are enough: the tests start many engines."""
    monkeypatch.setattr("meswitch_cli.engine.runner.WARM_UP_TOKENS", 128)


def wrong(engine: TransformersEngine, family: Family, batch: list[GenerationRequest]) -> list[GenerationRequest]:
    """The requests whose tokens are not the plain model's."""
    completions = generate(engine, batch)
    assert [completion.error for completion in completions] == [None] * len(batch)
    return [
        request
        for request, completion in zip(batch, completions, strict=True)
        if completion.tokens != family.greedy(request)
    ]


def runner(engine: TransformersEngine) -> Any:
    assert engine._thread is not None
    return engine._thread.batch_processor.model_runner


@pytest.mark.parametrize("slots", [1, 4])
def test_mixed_batches_equal_plain_models_under_graphs(family: Family, start: Start, slots: int) -> None:
    engine = start(family, slots=slots, max_wait=0.05, max_running=8)
    assert engine._base is not None and engine._base.device.type == "cuda"
    assert runner(engine).use_cuda_graph_decode
    for count in (1, 2, 5, 24):
        batch = requests(family, count, seed=count, prefix=20 if count > 2 else 0)
        assert wrong(engine, family, batch) == []


def test_answers_are_the_same_without_graphs(family: Family, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = requests(family, 16, seed=4)
    with_graphs = [completion.tokens for completion in generate(start(family), batch)]
    monkeypatch.setattr("meswitch_cli.engine.batching.captures_graphs", lambda device: False)
    engine = start(family)
    assert not runner(engine).use_cuda_graph_decode
    assert [completion.tokens for completion in generate(engine, batch)] == with_graphs


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {}),
        ("gemma2", {"sliding_window": 16}),
        ("gemma3", {"sliding_window": 16}),
        ("mistral", {"sliding_window": 8}),
        ("phi", {}),
        ("phi3", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "plain",
)
def test_families(name: str, config: dict[str, object], tmp_path: Path, start: Start) -> None:
    own = make_family(tmp_path, name, **config)
    engine = start(own, slots=2, max_wait=0.05, max_running=4)
    assert runner(engine).use_cuda_graph_decode
    assert wrong(engine, own, requests(own, 12, seed=1)) == []


def test_a_bf16_model_answers_as_the_plain_one_but_for_near_ties(tmp_path: Path, start: Start) -> None:
    own = make_family(tmp_path, "llama", dtype=torch.bfloat16)
    engine = start(own)
    batch = requests(own, 24, seed=6)
    differing = 0
    for request, completion in zip(batch, generate(engine, batch), strict=True):
        expected = own.greedy(request)
        pairs = enumerate(zip(completion.tokens, expected, strict=True))
        place = next((index for index, pair in pairs if len(set(pair)) > 1), None)
        if place is None:
            continue
        differing += 1
        with torch.inference_mode():
            ids = torch.tensor([[*request.prompt_tokens, *expected[:place]]])
            logits = own.references[request.expert](ids).logits[0, -1].float()
        best, chosen = float(logits[expected[place]]), float(logits[completion.tokens[place]])
        unit = 2.0 ** (math.floor(math.log2(abs(best))) - 7)  # of bfloat16
        assert best - chosen <= 8 * unit, (request, best, chosen)
    assert differing <= len(batch) // 4


def test_a_full_cache_begins_requests_again(family: Family, start: Start) -> None:
    engine = start(family, cache_tokens=128, max_batch_tokens=32)
    assert wrong(engine, family, requests(family, 16, seed=5, longest=60, max_tokens=40)) == []


def test_an_expert_that_needs_wider_slots_arrives_under_graphs(family: Family, start: Start) -> None:
    engine = start(family, experts={"alpha": family.artifacts["alpha"]}, slots=2, max_running=4)
    for name in ("beta", "gamma"):
        engine.load_expert(name, family.artifacts[name])
    assert wrong(engine, family, requests(family, 12, seed=8)) == []


def test_experts_change_places_while_others_generate(family: Family, start: Start) -> None:
    """One request runs on without a wrong token, while two experts are loaded into the other slot again and again."""
    engine = start(family, slots=2, max_wait=0.0)
    loader = engine._loader._stream
    assert loader is not None and loader != torch.cuda.default_stream()
    engine.pin_expert("alpha")
    long = GenerationRequest("long", "alpha", (5, 6, 7), Sampling(temperature=0, max_tokens=100, ignore_eos=True))
    done, got = threading.Event(), []

    def take(chunk: Any) -> None:
        got.extend(chunk.tokens)
        if chunk.finish_reason:
            done.set()

    engine.submit(long, take)
    deadline = time.monotonic() + 60
    index = 0
    while not done.is_set() and time.monotonic() < deadline:
        name = ("beta", "gamma")[index % 2]
        request = GenerationRequest(f"r{index}", name, (5, 6), Sampling(temperature=0, max_tokens=2, ignore_eos=True))
        assert wrong(engine, family, [request]) == []
        index += 1
    assert done.wait(PATIENCE) and tuple(got) == family.greedy(long)
    assert engine.statistics().slot_loads >= 2


def test_host_copies_are_pinned_and_bounded(family: Family, start: Start) -> None:
    engine = start(family, slots=1)
    generate(engine, [GenerationRequest("one", "beta", (5, 6), Sampling(temperature=0, max_tokens=2))])
    copies = engine._copies
    assert 0 < copies.nbytes <= copies.limit


def test_hidden_states_beside_generation(family: Family, start: Start) -> None:
    engine = start(family)
    prompt = [list(range(30, 60))]
    expected = engine.pooled_hidden_states(prompt, 2)
    stop, differences = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            differences.append(float((engine.pooled_hidden_states(prompt, 2) - expected).abs().max()))

    thread = threading.Thread(target=read)
    thread.start()
    try:
        assert wrong(engine, family, requests(family, 24, seed=9)) == []
    finally:
        stop.set()
        thread.join()
    assert differences and max(differences) == 0


def test_the_base_alone_has_graphs_of_its_own(family: Family, start: Start) -> None:
    engine = start(family, max_running=4)
    batch = [request for request in requests(family, 16, seed=2) if request.expert == BASE]
    assert wrong(engine, family, batch) == []
    keys = runner(engine).inputs_and_outputs.graphs._storage.keys()
    assert {key[-1] for key in keys} == {0, 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["llama", "gemma2", "mistral"])
def test_the_proof_on_the_card_itself(kind: str, dtype: torch.dtype) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 268, "sliding_window": 512, "head_dim": 32}
    device = torch.device("cuda", torch.cuda.current_device())
    prove({"model_type": kind, **sizes}, "base", device, dtype, on_device=True)
