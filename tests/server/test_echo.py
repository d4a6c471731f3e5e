"""`echo` with `logprobs`: a prompt's log-probabilities over HTTP, and lm-eval's multiple choice with them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from server.family import Family, Running
from transformers import AutoModelForCausalLM

PROMPT = {"model": "base", "prompt": "hello there", "max_tokens": 3, "temperature": 0, "echo": True, "logprobs": 2}


def complete(running: Running, **change: Any) -> dict[str, Any]:
    response = running.post("/v1/completions", PROMPT | change)
    assert response.status_code == 200, response.text
    return dict(response.json()["choices"][0])


def test_a_prompt_comes_back_with_its_log_probabilities(running: Running, family: Family) -> None:
    choice = complete(running)
    told = choice["logprobs"]
    tokens = running.post("/tokenize", {"model": "base", "prompt": PROMPT["prompt"]}).json()["tokens"]
    assert choice["text"].startswith("hello there") and len(told["tokens"]) == len(tokens) + 3
    assert (told["token_logprobs"][0], told["top_logprobs"][0]) == (None, None)
    for place, text in zip(told["text_offset"], told["tokens"], strict=True):
        assert "\ufffd" in text or choice["text"].startswith(text, place)
    model = AutoModelForCausalLM.from_pretrained(family.base)
    with torch.inference_mode():
        logits = model(torch.tensor([tokens])).logits[0, :-1]
    right = torch.log_softmax(logits.float(), 1)
    own = torch.tensor(told["token_logprobs"][1 : len(tokens)])
    assert torch.allclose(own, right[torch.arange(len(tokens) - 1), tokens[1:]], atol=1e-4)
    for value, top in zip(told["token_logprobs"][1:], told["top_logprobs"][1:], strict=True):
        assert value in top.values() and 2 <= len(top) <= 3


def test_a_stream_and_token_ids_say_the_same(running: Running) -> None:
    whole = complete(running)
    text = running.post("/v1/completions", PROMPT | {"stream": True}).text
    parts = [json.loads(line[6:])["choices"][0] for line in text.splitlines() if line.startswith("data: {")]
    assert "".join(part["text"] for part in parts) == whole["text"]
    for name, values in whole["logprobs"].items():
        assert [item for part in parts for item in part["logprobs"][name]] == values
    tokens = running.post("/tokenize", {"model": "base", "prompt": PROMPT["prompt"]}).json()["tokens"]
    assert complete(running, prompt=tokens)["logprobs"] == whole["logprobs"]
    twice = running.post("/v1/completions", PROMPT | {"prompt": [PROMPT["prompt"], "no"], "n": 2}).json()["choices"]
    same = [choice["logprobs"]["tokens"] == whole["logprobs"]["tokens"] for choice in twice]
    assert same == [True, True, False, False]
    for choice in twice[:2]:  # in another batch, by rounding
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(whole["logprobs"]["token_logprobs"], abs=1e-4)


def test_lm_eval_chooses_as_the_plain_model_does(running: Running, family: Family) -> None:
    completions = pytest.importorskip("lm_eval.models.openai_completions")
    instance = pytest.importorskip("lm_eval.api.instance").Instance
    model = completions.LocalCompletionsAPI(
        base_url=f"{running.url}/v1/completions",
        model="base",
        tokenizer=str(family.base),
        tokenizer_backend="huggingface",
        num_concurrent=1,
        max_length=256,
    )
    asked = [("one two", " three"), ("one two", " q"), ("a", "bc")]
    requests = [instance("loglikelihood", {}, pair, index) for index, pair in enumerate(asked)]
    plain = AutoModelForCausalLM.from_pretrained(family.base)
    for (context, continuation), (value, greedy) in zip(asked, model.loglikelihood(requests), strict=True):
        before = model.tok_encode(context)
        tokens = before + model.tok_encode(continuation)
        with torch.inference_mode():
            scores = torch.log_softmax(plain(torch.tensor([tokens])).logits[0].float(), 1)
        own = [float(scores[place - 1, tokens[place]]) for place in range(len(before), len(tokens))]
        assert abs(value - sum(own)) < 1e-3
        best = [float(scores[place - 1].max()) for place in range(len(before), len(tokens))]
        assert bool(greedy) == (own == best)
