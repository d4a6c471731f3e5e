"""The design's truth over HTTP: greedy tokens are those of plain transformers on base + dequantised delta."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from server.family import Family, Running, Start
from transformers import AutoModelForCausalLM, AutoTokenizer

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.artifact.restore import restore
from meswitch_cli.checkpoint.checkpoint import Checkpoint

MODELS = ("base", "red", "green", "blue")
TOKENS = 20


@pytest.fixture(scope="module")
def plain(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Ordinary models and tokenizers of ordinary folders, by name."""
    folder = tmp_path_factory.mktemp("restored")
    folders = {"base": family.base}
    for name, artifact in family.artifacts.items():
        folders[name] = folder / name
        restore(Artifact.open(artifact), Checkpoint.open(str(family.base)), folders[name])
    yield {
        name: (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(),
            AutoTokenizer.from_pretrained(path),
        )
        for name, path in folders.items()
    }


def greedy(plain: dict[str, Any], name: str, text: str) -> list[int]:
    model, tokenizer = plain[name]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    with torch.no_grad():
        out = model.generate(prompt, max_new_tokens=TOKENS, do_sample=False, attention_mask=torch.ones_like(prompt))
    tokens: list[int] = out[0, prompt.shape[1] :].tolist()
    return tokens


def over_http(server: Running, name: str, text: str, stream: bool) -> list[int]:
    import json

    body = {"model": name, "messages": [{"role": "user", "content": text}], "max_tokens": TOKENS, "temperature": 0}
    response = server.post("/v1/chat/completions", body | {"stream": stream, "return_token_ids": True})
    assert response.status_code == 200, response.text
    if not stream:
        return list(response.json()["choices"][0]["token_ids"])
    events = [line[6:] for line in response.text.splitlines() if line.startswith("data: {")]
    return [token for event in events for token in json.loads(event)["choices"][0]["token_ids"]]


@pytest.mark.parametrize(("slots", "sharing", "concurrency"), [(1, True, 6), (2, False, 16), (4, True, 32)])
def test_mixed_batches_over_http_are_the_plain_models(
    start_server: Start, plain: dict[str, Any], slots: int, sharing: bool, concurrency: int
) -> None:
    server = start_server(slots=slots, prefix_sharing=sharing, max_wait=0.2)
    rng = random.Random(slots)
    cases = [(name, f"{prefix} {index}") for name in MODELS for prefix in ("say", "count to") for index in range(4)]
    wanted = {case: greedy(plain, *case) for case in cases}
    rng.shuffle(cases)
    with ThreadPoolExecutor(concurrency) as pool:
        streamed = [rng.random() < 0.5 for _ in cases]
        told = list(pool.map(lambda case, stream: over_http(server, *case, stream), cases, streamed))
    wrong = [case for case, tokens in zip(cases, told, strict=True) if tokens != wanted[case]]
    assert wrong == []
    assert len({tuple(tokens) for tokens in told}) > len(cases) / 2  # they do not all say the same


def test_templates_and_added_tokens_are_the_experts_own(
    running: Running, plain: dict[str, Any], tmp_path: Path
) -> None:
    for name in MODELS:
        tokenizer = plain[name][1]
        told = running.post("/tokenize", {"model": name, "messages": [{"role": "user", "content": "hi <|added_1|>"}]})
        wanted = tokenizer.apply_chat_template(
            [{"role": "user", "content": "hi <|added_1|>"}], add_generation_prompt=True, return_dict=False
        )
        assert told.json()["tokens"] == wanted
        back = running.post("/detokenize", {"model": name, "tokens": wanted})
        assert back.json()["prompt"] == tokenizer.decode(wanted)
    assert len(running.post("/tokenize", {"model": "green", "prompt": "<|added_1|>"}).json()["tokens"]) == 1
    assert len(running.post("/tokenize", {"model": "red", "prompt": "<|added_1|>"}).json()["tokens"]) > 1
