"""A server in a program, as `meswitch serve` runs one."""

from __future__ import annotations

import dataclasses
import socket
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from meswitch_cli.addresses import in_url
from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.engine.settings import EngineSettings
from meswitch_cli.engine.transformers_engine import TransformersEngine
from meswitch_cli.errors import MeswitchError, UsageError
from meswitch_cli.library.engine import artifact_folder
from meswitch_cli.names import GateMode
from meswitch_cli.paths import user_path
from meswitch_cli.server.app import create_app
from meswitch_cli.server.lifecycle import Server, listen
from meswitch_cli.server.lifecycle import serve as run_until_drained
from meswitch_cli.server.routing import open_served_router
from meswitch_cli.server.service import Service
from meswitch_cli.server.settings import ServerSettings

_START_SECONDS = 60.0
_ENGINE_OPTIONS = frozenset(field.name for field in dataclasses.fields(EngineSettings)) - {"base", "experts"}
_SERVER_OPTIONS = frozenset(field.name for field in dataclasses.fields(ServerSettings))


class RunningServer:
    """A server that listens, in a thread of this process; a context manager that stops it in the end.

    Attributes:
        address: `http://HOST:PORT`.
        warnings: what is odd about the router, and about who may use the server.
    """

    def __init__(self, service: Service, bound: socket.socket, host: str, warnings: tuple[str, ...]) -> None:
        self.address = f"http://{in_url(host)}:{bound.getsockname()[1]}"
        self.warnings = warnings
        started = threading.Event()
        self._server = Server(create_app(service), service, on_started=started.set)
        self._thread = threading.Thread(
            target=run_until_drained, args=(self._server, bound), name="meswitch-server", daemon=True
        )
        self._thread.start()
        if not started.wait(_START_SECONDS):
            self.stop()
            raise MeswitchError(f"{self.address}: the server did not start")

    def __enter__(self) -> RunningServer:
        return self

    def __exit__(self, *reason: object) -> None:
        self.stop()

    def wait(self) -> None:
        """Serve until `stop` is called, or the program is interrupted."""
        while self._thread.is_alive():
            self._thread.join(1.0)

    def stop(self) -> None:
        """Take no more requests, let the running ones end (`drain_seconds`), and free everything."""
        self._server.begin_drain()
        self._thread.join()


def serve(
    base: str | Path,
    experts: Mapping[str, Artifact | str | Path] | None = None,
    *,
    router: str | Path | None = None,
    gate: GateMode | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    **settings: Any,
) -> RunningServer:
    """Serve a base and its experts behind OpenAI's API, as `meswitch serve` does; returns when requests are taken.

    `serve(...).wait()` serves for good; `with serve(..., port=0) as server:` serves for a block.

    Args:
        base: checkpoint folder or Hub id.
        experts: artifacts (folders, Hub ids or opened ones) by name.
        router: a router's folder; makes the model "auto".
        gate: how much the router refuses; None is its own.
        host, port: where to listen; port 0 takes a free one.
        settings: of `EngineSettings` and `ServerSettings`, by name: `slots=4`, `api_keys=("secret",)`; those left out
            have the command's defaults.

    Raises:
        UsageError: a setting is impossible, or there is none of that name.
        MeswitchError: the address is taken, nothing can be served, or the router is of another base.
    """
    if unknown := sorted(set(settings) - _ENGINE_OPTIONS - _SERVER_OPTIONS):
        raise UsageError(f"no such setting: {', '.join(unknown)}")
    folders = {name: artifact_folder(artifact) for name, artifact in (experts or {}).items()}
    of_server = {name: value for name, value in settings.items() if name in _SERVER_OPTIONS}
    of_engine = {name: value for name, value in settings.items() if name in _ENGINE_OPTIONS}
    server_settings = ServerSettings(**of_server)
    engine_settings = EngineSettings(base=str(base), experts=folders, **({"strict": True} | of_engine))
    bound = listen(host, port)
    engine = TransformersEngine(engine_settings)
    warnings: list[str] = []
    try:
        engine.start()
        chosen = None if router is None else open_served_router(user_path(router), engine, warnings.append, gate)
        service = Service(engine, server_settings, chosen)
        if server_settings.is_open(host):
            warnings.append("everybody who reaches this address may use it; api_keys asks for a key")
        return RunningServer(service, bound, host, tuple(warnings))
    except BaseException:
        engine.stop()
        bound.close()
        raise
