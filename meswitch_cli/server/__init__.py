"""The OpenAI-compatible HTTP server over an engine."""

from meswitch_cli.server.app import create_app
from meswitch_cli.server.service import Service
from meswitch_cli.server.settings import ServerSettings

__all__ = ["ServerSettings", "Service", "create_app"]
