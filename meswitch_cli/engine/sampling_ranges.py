"""What a sampling parameter may be: the schemas of HTTP and the engine's own check read this one table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Range(NamedTuple):
    """The numbers from `low` to `high`, both included; without `low` itself where it is `above`."""

    low: float
    high: float
    above: bool = False

    def holds(self, value: float) -> bool:
        return (self.low < value if self.above else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        return f"above {self.low} and at most {self.high}" if self.above else f"from {self.low} to {self.high}"


MAX_TOP_LOGPROBS = 20
#: Stop strings, and stop tokens, of one request.
MAX_STOPS = 16
_MAX_INT32 = (1 << 31) - 1

#: By the name of `contract.Sampling`'s member; of `logit_bias`, each value.
RANGES: Mapping[str, Range] = {
    "temperature": Range(0, 2),
    "top_p": Range(0, 1, above=True),
    "top_k": Range(0, _MAX_INT32),
    "min_p": Range(0, 1),
    # Logits are divided by it: by much less than this, they would leave fp32's range.
    "repetition_penalty": Range(0.01, 10),
    "frequency_penalty": Range(-2, 2),
    "presence_penalty": Range(-2, 2),
    "logit_bias": Range(-100, 100),
    "max_tokens": Range(1, _MAX_INT32),
    "min_tokens": Range(0, _MAX_INT32),
    "logprobs": Range(0, MAX_TOP_LOGPROBS),
}
