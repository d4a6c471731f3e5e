"""What a server is told once, at its start."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from meswitch_cli.errors import MeswitchError

_MAX_KEY_FILE_BYTES = 1 << 20


@dataclass(frozen=True)
class ServerSettings:
    """Limits, keys and habits of a server.

    Attributes:
        api_keys: with any, every request under /v1, /tokenize and /detokenize needs one of these or an admin key.
        admin_keys: without any, experts cannot be loaded, unloaded or pinned over HTTP.
        experts_dir: the only folder that experts may be loaded from over HTTP.
        max_choices: largest `n`.
        max_prompts: most prompts of one completion request.
        drain_seconds: how long running requests may take after a SIGTERM.
        router_strict: a router that fails is an error to the client, not an answer of the base.
    """

    api_keys: tuple[str, ...] = ()
    admin_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    experts_dir: Path | None = None
    max_body_bytes: int = 4 << 20
    max_choices: int = 16
    max_prompts: int = 32
    drain_seconds: float = 60.0
    router_strict: bool = False
    log_prompts: bool = False


def read_keys(path: Path) -> tuple[str, ...]:
    """The keys of a file, one a line; blank lines and lines that start with # do not count.

    Raises:
        MeswitchError: it cannot be read, holds no key, or a key could not stand in a header.
    """
    try:
        if path.stat().st_size > _MAX_KEY_FILE_BYTES:
            raise MeswitchError(f"{path}: larger than a file of keys can be")
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    except OSError as error:
        raise MeswitchError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise MeswitchError(f"{path}: not UTF-8 text") from error
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise MeswitchError(f"{path}: holds no key; write one a line")
    for number, key in enumerate(keys, 1):
        if not key.isascii() or any(character.isspace() or not character.isprintable() for character in key):
            raise MeswitchError(f"{path}: key {number} has characters that a header cannot carry")
    return keys


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
