"""A server in a thread of this process, on a loopback port that is free."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from meswitch_cli.errors import MeswitchError
from meswitch_cli.server.app import create_app
from meswitch_cli.server.lifecycle import Server, listen, serve
from meswitch_cli.server.service import Service

_START_SECONDS = 30.0


@contextmanager
def in_background(service: Service) -> Iterator[str]:
    """Serve while the block runs, and give it the address; the engine is stopped in the end.

    Raises:
        MeswitchError: the server does not come up.
    """
    bound = listen("127.0.0.1", 0)
    address = f"http://127.0.0.1:{bound.getsockname()[1]}"
    started = threading.Event()
    server = Server(create_app(service), service, on_started=started.set)
    thread = threading.Thread(target=serve, args=(server, bound), name="meswitch-server", daemon=True)
    thread.start()
    try:
        if not started.wait(_START_SECONDS):
            raise MeswitchError("the server in this process did not start")
        yield address
    finally:
        server.begin_drain()
        thread.join()
