"""Sampling parameters, on real logits and through the engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.family import Family

from meswitch_cli.engine import Completion, TransformersEngine, generate
from meswitch_cli.engine.contract import BASE, GenerationRequest, InvalidRequestError, Sampling
from meswitch_cli.engine.sampler import choose
from meswitch_cli.engine.sampling_defaults import sampling_defaults

Start = Callable[..., TransformersEngine]
PROMPT = tuple(range(40, 60))


@pytest.fixture(scope="module")
def engine(family: Family) -> Any:
    from meswitch_cli.engine import EngineSettings

    made = TransformersEngine(
        EngineSettings(
            base=str(family.base), experts=family.artifacts, max_model_len=256, cache_tokens=8192, page_size=8
        )
    )
    made.start()
    yield made
    made.stop()


def run(
    engine: TransformersEngine, expert: str = "alpha", prompt: tuple[int, ...] = PROMPT, **sampling: Any
) -> Completion:
    (completion,) = generate(engine, [GenerationRequest("one", expert, prompt, Sampling(**sampling))])
    assert completion.error is None
    return completion


class _Fixed:
    """A sampler over given logits, without an engine."""

    def __new__(cls, seed: int = 0, vocabulary: int = 50, generated: tuple[int, ...] = (), **sampling: Any) -> Any:
        from meswitch_cli.engine.expert import ServedModel
        from meswitch_cli.engine.sampler import Sampler

        model = ServedModel(
            name=BASE, path=None, digest="", tokenizer=None, vocabulary=vocabulary, end_ids=frozenset({1})
        )  # type: ignore[arg-type]
        sampler = Sampler(GenerationRequest("x", BASE, (5, 6), Sampling(**sampling)), model, seed, None)
        for token in generated:
            sampler.take(token)
        return sampler


def draw(logits: torch.Tensor, count: int, **sampling: Any) -> list[int]:
    samplers = [_Fixed(seed, len(logits), **sampling) for seed in range(count)]
    return [choice.token for choice in choose(logits.repeat(count, 1), samplers)]


def test_distribution_is_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5])
    drawn = torch.tensor(draw(logits, 4000, temperature=0.7)).bincount(minlength=5) / 4000
    expected = torch.softmax(logits / 0.7, 0)
    # Four standard deviations of a proportion over 4,000 draws.
    assert ((drawn - expected).abs() < 4 * (expected * (1 - expected) / 4000).sqrt()).all()


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        ({"top_k": 2}, {2, 1}),
        ({"top_p": 0.6}, {2}),
        ({"top_p": 0.7}, {2, 1}),
        ({"min_p": 0.3}, {2, 1}),
        ({"top_k": 1, "temperature": 5.0}, {2}),
        ({"top_p": 1e-9}, {2}),
    ],
    ids=str,
)
def test_restrictions(sampling: dict[str, Any], allowed: set[int]) -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, -0.5])  # probabilities .082 .223 .606 .030 .050
    assert set(draw(logits, 300, **sampling)) == allowed


def test_top_p_of_a_flat_distribution_looks_past_the_candidates() -> None:
    logits = torch.zeros(5000)
    logits[:10] = 0.1
    sampler = _Fixed(0, 5000, top_p=0.9)
    row = logits.clone()
    sampler.restrict(row)
    assert int((row > -torch.inf).sum()) == 5000  # ties at the threshold stay
    logits = torch.linspace(0, 0.1, 5000)
    row = logits.clone()
    sampler.restrict(row)
    probabilities = torch.softmax(logits.double(), 0)
    kept = row > -torch.inf
    assert 0.9 <= float(probabilities[kept].sum()) < 0.9 + float(probabilities.max())


def test_penalties_and_bias_by_hand() -> None:
    logits = torch.tensor([1.0, 2.0, -3.0, 4.0, 0.5, 6.0, -7.0, 1.5])
    sampler = _Fixed(
        0,
        8,
        generated=(3, 3, 2),
        repetition_penalty=2.0,
        frequency_penalty=0.5,
        presence_penalty=0.25,
        logit_bias={0: 10.0, 7: -100.0},
    )
    row = logits.clone()
    sampler.adjust(row)
    # Prompt 5, 6; generated 3 twice and 2 once.
    expected = torch.tensor([11.0, 2.0, -6.0 - 0.5 - 0.25, 2.0 - 1.0 - 0.25, 0.5, 3.0, -14.0, -98.5])
    torch.testing.assert_close(row, expected)


def test_rows_beyond_the_vocabulary_are_never_chosen() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, 50.0, 60.0])
    assert [choice.token for choice in choose(logits[None].clone(), [_Fixed(0, 3, temperature=0)])] == [2]
    assert set(draw(logits[:5], 50, temperature=1.0)) == {4}


def test_no_finite_score_is_an_error_of_that_request_alone() -> None:
    logits = torch.tensor([[float("nan")] * 5, [0.0, 1.0, 0.0, 0.0, 0.0]])
    choices = choose(logits, [_Fixed(0, 5, temperature=0), _Fixed(0, 5, temperature=0)])
    assert [choice.token for choice in choices] == [None, 1]


def test_seed_decides_whatever_else_is_in_the_batch(engine: TransformersEngine, family: Family) -> None:
    options: dict[str, Any] = {"temperature": 1.0, "max_tokens": 24, "seed": 11, "ignore_eos": True}
    alone = run(engine, **options).tokens
    others = [
        GenerationRequest(
            f"other-{i}", name, PROMPT[i:], Sampling(temperature=1.3, max_tokens=30, seed=i, ignore_eos=True)
        )
        for i, name in enumerate([BASE, "alpha", "beta", "gamma", "alpha"])
    ]
    mine = GenerationRequest("mine", "alpha", PROMPT, Sampling(**options))
    completions = generate(engine, [*others[:3], mine, *others[3:]])
    assert completions[3].tokens == alone
    assert run(engine, **{**options, "seed": 12}).tokens != alone
    assert completions[1].tokens != alone


def test_requests_without_a_seed_differ(engine: TransformersEngine) -> None:
    assert len({run(engine, temperature=1.0, max_tokens=20, ignore_eos=True).tokens for _ in range(3)}) == 3


def test_logprobs_are_the_plain_models(engine: TransformersEngine, family: Family) -> None:
    completion = run(engine, "gamma", temperature=0.8, seed=3, max_tokens=6, logprobs=3, ignore_eos=True)
    ids = torch.tensor([[*PROMPT, *completion.tokens]])
    with torch.inference_mode():
        logits = family.references["gamma"](ids).logits[0].float()
    expected = torch.log_softmax(logits, 1)[len(PROMPT) - 1 : -1]
    assert len(completion.logprobs) == 6
    for row, (token, reported) in enumerate(zip(completion.tokens, completion.logprobs, strict=True)):
        assert reported.token == token
        assert reported.logprob == pytest.approx(float(expected[row, token]), abs=1e-3)
        assert [item[0] for item in reported.top] == torch.topk(expected[row], 3).indices.tolist()
    assert run(engine, temperature=0, max_tokens=2, logprobs=0).logprobs[0].top == ()


def test_length_stop_and_minimum(engine: TransformersEngine, family: Family) -> None:
    free = run(engine, temperature=0, max_tokens=10, ignore_eos=True)
    assert (free.finish_reason, len(free.tokens)) == ("length", 10)
    stop = free.tokens[4]
    first = free.tokens.index(stop)
    stopped = run(engine, temperature=0, max_tokens=10, ignore_eos=True, stop_token_ids=(stop,))
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
    assert stopped.tokens == free.tokens[: first + 1]
    longer = run(engine, temperature=0, max_tokens=10, min_tokens=first + 3, stop_token_ids=(stop,), ignore_eos=True)
    assert len(longer.tokens) >= first + 3
    assert stop not in longer.tokens[: first + 2]


def test_text_is_the_tokens_decoded(engine: TransformersEngine) -> None:
    tokenizer = engine.tokenizer("alpha")
    for seed in range(4):
        completion = run(engine, temperature=1.0, seed=seed, max_tokens=40, ignore_eos=True)
        assert completion.text == tokenizer.decode(completion.tokens, skip_special_tokens=True)


def test_stop_strings_are_held_back(engine: TransformersEngine) -> None:
    whole = run(engine, temperature=1.0, seed=5, max_tokens=40, ignore_eos=True).text
    stop = whole[6:9]
    completion = run(engine, temperature=1.0, seed=5, max_tokens=40, ignore_eos=True, stop=(stop, "never this"))
    assert completion.text == whole[: whole.index(stop)]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)


@pytest.mark.parametrize("expert", [BASE, "gamma"])
def test_json_schema(engine: TransformersEngine, expert: str) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 5}, "size": {"enum": [1, 2, 3]}},
        "required": ["name", "size"],
        "additionalProperties": False,
    }
    for seed in range(3):
        completion = run(engine, expert, temperature=1.0, seed=seed, max_tokens=120, json_schema=schema)
        assert completion.finish_reason == "stop"
        value = json.loads(completion.text)
        assert set(value) == {"name", "size"} and value["size"] in (1, 2, 3) and len(value["name"]) <= 5


def test_json_object(engine: TransformersEngine) -> None:
    # Random weights ramble, so the object is kept short by favouring what closes it.
    close = {engine.tokenizer("beta").encode(text, add_special_tokens=False)[0]: 60.0 for text in ("}", '"', ":")}
    completion = run(engine, "beta", temperature=1.0, seed=1, max_tokens=200, json_object=True, logit_bias=close)
    assert completion.finish_reason == "stop"
    assert isinstance(json.loads(completion.text), dict)


def test_json_has_one_way_to_be_written(engine: TransformersEngine) -> None:
    """A model that would write spaces and line ends for ever is not let: between JSON's signs there is one space."""
    tokenizer = engine.tokenizer("beta")
    white = {tokenizer.encode(text, add_special_tokens=False)[0]: 100.0 for text in (" ", "\n", "\t")}
    numbers = {"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 3}
    schema = {
        "type": "object",
        "properties": {"size": {"enum": [1, 2, 3]}, "inner": {"type": "object", "properties": {"numbers": numbers}}},
        "required": ["size", "inner"],
        "additionalProperties": False,
    }
    schema["properties"]["inner"] |= {"required": ["numbers"], "additionalProperties": False}
    for seed in range(3):
        completion = run(engine, "beta", seed=seed, max_tokens=120, json_schema=schema, logit_bias=white)
        assert completion.finish_reason == "stop"
        assert completion.text == json.dumps(json.loads(completion.text))
    rambling = run(engine, "beta", seed=1, max_tokens=60, json_object=True, logit_bias=white)
    assert rambling.text.startswith(('{"', "{}")) and not set("\n\t") & set(rambling.text)


@pytest.mark.parametrize(
    ("parameter", "sampling"),
    [
        ("temperature", {"temperature": -1.0}),
        ("temperature", {"temperature": float("nan")}),
        ("top_p", {"top_p": 0.0}),
        ("top_k", {"top_k": -1}),
        ("min_p", {"min_p": 1.5}),
        ("repetition_penalty", {"repetition_penalty": 0.0}),
        ("frequency_penalty", {"frequency_penalty": 2.5}),
        ("presence_penalty", {"presence_penalty": -3.0}),
        ("logit_bias", {"logit_bias": {10_000: 1.0}}),
        ("logit_bias", {"logit_bias": {3: 101.0}}),
        ("stop", {"stop": ("",)}),
        ("stop_token_ids", {"stop_token_ids": (-1,)}),
        ("max_tokens", {"max_tokens": 0}),
        ("max_tokens", {"max_tokens": 10_000}),
        ("min_tokens", {"min_tokens": 5, "max_tokens": 4}),
        ("min_tokens", {"min_tokens": 2, "json_object": True}),
        ("min_tokens", {"min_tokens": 2, "json_schema": {}}),
        ("logprobs", {"logprobs": 21}),
        ("response_format", {"json_object": True, "json_schema": {}}),
        ("response_format", {"json_schema": {"type": "no such type"}}),
        ("response_format", {"json_schema": {"$ref": "#"}}),
        ("response_format", {"json_schema": {"type": "integer", "not": {"const": 1}}}),
        ("response_format", {"json_schema": {"type": "string", "pattern": "("}}),
    ],
    ids=str,
)
def test_impossible_parameters_are_refused_by_name(
    engine: TransformersEngine, parameter: str, sampling: dict[str, Any]
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        engine.submit(GenerationRequest("bad", BASE, PROMPT, Sampling(**sampling)), lambda chunk: None)
    assert caught.value.parameter == parameter and ".cc:" not in str(caught.value)
    assert engine.statistics().waiting == 0


@pytest.mark.parametrize(
    "prompt", [(), (-1,), (271 - 3 + 1,), tuple([5] * 256)], ids=["empty", "negative", "added", "long"]
)
def test_impossible_prompts_are_refused(engine: TransformersEngine, prompt: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        engine.submit(GenerationRequest("bad", BASE, prompt), lambda chunk: None)
    assert caught.value.parameter == "prompt"


def test_a_grammar_leaves_words_alone(engine: TransformersEngine) -> None:
    """Tabs and other control characters are forbidden in JSON alone."""
    words = {"type": "structural_tag", "format": {"type": "any_text", "excludes": ["<tool>"]}}
    (tab,) = engine.tokenizer("beta").encode("\t", add_special_tokens=False)
    text = run(engine, "beta", max_tokens=5, logit_bias={tab: 100.0}, structural_tag=words, ignore_eos=True).text
    assert text == "\t" * 5
    limited = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 4}}, "required": ["a"]}
    close = limited | {"additionalProperties": False}
    inside = {"type": "json_schema", "json_schema": close, "max_whitespace_cnt": 1}
    inside = {"type": "structural_tag", "format": inside}
    value = run(engine, "beta", max_tokens=60, logit_bias={tab: 100.0}, structural_tag=inside, seed=2).text
    assert len(json.loads(value)["a"]) <= 4


