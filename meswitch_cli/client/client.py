"""Sending a workload, and the times at which answers came."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from meswitch_cli.addresses import is_this_machine
from meswitch_cli.client.answers import AnswerDecoder, FailedAnswerError, message_of
from meswitch_cli.client.workload import Workload, WorkloadRequest
from meswitch_cli.errors import MeswitchError, UsageError


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible server: its `url`, with /v1 or without, and the key that it wants, if any."""

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

    def client(self) -> Any:
        """An `httpx2.Client` of this server.

        Raises:
            MeswitchError: the environment names a proxy that cannot be used.
        """
        import httpx2

        return self._client(httpx2.Client, httpx2.HTTPTransport)

    def async_client(self, concurrency: int) -> Any:
        """An `httpx2.AsyncClient` of this server, for so many requests at once; raises as `client`."""
        import httpx2

        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=concurrency)
        return self._client(httpx2.AsyncClient, httpx2.AsyncHTTPTransport, limits=limits)

    def failure(self, error: Exception) -> MeswitchError:
        """What to tell of a server that could not be talked to."""
        reason = str(error) or type(error).__name__
        through = f" It was asked for through the proxy that {self._proxies} names." if self._proxies else ""
        return MeswitchError(f"{self.url}: {reason}; is a server running there?{through}")

    def _client(self, make: Any, transport: Any, **options: Any) -> Any:
        base = self.url.rstrip("/").removesuffix("/chat/completions").removesuffix("/v1")
        headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
        if self._is_here:  # no proxy leads back to this machine; a transport that is given takes none
            options = {"transport": transport(**options)}
        try:
            return make(base_url=base, headers=headers, timeout=self.timeout, **options)
        except (ValueError, ImportError) as error:
            raise MeswitchError(f"the proxy that {self._proxies} names cannot be used: {error}") from error

    @property
    def _is_here(self) -> bool:
        import httpx2

        return is_this_machine(httpx2.URL(self.url).host)

    @property
    def _proxies(self) -> str:
        """Names of the variables that send requests through a proxy; empty where none does."""
        schemes = () if self._is_here else (urlsplit(self.url).scheme, "all")
        return " or ".join(f"{scheme.upper()}_PROXY" for scheme in schemes if scheme in getproxies())

    def models(self) -> list[dict[str, Any]]:
        """The entries of /v1/models.

        Raises:
            MeswitchError: the server does not answer, or refuses.
        """
        import httpx2

        try:
            with self.client() as client:
                response = client.get("/v1/models")
        except httpx2.HTTPError as error:
            raise self.failure(error) from error
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
    waiting = iter(workload.requests)
    outcomes: list[Outcome] = []

    async def send_all(client: Any) -> None:
        for request in waiting:
            outcome = await _send(client, request, workload)
            outcomes.append(outcome)
            on_done(outcome)

    async with endpoint.async_client(workload.concurrency) as client:
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
    answer = AnswerDecoder()
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                outcome.error = message_of(await response.aread(), response.status_code)
                return outcome
            async for content in response.aiter_bytes():
                for progress in answer.push(content):
                    outcome.expert = progress.model or outcome.expert
                    outcome.prompt_tokens = progress.prompt_tokens or outcome.prompt_tokens
                    outcome.completion_tokens = progress.completion_tokens or outcome.completion_tokens
                    first = outcome.first_token is None
                    # A role may come before any token; an answer without any has its end as its only piece.
                    if not (progress.generated or (first and progress.ended)):
                        continue
                    now = time.perf_counter()
                    pieces += 1
                    if first:
                        outcome.first_token = now - started
                    else:
                        outcome.gaps.append(now - last)
                    last = now
            answer.finish()
    except FailedAnswerError as error:
        outcome.error = str(error)
    except (httpx2.HTTPError, ValueError, LookupError, AttributeError, TypeError) as error:  # or no OpenAI's events
        outcome.error = f"{type(error).__name__}: {error}"
    outcome.seconds = time.perf_counter() - started
    outcome.completion_tokens = outcome.completion_tokens or pieces
    return outcome
