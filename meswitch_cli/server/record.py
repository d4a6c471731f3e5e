"""What is known of one HTTP request: its headers, its log line and its metrics all come from here."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.types import Scope

if TYPE_CHECKING:
    from meswitch_cli.server.routing import Choice

_KEY = "meswitch.record"

#: Stands for the expert and the reason of a request that failed before either was known.
NONE = "none"


@dataclass
class RequestRecord:
    """Filled in while the request is served.

    Attributes:
        started: `time.perf_counter` at its arrival.
        choice: who answers and why; None until that is decided.
        generates: whether it generates, so that its tokens are counted.
        hints: what the request says that changes no token.
        first_token: seconds from its arrival to its first token.
        error: why it failed or was refused.
    """

    id: str
    method: str
    path: str
    started: float = field(default_factory=time.perf_counter)
    status: int = 0
    choice: Choice | None = None
    generates: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    first_token: float | None = None
    finish_reasons: list[str] = field(default_factory=list)
    user: str | None = None
    hints: dict[str, Any] | None = None
    error: str | None = None
    prompt: Any = None

    @property
    def seconds(self) -> float:
        """Since its arrival."""
        return time.perf_counter() - self.started

    @property
    def labels(self) -> tuple[str, str]:
        """Expert and reason, as `metrics.LABELS` has them."""
        return (self.choice.expert, self.choice.reason) if self.choice else (NONE, NONE)

    @classmethod
    def of(cls, request: Request) -> RequestRecord:
        record = request.scope[_KEY]
        assert isinstance(record, cls)
        return record

    @classmethod
    def at(cls, scope: Scope) -> RequestRecord | None:
        """As `of`; None where nothing is recorded, as in an application without the outermost middleware."""
        record = scope.get(_KEY)
        return record if isinstance(record, cls) else None

    def attach(self, scope: Scope) -> None:
        scope[_KEY] = self