def test_special_tokens_are_shown_where_that_is_asked(engine: TransformersEngine) -> None:
    (special,) = engine.tokenizer("beta").encode("<|user|>", add_special_tokens=False)
    (plain,) = engine.tokenizer("beta").encode("a", add_special_tokens=False)
    bias = {special: 100.0, plain: 100.0}
    hidden = run(engine, "beta", max_tokens=12, logit_bias=bias, temperature=2.0, seed=3)
    shown = run(engine, "beta", max_tokens=12, logit_bias=bias, temperature=2.0, seed=3, shown_tokens=(special,))
    assert hidden.tokens == shown.tokens and set(shown.tokens) == {special, plain}
    assert hidden.text == "a" * hidden.tokens.count(plain)
    assert shown.text == "".join("a" if token == plain else "<|user|>" for token in shown.tokens)


@pytest.mark.parametrize(
    ("config", "defaults"),
    [
        ({}, {}),
        ({"eos_token_id": 3, "max_new_tokens": 9}, {}),
        ({"temperature": 0.6, "top_p": 0.95, "top_k": 20}, {"temperature": 0.6, "top_p": 0.95, "top_k": 20}),
        ({"do_sample": True, "min_p": 0.1, "repetition_penalty": 1.1}, {"min_p": 0.1, "repetition_penalty": 1.1}),
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.0}),
        ({"temperature": None, "top_k": 0, "top_p": 1}, {"top_k": 0, "top_p": 1}),
        ({"temperature": 9.0, "top_p": "x", "top_k": 1.5, "min_p": True}, {}),
    ],
    ids=str,
)
def test_what_a_model_sets_of_its_sampling(tmp_path: Path, config: dict[str, Any], defaults: dict[str, float]) -> None:
    assert sampling_defaults(tmp_path) == {}
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert sampling_defaults(tmp_path) == defaults
