"""The life of a front and its replicas: they start together, and a signal ends them together."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import httpx2
import uvicorn

from meswitch_cli.errors import MeswitchError
from meswitch_cli.server.replicas.front import front_app
from meswitch_cli.server.replicas.process import Replica

#: Options of `meswitch serve` that are the front's, by how many words they are.
_OF_FRONT = ("--replicas", "--host", "--port")


def replica_arguments(arguments: Sequence[str]) -> list[str]:
    """The arguments of `meswitch serve` for a replica: all but those that are the front's."""
    kept: list[str] = []
    words = iter(arguments)
    for word in words:
        if word in _OF_FRONT:
            next(words, None)
        elif not word.startswith(tuple(f"{name}=" for name in _OF_FRONT)):
            kept.append(word)
    return kept


def environments(count: int, device: str, devices: int, each: int = 1) -> list[Mapping[str, str]]:
    """What each replica's environment has beside ours: `each` GPUs of its own, where there are any.

    Raises:
        MeswitchError: there are more replicas than GPUs.
    """
    if device == "cpu" or devices == 0:
        return [{} for _ in range(count)]
    if device != "auto" and device != "cuda":
        raise MeswitchError(f"--replicas shares out the GPUs itself; --device {device} names one")
    visible = [item for item in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if item]
    names = visible or [str(number) for number in range(devices)]
    if count * each > len(names):
        raise MeswitchError(f"--replicas {count}: there are {len(names)} GPUs, and each replica takes {each}")
    return [{"CUDA_VISIBLE_DEVICES": ",".join(names[at * each : (at + 1) * each])} for at in range(count)]


class FrontServer(uvicorn.Server):
    """uvicorn, which a signal has stop: replicas end their requests while it still passes answers on."""

    def __init__(self, config: uvicorn.Config, on_signal: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_signal = on_signal

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: Any) -> None:
        self._on_signal()


def serve_replicas(
    bound: socket.socket,
    arguments: Sequence[str],
    extra: Sequence[Mapping[str, str]],
    *,
    max_body_bytes: int,
    drain_seconds: float,
    on_started: Callable[[], None] = lambda: None,
) -> None:
    """Serve on a bound socket until a signal: a `meswitch serve` with `arguments` for each environment of `extra`."""
    asyncio.run(_serve(bound, arguments, extra, max_body_bytes, drain_seconds, on_started))


async def _serve(
    bound: socket.socket,
    arguments: Sequence[str],
    extra: Sequence[Mapping[str, str]],
    max_body_bytes: int,
    drain_seconds: float,
    on_started: Callable[[], None],
) -> None:
    replicas = [Replica(number, arguments, environment) for number, environment in enumerate(extra)]
    ending = asyncio.Event()
    loop = asyncio.get_running_loop()
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=64)

    def stop() -> None:
        loop.call_soon_threadsafe(ending.set)

    async with (
        httpx2.AsyncClient(timeout=httpx2.Timeout(None, connect=5.0), limits=limits, trust_env=False) as client,
        httpx2.AsyncClient(timeout=5.0, trust_env=False) as looking,
    ):
        server = FrontServer(
            uvicorn.Config(
                front_app(replicas, client, max_body_bytes),
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=5,
                lifespan="off",
            ),
            stop,
        )
        running = [asyncio.ensure_future(replica.run(looking)) for replica in replicas]
        serving = asyncio.ensure_future(server.serve(sockets=[bound]))
        try:
            on_started()
            await asyncio.wait([serving, asyncio.ensure_future(ending.wait())], return_when=asyncio.FIRST_COMPLETED)
            # A replica drains for so long, and has a little more to end.
            await asyncio.gather(*(replica.stop(drain_seconds + 10) for replica in replicas))
            server.should_exit = True
            await serving
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            for replica in replicas:
                await replica.stop(0)
            bound.close()
