"""`/v1/embeddings`: the base's own hidden states, as the official client reads them."""

from __future__ import annotations

from typing import Any

import openai
import pytest
import torch
from server.family import Family, Running
from server.refusals import refused
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXTS = ["hello", "a rather different text", "ж"]


def wanted(family: Family, text: str, layer: int) -> torch.Tensor:
    """From plain transformers: the layer's states, averaged and scaled to length 1."""
    tokenizer, model = AutoTokenizer.from_pretrained(family.base), AutoModelForCausalLM.from_pretrained(family.base)
    ids = torch.tensor([tokenizer.encode(text)])
    with torch.inference_mode():
        states = model.base_model(ids, output_hidden_states=True).hidden_states[layer]
    return torch.nn.functional.normalize(states[0].float().mean(0), dim=0)


@pytest.mark.parametrize("encoding", ["float", "base64", None])
def test_the_clients_vectors_are_the_models(running: Running, family: Family, encoding: str | None) -> None:
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
    more = {} if encoding is None else {"encoding_format": encoding}
    told = client.embeddings.create(model="base", input=TEXTS, **more)
    assert [item.index for item in told.data] == [0, 1, 2] and told.model == "base"
    counts = [running.post("/tokenize", {"model": "base", "prompt": text}).json()["count"] for text in TEXTS]
    assert told.usage.prompt_tokens == told.usage.total_tokens == sum(counts)
    if encoding == "base64":
        return  # then the client hands on what it was sent
    for text, item in zip(TEXTS, told.data, strict=True):
        assert torch.allclose(torch.tensor(item.embedding), wanted(family, text, 1), atol=1e-5)


def test_tokens_are_texts_too(running: Running) -> None:
    tokens = running.post("/tokenize", {"model": "base", "prompt": "hello"}).json()["tokens"]
    answers = [running.post("/v1/embeddings", {"model": "base", "input": given}).json() for given in ("hello", tokens)]
    assert answers[0]["data"] == answers[1]["data"]


def test_layers_differ(running: Running) -> None:
    body = {"model": "base", "input": "hello"}
    vectors = [running.post("/v1/embeddings", body | more).json()["data"] for more in ({}, {"layer": 1}, {"layer": 2})]
    assert vectors[0] == vectors[1] != vectors[2]


@pytest.mark.parametrize(
    ("change", "status", "parameter", "code"),
    [
        ({"model": "red"}, 400, "model", "invalid_value"),
        ({"model": "auto"}, 400, "model", "invalid_value"),
        ({"model": "violet"}, 404, "model", "model_not_found"),
        ({"input": ""}, 400, "input", "invalid_value"),
        ({"input": [9, 99999]}, 400, "input", "invalid_value"),
        ({"input": "x" * 600}, 400, "input", "context_length_exceeded"),
        ({"input": ["x"] * 33}, 400, "input", "invalid_value"),
        ({"layer": 3}, 400, "layer", "invalid_value"),
        ({"dimensions": 8}, 400, "dimensions", "unknown_parameter"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_embedded_is_refused_by_name(
    running: Running, change: dict[str, Any], status: int, parameter: str, code: str
) -> None:
    refused(running.post("/v1/embeddings", {"model": "base", "input": "x"} | change), status, parameter, code)
