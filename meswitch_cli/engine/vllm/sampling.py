"""A request's sampling as vLLM is asked for it. What vLLM would round, clamp or leave out is refused by name."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from meswitch_cli.engine.contract import InvalidRequestError, Sampling
from meswitch_cli.engine.expert import ServedModel
from meswitch_cli.engine.sampler import GREEDY_TEMPERATURE
from meswitch_cli.engine.sampling_ranges import RANGES

if TYPE_CHECKING:
    from vllm import SamplingParams

#: vLLM raises lower temperatures to this one.
LEAST_TEMPERATURE = 0.01
#: Members that vLLM has under the same names, with the same meanings.
_SAME = (
    "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty",
    "max_tokens", "min_tokens", "logprobs",
)  # fmt: skip
#: Under this key of `extra_args` a request's grammar reaches vLLM's workers.
GRAMMAR_KEY = "meswitch_grammar"


def sampling_options(sampling: Sampling, model: ServedModel) -> dict[str, Any]:
    """The arguments of `vllm.SamplingParams`, checked before as `check_request` does.

    vLLM sees tokens alone. Ends of text are the expert's own, so they are stop tokens to it; texts, and strings that
    end them, are our `Generation`'s, with the expert's own tokenizer.

    Raises:
        InvalidRequestError: vLLM cannot honour a parameter.
    """
    low, high, _ = RANGES["temperature"]
    temperature = 0.0 if sampling.temperature < GREEDY_TEMPERATURE else sampling.temperature
    if temperature and not LEAST_TEMPERATURE <= temperature <= high:
        message = f"temperature must be {low} or from {LEAST_TEMPERATURE} to {high} with vLLM"
        raise InvalidRequestError(message, "temperature")
    if sampling.prompt_logprobs is not None:
        # vLLM computes the prompt's logits with the head of the tokens that it samples, an expert's or not.
        raise InvalidRequestError("the log-probabilities of a prompt are not computed with vLLM", "echo")
    ends = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else model.end_ids)}
    options: dict[str, Any] = {name: getattr(sampling, name) for name in _SAME} | {
        "temperature": temperature,
        "logit_bias": dict(sampling.logit_bias) or None,
        "stop_token_ids": sorted(ends),
        "ignore_eos": True,
        "seed": None if sampling.seed is None else generator_seed(sampling.seed),
        "detokenize": False,
    }
    if sampling.constrained:
        options["min_tokens"] = 0  # as our sampler has it: the grammar says when the text may end
        options["extra_args"] = {GRAMMAR_KEY: _grammar(sampling, model)}
    return options


def sampling_params(sampling: Sampling, model: ServedModel) -> SamplingParams:
    """As `sampling_options`, made.

    Raises:
        InvalidRequestError: vLLM refuses a parameter.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    try:
        return SamplingParams(output_kind=RequestOutputKind.DELTA, **sampling_options(sampling, model))
    except ValueError as error:
        raise InvalidRequestError(str(error), getattr(error, "parameter", None)) from error


def generator_seed(seed: int) -> int:
    """Any seed as one that torch's generators take; vLLM takes -1 for none."""
    return int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=8).digest(), "little") >> 2


def _grammar(sampling: Sampling, model: ServedModel) -> dict[str, Any]:
    """What `grammar.GrammarProcessor` makes a grammar of, as plain values that reach another process."""
    return {
        "path": str(model.path),
        "digest": model.digest,
        "vocabulary": model.vocabulary,
        "end_ids": sorted(model.end_ids),
        "schema": None if sampling.json_schema is None else json.dumps(dict(sampling.json_schema)),
        "structural_tag": None if sampling.structural_tag is None else json.dumps(dict(sampling.structural_tag)),
    }
