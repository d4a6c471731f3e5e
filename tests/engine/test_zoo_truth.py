"""The truth on a real model: SmolLM2-135M and a fine-tune of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine.family import Family

import zoo
from meswitch_cli.compression.job import compress, prepare
from meswitch_cli.compression.settings import CompressionSettings
from meswitch_cli.engine import EngineSettings, TransformersEngine, generate
from meswitch_cli.engine.contract import BASE, GenerationRequest, Sampling


@pytest.mark.zoo
def test_real_experts_in_a_mixed_batch(tmp_path: Path) -> None:
    built = zoo.build(quick=True)
    job = prepare(str(built.base), str(built.experts["maths"]), tmp_path / "maths", CompressionSettings(), None)
    compress(job)
    family = Family(built.base, {"maths": job.out}, torch.float32)
    engine = TransformersEngine(
        EngineSettings(
            base=str(built.base), experts=family.artifacts, dtype="float32", cache_tokens=2048, max_model_len=512
        )
    )
    engine.start()
    try:
        tokenizer = engine.tokenizer("maths")
        batch = []
        for index, item in enumerate(zoo.items("maths", "report", quick=True)[:4]):
            chat = [{"role": "user", "content": item["prompt"]}]
            text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            prompt = tuple(tokenizer.encode(text, add_special_tokens=False))
            sampling = Sampling(temperature=0, max_tokens=10, ignore_eos=True)
            batch.append(GenerationRequest(f"{index}", (BASE, "maths")[index % 2], prompt, sampling))
        for request, completion in zip(batch, generate(engine, batch), strict=True):
            assert completion.tokens == family.greedy(request)
            assert completion.text == tokenizer.decode(completion.tokens, skip_special_tokens=True)
    finally:
        engine.stop()
