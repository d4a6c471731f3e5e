"""What the handlers of a server share: the engine, the router, the settings, and whether new work is taken."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from starlette.requests import Request

from meswitch_cli.engine.contract import Engine, ExpertStatus
from meswitch_cli.server.errors import ApiError
from meswitch_cli.server.feedback_file import FeedbackFile
from meswitch_cli.server.metrics import Metrics
from meswitch_cli.server.settings import ServerSettings

if TYPE_CHECKING:
    from meswitch_cli.router import Router

T = TypeVar("T")


class Service:
    """One server's parts.

    Attributes:
        feedback: where users' corrections of the router are kept; None where they are not wanted.
        draining: requests that would generate are turned away; the running ones end.
        created: Unix time of the start.
        tokens: generated for requests over HTTP since then; unlike the engine's count, it moves with every token.
    """

    def __init__(self, engine: Engine, settings: ServerSettings, router: Router | None = None) -> None:
        self.engine, self.settings, self.router = engine, settings, router
        self.feedback = FeedbackFile(settings.feedback) if settings.feedback is not None else None
        self.metrics = Metrics(engine)
        self.draining = False
        self.created = int(time.time())
        self.tokens = 0
        # One thread each: a tokenizer may be used by one thread at a time, and the router's forward pass is serial.
        self._tokenizing = ThreadPoolExecutor(1, "meswitch-tokenize")
        self._routing = ThreadPoolExecutor(1, "meswitch-route")

    @classmethod
    def of(cls, request: Request) -> Service:
        service = request.app.state.service
        assert isinstance(service, cls)
        return service

    def experts(self) -> dict[str, ExpertStatus]:
        """The served experts by name."""
        return {expert.name: expert for expert in self.engine.experts()}

    def admit(self) -> None:
        """Let a request that would generate in.

        Raises:
            ApiError: the server is going down.
        """
        if self.draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down")

    async def tokenizing(self, work: Callable[[], T]) -> T:
        """Run what uses a tokenizer, off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, work)

    async def routing(self, work: Callable[[], T]) -> T:
        """Run what uses the router, off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._routing, work)

    def close(self) -> None:
        """Free the threads; the engine is its owner's to stop."""
        self._tokenizing.shutdown(wait=False, cancel_futures=True)
        self._routing.shutdown(wait=False, cancel_futures=True)
