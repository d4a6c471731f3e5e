"""Sending a workload, and the times at which answers came."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from meswitch_cli.errors import MeswitchError, UsageError
from meswitch_cli.load.workload import Workload, WorkloadRequest


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible server: `url` without /v1, and the key that it wants, if any."""

    url: str
    key: str | None = None
    timeout: float = 600.0

    def __post_init__(self) -> None:
        """Check the address.

        Raises:
            UsageError: it is none that HTTP can reach.
        """
        import httpx2

        try:
            parsed = httpx2.URL(self.url)
            urlsplit(self.url)  # which knows a bracket without its end
        except (httpx2.InvalidURL, ValueError) as error:
            raise UsageError(f"--url {self.url}: {error}") from error
        if parsed.scheme not in ("http", "https") or not parsed.host or (parsed.port or 0) > 65535:
            raise UsageError(f"--url {self.url}: write it as http://HOST:PORT")

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"} if self.key else {}

    def options(self) -> dict[str, Any]:
        return {"base_url": self.url.rstrip("/").removesuffix("/v1"), "headers": self.headers, "timeout": self.timeout}

    def models(self) -> list[dict[str, Any]]:
        """The entries of /v1/models.

        Raises:
            MeswitchError: the server does not answer, or refuses.
        """
        import httpx2

        try:
            with httpx2.Client(**self.options()) as client:
                response = client.get("/v1/models")
        except httpx2.HTTPError as error:
            raise MeswitchError(f"{self.url}: {error}; is a server running there?") from error
        if response.status_code != 200:
            raise MeswitchError(f"{self.url}: {message_of(response.content, response.status_code)}")
        try:
            return [{**entry, "id": str(entry["id"])} for entry in response.json()["data"]]
        except (ValueError, KeyError, TypeError) as error:
            raise MeswitchError(f"{self.url}: what answers at /v1/models is no OpenAI-compatible server") from error

    def experts(self) -> list[str]:
        """The models worth loading: a meswitch server's experts, any other server's models."""
        models = self.models()
        experts = [model["id"] for model in models if model.get("kind") == "expert"]
        return experts or [model["id"] for model in models if model.get("kind") != "router"]


@dataclass
class Outcome:
    """How one request went; times in seconds since it was sent.

    Attributes:
        expert: who answered, as the server says.
        gaps: between consecutive pieces of the answer.
        error: None where an answer came whole.
    """

    model: str
    expert: str
    started: float
    first_token: float | None = None
    seconds: float = 0.0
    gaps: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None


async def run_load(
    endpoint: Endpoint, workload: Workload, on_done: Callable[[Outcome], None] = lambda outcome: None
) -> list[Outcome]:
    """Send every request, `concurrency` at a time; a failed one is an outcome, not an exception."""
    import httpx2

    waiting = iter(workload.requests)
    outcomes: list[Outcome] = []

    async def send_all(client: Any) -> None:
        for request in waiting:
            outcome = await _send(client, request, workload)
            outcomes.append(outcome)
            on_done(outcome)

    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=workload.concurrency)
    async with httpx2.AsyncClient(**endpoint.options(), limits=limits) as client:
        await asyncio.gather(*(send_all(client) for _ in range(workload.concurrency)))
    return outcomes


async def _send(client: Any, request: WorkloadRequest, workload: Workload) -> Outcome:
    import httpx2

    body = {
        "model": request.model,
        "messages": [{"role": "user", "content": request.prompt}],
        "max_tokens": workload.max_tokens,
        "temperature": workload.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    } | ({"ignore_eos": True} if workload.ignore_eos else {})
    started = time.perf_counter()
    outcome = Outcome(request.model, request.model, started)
    last, pieces = started, 0
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                outcome.error = message_of(await response.aread(), response.status_code)
                return outcome
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    outcome.error = str(event["error"].get("message"))
                    break
                outcome.expert = event.get("model", outcome.expert)
                if usage := event.get("usage"):
                    outcome.prompt_tokens = usage["prompt_tokens"]
                    outcome.completion_tokens = usage["completion_tokens"]
                if not _is_piece(event, outcome.first_token is None):
                    continue
                now = time.perf_counter()
                pieces += 1
                if outcome.first_token is None:
                    outcome.first_token = now - started
                else:
                    outcome.gaps.append(now - last)
                last = now
    except (httpx2.HTTPError, ValueError, LookupError, AttributeError, TypeError) as error:  # or no OpenAI's events
        outcome.error = f"{type(error).__name__}: {error}"
    outcome.seconds = time.perf_counter() - started
    outcome.completion_tokens = outcome.completion_tokens or pieces
    return outcome


def _is_piece(event: dict[str, Any], first: bool) -> bool:
    """Whether an event brings text; some servers send a role at once, before any token, and an end after the last.

    An answer without any text has its end as its only piece.
    """
    return any(
        (choice.get("delta") or {}).get("content") or (first and choice.get("finish_reason"))
        for choice in event.get("choices") or ()
    )


def message_of(content: bytes, status: int) -> str:
    """What an error's body says, in OpenAI's envelope or not."""
    try:
        return f"{status}: {json.loads(content)['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"{status}: {content[:200].decode('utf-8', 'replace')}"
