"""vLLM's own Python class, `LLM`: adapters come with the requests, so slots grow within a step."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import psutil
import pytest
from engine.family import Kind, make_family, requests
from engine.vllm.conftest import HEAD_DIM, NEEDS_VLLM, PAGE_SIZE

pytestmark = NEEDS_VLLM

#: Each needs larger slots than the one before.
KINDS = {
    "small": Kind({"bits": 1, "salient": 0, "rank": 0}),
    "larger": Kind({"bits": 2, "salient": 4, "rank": 4}),
    "largest": Kind({"bits": 4, "salient": 8, "rank": 12}),
}


def answer(base: Path, artifacts: dict[str, Path], batch: list[Any], one_process: bool, told: Any) -> None:
    """Put the tokens of each request, asked one after the other, into a queue."""
    import os

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(not one_process))
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest

    llm = LLM(
        str(base),
        dtype="float32",
        max_model_len=256,
        block_size=PAGE_SIZE,
        enable_lora=True,
        max_loras=2,
        kv_cache_memory_bytes=16 << 20,
        enforce_eager=True,
    )
    loras = {name: LoRARequest(name, number, str(path)) for number, (name, path) in enumerate(artifacts.items(), 1)}
    found = []
    for item in batch:
        sampling = SamplingParams(temperature=0, max_tokens=item.sampling.max_tokens, ignore_eos=True)
        prompt = TokensPrompt(prompt_token_ids=list(item.prompt_tokens))
        (output,) = llm.generate(prompt, sampling, lora_request=loras.get(item.expert), use_tqdm=False)
        found.append(tuple(output.outputs[0].token_ids))
    told.put(found)
    llm.llm_engine.engine_core.shutdown()


@pytest.mark.parametrize("one_process", [False, True], ids=["engine in a process of its own", "in this process"])
def test_tokens_equal_plain_models(one_process: bool, tmp_path: Path) -> None:
    family = make_family(tmp_path, head_dim=HEAD_DIM, experts=KINDS)
    batch = requests(family, 8, seed=2)
    assert {item.expert for item in batch} >= KINDS.keys()
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    process = context.Process(target=answer, args=(family.base, family.artifacts, batch, one_process, told))
    process.start()
    try:
        while told.empty() and process.is_alive():
            process.join(0.2)
        assert not told.empty(), process.exitcode
        found = told.get()
        process.join()
    finally:
        if process.is_alive():
            for left in psutil.Process(process.pid).children(recursive=True):
                left.kill()
            process.kill()
    assert found == [family.greedy(item) for item in batch]
