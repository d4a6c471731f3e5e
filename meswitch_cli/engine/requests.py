"""Refusing requests that cannot be honoured."""

from __future__ import annotations

import math

from meswitch_cli.engine.contract import GenerationRequest, InvalidRequestError
from meswitch_cli.engine.expert import ServedModel

MAX_TOP_LOGPROBS = 20
MAX_STOPS = 64


def check_request(request: GenerationRequest, model: ServedModel, max_model_len: int) -> None:
    """Check every member against its model.

    Raises:
        InvalidRequestError: one is out of its range.
    """
    sampling, prompt = request.sampling, request.prompt_tokens
    _require(bool(request.id), "id", "is empty")
    _require(bool(prompt), "prompt", "has no tokens")
    vocabulary = model.vocabulary
    _require(min(prompt) >= 0 and max(prompt) < vocabulary, "prompt", f"holds an id outside 0 to {vocabulary - 1}")
    _in_range(sampling.temperature, 0, 1e3, "temperature")
    _in_range(sampling.top_p, 0, 1, "top_p")
    _require(sampling.top_p > 0, "top_p", "must be above 0")
    _require(sampling.top_k >= 0, "top_k", "must be 0 (off) or more")
    _in_range(sampling.min_p, 0, 1, "min_p")
    _in_range(sampling.repetition_penalty, 0.01, 100, "repetition_penalty")
    _in_range(sampling.frequency_penalty, -2, 2, "frequency_penalty")
    _in_range(sampling.presence_penalty, -2, 2, "presence_penalty")
    for token, bias in sampling.logit_bias.items():
        _require(0 <= token < vocabulary, "logit_bias", f"token {token} is outside 0 to {vocabulary - 1}")
        _in_range(bias, -100, 100, "logit_bias")
    _require(all(sampling.stop), "stop", "holds an empty string")
    _require(len(sampling.stop) <= MAX_STOPS, "stop", f"has more than {MAX_STOPS} strings")
    for token in sampling.stop_token_ids:
        _require(0 <= token < vocabulary, "stop_token_ids", f"token {token} is outside 0 to {vocabulary - 1}")
    _require(sampling.max_tokens >= 1, "max_tokens", "must be at least 1")
    _require(0 <= sampling.min_tokens <= sampling.max_tokens, "min_tokens", "must be from 0 to max_tokens")
    _require(
        sampling.logprobs is None or 0 <= sampling.logprobs <= MAX_TOP_LOGPROBS,
        "logprobs",
        f"must be from 0 to {MAX_TOP_LOGPROBS}",
    )
    formatted = sampling.json_object or sampling.json_schema is not None
    _require(not (formatted and sampling.min_tokens), "min_tokens", "cannot be kept where a format says when to end")
    _require(not (sampling.json_object and sampling.json_schema is not None), "response_format", "asks for two formats")
    _require(len(prompt) < max_model_len, "prompt", f"has {len(prompt)} tokens; the most is {max_model_len - 1}")
    _require(
        len(prompt) + sampling.max_tokens <= max_model_len,
        "max_tokens",
        f"is {sampling.max_tokens} after a prompt of {len(prompt)}; together they may be {max_model_len}",
    )


def _in_range(value: float, low: float, high: float, parameter: str) -> None:
    _require(math.isfinite(value) and low <= value <= high, parameter, f"must be from {low:g} to {high:g}, not {value}")


def _require(holds: bool, parameter: str, what: str) -> None:
    if not holds:
        raise InvalidRequestError(f"{parameter} {what}", parameter)
