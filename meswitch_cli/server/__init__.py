"""The OpenAI-compatible HTTP server over an engine: `create_app` of a `Service`, with `ServerSettings`."""

from typing import TYPE_CHECKING

from meswitch_cli.lazy import exporter

if TYPE_CHECKING:
    from meswitch_cli.server.app import create_app
    from meswitch_cli.server.service import Service
    from meswitch_cli.server.settings import ServerSettings

__all__ = ["ServerSettings", "Service", "create_app"]

__getattr__ = exporter(__name__, {"ServerSettings": "settings", "Service": "service", "create_app": "app"})
