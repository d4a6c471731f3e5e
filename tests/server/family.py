"""A tiny family of experts, and a real server over a real engine in a thread."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import engine.family
import httpx2
from engine.family import Family, Kind, OneSeed
from patience import PATIENCE

from meswitch_cli.engine.contract import Engine
from meswitch_cli.engine.settings import EngineSettings
from meswitch_cli.engine.slotted_engine import SlottedEngine
from meswitch_cli.engine.transformers_engine import TransformersEngine
from meswitch_cli.server.app import create_app
from meswitch_cli.server.lifecycle import Server, listen, serve
from meswitch_cli.server.service import Service
from meswitch_cli.server.settings import ServerSettings

#: `MESWITCH_TEST_ENGINE=vllm` runs the tests of what HTTP does over vLLM, where that is installed.
ENGINE = os.environ.get("MESWITCH_TEST_ENGINE", "transformers")
#: What vLLM's attention on a CPU takes: heads, and pages of the cache.
FOR_VLLM = {"head_dim": 32}, {"page_size": 32, "max_model_len": 512}
#: green has tokens of its own.
EXPERTS = {"red": Kind(), "green": Kind(added_rows=3), "blue": Kind()}


def make_family(folder: Path) -> Family:
    """A tiny base in float32 and three compressed experts of it."""
    return engine.family.make_family(folder, experts=EXPERTS, **(FOR_VLLM[0] if ENGINE == "vllm" else {}))


@dataclass
class Running:
    """A server that listens on a loopback port."""

    url: str
    service: Service
    server: Server
    thread: threading.Thread
    headers: dict[str, str] = field(default_factory=dict)

    def request(self, method: str, path: str, **options: Any) -> httpx2.Response:
        return httpx2.request(method, self.url + path, timeout=PATIENCE, **({"headers": self.headers} | options))

    def get(self, path: str, **options: Any) -> httpx2.Response:
        return self.request("GET", path, **options)

    def post(self, path: str, json: Any, **options: Any) -> httpx2.Response:
        return self.request("POST", path, json=json, **options)

    def stop(self) -> None:
        self.server.begin_drain()
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()


def engine_class() -> type[SlottedEngine[Any]]:
    if ENGINE != "vllm":
        return TransformersEngine
    from engine.vllm.processes import fork_engines

    from meswitch_cli.engine.vllm.engine import VllmEngine

    fork_engines()
    return VllmEngine


#: A function that starts a server of a test's own.
Start = Callable[..., Running]


def start(family: Family, *, router: Any = None, settings: ServerSettings | None = None, **engine: Any) -> Running:
    """Serve the family over an engine; `engine` overrides its settings."""
    options = {"base": str(family.base), "experts": family.artifacts, "device": "cpu", "dtype": "float32"}
    if ENGINE == "vllm":
        options |= FOR_VLLM[1]
    made = engine_class()(EngineSettings(**{**options, "cache_tokens": 8192, **engine}))
    made._random = OneSeed()
    made.start()
    return serve_engine(made, settings, router)


def serve_engine(made: Engine, settings: ServerSettings | None = None, router: Any = None) -> Running:
    """Serve over an engine that has been started."""
    service = Service(made, settings or ServerSettings(), router)
    bound = listen("127.0.0.1", 0)
    started = threading.Event()
    server = Server(create_app(service), service, on_started=started.set)
    thread = threading.Thread(target=serve, args=(server, bound), daemon=True)
    thread.start()
    assert started.wait(PATIENCE)
    return Running(f"http://127.0.0.1:{bound.getsockname()[1]}", service, server, thread)
