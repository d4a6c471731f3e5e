"""Server-sent events, and noticing that the reader has left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from meswitch_cli.server.errors import ApiError, envelope, from_engine
from meswitch_cli.server.token_text import dumps

T = TypeVar("T")


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client closes its connection.

    Raises:
        ClientGone: it did.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A stream of JSON events, `data: [DONE]` last; calls `at_end` however it ends, even if it never began."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[Any], at_end: Callable[[], None]) -> None:
        self._events, self._at_end = events, at_end
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self._write(send))
        except (ClientGone, OSError):  # uvicorn says OSError where it noticed first
            pass
        finally:
            self._at_end()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})

        async def write(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": more})

        try:
            async for event in self._events:
                await write(dumps(event))
        except ApiError as error:
            await write(dumps(envelope(error.status, str(error), error.code, error.parameter)))
        except OSError:
            raise
        except Exception as error:
            failure = from_engine(error)
            await write(dumps(envelope(failure.status, str(failure), failure.code)))
            raise
        await write(b"[DONE]", more=False)
