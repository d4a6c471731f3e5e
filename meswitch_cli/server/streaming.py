"""Server-sent events, and noticing that the reader has left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Dialect:
    """How an API writes its streams.

    Attributes:
        event: an event's bytes.
        failure: the event of an error that ends the stream.
        end: what follows the last event.
    """

    event: Callable[[Any], bytes]
    failure: Callable[[ApiError], Any]
    end: bytes = b""


def unnamed(event: Any) -> bytes:
    """An event that is its data alone."""
    return b"data: " + dumps(event) + b"\n\n"


def named(event: Any) -> bytes:
    """An event that has the name of its `type`."""
    return f"event: {event['type']}\n".encode() + unnamed(event)


#: Streams of chat and text completions.
COMPLETIONS = Dialect(
    unnamed, lambda error: envelope(error.status, str(error), error.code, error.parameter), b"data: [DONE]\n\n"
)
#: What readers of an event stream pass over, and what proxies see that it lives by.
KEEP_ALIVE = b": keep-alive\n\n"


class EventStream(Response):
    """A stream of JSON events; calls `at_end` however it ends, even if it never began.

    While nothing comes for `keep_alive` seconds, as during a long prompt, a comment is sent.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[Any],
        at_end: Callable[[], None],
        keep_alive: float,
        dialect: Dialect = COMPLETIONS,
    ) -> None:
        self._events, self._at_end, self._keep_alive, self._dialect = events, at_end, keep_alive, dialect
        self._last = 0.0
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

        clock = asyncio.get_running_loop().time

        async def write(data: bytes, more: bool = True) -> None:
            self._last = clock()
            await send({"type": "http.response.body", "body": data, "more_body": more})

        dialect = self._dialect
        self._last = clock()
        keeping = asyncio.ensure_future(self._keep(write, clock))
        try:
            async for event in self._events:
                await write(dialect.event(event))
        except ApiError as error:
            await write(dialect.event(dialect.failure(error)))
        except OSError:
            raise
        except Exception as error:
            await write(dialect.event(dialect.failure(from_engine(error))))
            raise
        finally:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)
        await write(dialect.end, more=False)

    async def _keep(self, write: Callable[[bytes], Awaitable[None]], clock: Callable[[], float]) -> None:
        while True:
            idle = clock() - self._last
            if idle >= self._keep_alive:
                await write(KEEP_ALIVE)
            else:
                await asyncio.sleep(self._keep_alive - idle)
