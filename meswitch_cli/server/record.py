"""What is known of one HTTP request: its headers, its log line and its metrics all come from here."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.types import Scope

_KEY = "meswitch.record"

#: Stands for the expert and the reason of a request that failed before either was known.
NONE = "none"


@dataclass
class RequestRecord:
    """Filled in while the request is served.

    Attributes:
        started: `time.perf_counter` at its arrival.
        expert, reason: who answers and why; `NONE` until that is decided.
        confidence: of the router, 1 where it was not asked.
        router_ms: milliseconds that the choice took.
        probabilities: of the router, by expert.
        tokens: whether this request's tokens are counted, that is, whether it generates.
    """

    id: str
    method: str
    path: str
    started: float = field(default_factory=time.perf_counter)
    status: int = 0
    expert: str = NONE
    reason: str = NONE
    confidence: float | None = None
    router_ms: float = 0.0
    probabilities: dict[str, float] = field(default_factory=dict)
    generates: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    first_token: float | None = None
    finish_reasons: list[str] = field(default_factory=list)
    user: str | None = None
    error: str | None = None
    prompt: Any = None

    @property
    def seconds(self) -> float:
        """Since its arrival."""
        return time.perf_counter() - self.started

    @classmethod
    def of(cls, request: Request) -> RequestRecord:
        record = request.scope[_KEY]
        assert isinstance(record, cls)
        return record

    def attach(self, scope: Scope) -> None:
        scope[_KEY] = self
