"""One replica: a `meswitch serve` of its own, on loopback, which is started again when it ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence

import httpx2

from meswitch_cli.server.lifecycle import listen
from meswitch_cli.server.replicas.choice import Load
from meswitch_cli.server.replicas.metrics import resident_experts

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
#: Seconds between two looks at a replica.
LOOK_SECONDS = 1.0
#: Seconds before a replica that ended is started again: the first time, and at most.
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0


class Replica:
    """A process, and what is known of it.

    Attributes:
        load: what requests are sent to it by.
        url: where it listens; another port each time that it is started.
    """

    def __init__(self, number: int, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        """`arguments` are those of `meswitch serve` but for host and port; `environment` is added to ours."""
        self.load = Load(number)
        self.url = ""
        self.starts = 0
        self._arguments, self._environment = tuple(arguments), dict(environment)
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = False

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def run(self, client: httpx2.AsyncClient) -> None:
        """Keep the process running, and look at it, until `stop`."""
        pause = FIRST_PAUSE
        while not self._stopping:
            process = await self._start()
            ended = asyncio.ensure_future(process.wait())
            while not ended.done():
                await self._look(client)
                if self.load.ready:
                    pause = FIRST_PAUSE
                await asyncio.wait([ended], timeout=LOOK_SECONDS)
            self.load.ready, self.load.resident = False, frozenset()
            await self._pause(ended.result(), pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def stop(self, seconds: float) -> None:
        """Let it end its requests, and end it after so many seconds."""
        self._stopping = True
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), seconds)
        except asyncio.TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()

    async def _pause(self, code: int, seconds: float) -> None:
        """Wait before the process is started again, unless it was to end."""
        if not self._stopping:
            logger.error("replica %d ended with %d; starting it again in %g s", self.load.number, code, seconds)
            await asyncio.sleep(seconds)

    async def _start(self) -> asyncio.subprocess.Process:
        bound = listen(HOST, 0)
        port = bound.getsockname()[1]
        bound.close()
        self.url = f"http://{HOST}:{port}"
        self.starts += 1
        # Said last, and said all: settings files and variables, which are a replica's too, may have them otherwise.
        own = ("--replicas", "1", "--host", HOST, "--port", str(port))
        command = [sys.executable, "-m", "meswitch_cli", "serve", *self._arguments, *own]
        # In a session of its own: a signal from the terminal is ours to pass on, once.
        self._process = await asyncio.create_subprocess_exec(
            *command, env={**os.environ, **self._environment}, start_new_session=True
        )
        return self._process

    async def _look(self, client: httpx2.AsyncClient) -> None:
        """Ask whether it takes requests, and which experts are on its device: both are told without a key."""
        try:
            self.load.ready = (await client.get(f"{self.url}/ready")).status_code == 200
            metrics = (await client.get(f"{self.url}/metrics")).text if self.load.ready else ""
        except httpx2.HTTPError:
            self.load.ready, metrics = False, ""
        self.load.resident = resident_experts(metrics)
