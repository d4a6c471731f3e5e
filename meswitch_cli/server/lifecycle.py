"""A server's life: it listens, drains on the first SIGTERM or SIGINT, and stops at the second."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from meswitch_cli.errors import MeswitchError
from meswitch_cli.server.service import Service

_SIGNALS = (signal.SIGTERM, signal.SIGINT)

logger = logging.getLogger(__name__)


def listen(host: str, port: int) -> socket.socket:
    """A bound socket: a taken port is known before a model is loaded. Port 0 takes any that is free.

    Another program cannot bind the port while the model loads, although nobody listens on it yet.

    Raises:
        MeswitchError: the address is not this machine's, or the port is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise MeswitchError(f"--host {host}: {error.strerror}") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        # With the option on, Linux would let a second server bind the same port until one of the two listens.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    except (OSError, OverflowError) as error:
        bound.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise MeswitchError(f"cannot listen on {host}:{port}: {reason}; choose another --port") from error
    return bound


class Server(uvicorn.Server):
    """uvicorn, but a first signal lets running requests end while `/ready` says 503, and new ones are turned away."""

    def __init__(self, app: FastAPI, service: Service, on_started: Callable[[], None] = lambda: None) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=5,
                timeout_keep_alive=30,
                lifespan="off",
            )
        )
        self.service = service
        self._on_started = on_started
        self._drain: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        # Connections inherit it: the port can be bound anew as soon as the server has ended.
        for bound in sockets or ():
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        if self.started:
            self._on_started()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take the signals, and give them back without raising them again: after a drain all is well."""
        try:
            before = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        except ValueError:  # not the main thread: whoever runs us calls `begin_drain`
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.service.draining:
            logger.warning("second signal: stopping at once")
            self.should_exit = self.force_exit = True
            return
        self.begin_drain()

    def begin_drain(self) -> None:
        """Take no more requests, and stop once the running ones have ended; from any thread."""
        self.service.draining = True
        if self._loop is None:
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._start_drain)

    def _start_drain(self) -> None:
        self._drain = asyncio.ensure_future(self._drained())

    async def _drained(self) -> None:
        seconds = self.service.settings.drain_seconds
        logger.info("draining: running requests have %g s to end; a second signal stops at once", seconds)
        ended = await asyncio.to_thread(self.service.engine.drain, seconds)
        if not ended:
            logger.warning("requests still ran after %g s; they are cancelled", seconds)
            await asyncio.to_thread(self.service.engine.stop)
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self.force_exit:
            self.service.engine.stop()
        await super().shutdown(sockets)


def serve(server: Server, bound: socket.socket) -> None:
    """Serve on a bound socket until a signal ends it; the engine is stopped in the end."""
    try:
        server.run(sockets=[bound])
    finally:
        server.service.close()
        server.service.engine.stop()
        bound.close()
