"""Refusing requests that cannot be honoured."""

from __future__ import annotations

from collections.abc import Mapping

from meswitch_cli.engine.contract import GenerationRequest, InvalidRequestError
from meswitch_cli.engine.expert import ServedModel
from meswitch_cli.engine.sampling_ranges import MAX_STOPS, RANGES


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
    for name, allowed in RANGES.items():
        given = getattr(sampling, name)
        for value in given.values() if isinstance(given, Mapping) else (given,):
            _require(value is None or allowed.holds(value), name, f"must be {allowed}, not {value}")
    asked, allowed = sampling.prompt_logprobs, RANGES["logprobs"]
    _require(asked is None or allowed.holds(asked), "prompt_logprobs", f"must be {allowed}, not {asked}")
    for name in ("logit_bias", "stop_token_ids", "shown_tokens"):
        for token in getattr(sampling, name):
            _require(0 <= token < vocabulary, name, f"token {token} is outside 0 to {vocabulary - 1}")
    _require(all(sampling.stop), "stop", "holds an empty string")
    for name in ("stop", "stop_token_ids"):
        _require(len(getattr(sampling, name)) <= MAX_STOPS, name, f"has more than {MAX_STOPS} elements")
    _require(sampling.min_tokens <= sampling.max_tokens, "min_tokens", "must be from 0 to max_tokens")
    _require(
        not (sampling.constrained and sampling.min_tokens),
        "min_tokens",
        "cannot be kept where a format says when to end",
    )
    formats = (sampling.json_object, sampling.json_schema is not None, sampling.structural_tag is not None)
    _require(sum(formats) <= 1, "response_format", "asks for two formats")
    _require(len(prompt) < max_model_len, "prompt", f"has {len(prompt)} tokens; the most is {max_model_len - 1}")
    _require(
        len(prompt) + sampling.max_tokens <= max_model_len,
        "max_tokens",
        f"is {sampling.max_tokens} after a prompt of {len(prompt)}; together they may be {max_model_len}",
    )


def _require(holds: bool, parameter: str, what: str) -> None:
    if not holds:
        raise InvalidRequestError(f"{parameter} {what}", parameter)
