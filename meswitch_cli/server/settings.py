"""What a server is told once, at its start."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from meswitch_cli.addresses import is_loopback
from meswitch_cli.errors import MeswitchError, UsageError
from meswitch_cli.textfile import read_text

_MAX_KEY_FILE_BYTES = 1 << 20
_USUAL_PORTS = {"http": 80, "https": 443}


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
        keep_alive_seconds: after so many without an event, a stream gets a comment.
        feedback: the file to which users' corrections of the router are appended.
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
    keep_alive_seconds: float = 10.0
    router_strict: bool = False
    feedback: Path | None = None
    log_prompts: bool = False

    def is_open(self, host: str) -> bool:
        """Whether everybody who reaches a server that listens there may use it, from other machines too."""
        return not self.api_keys and not is_loopback(host)


def read_origin(text: str) -> str:
    """An origin as browsers write it: `*`, `null`, or scheme, host and port in lower case, a usual port left out.

    Raises:
        UsageError: it is none.
    """
    if text in ("*", "null"):
        return text
    problem = UsageError(f"--cors-origin {text!r}: write a page's scheme, host and port, as https://example.org")
    try:
        parts = urlsplit(text.strip().lower())
        _ = parts.port
    except ValueError as error:
        raise problem from error
    beyond = (parts.path.strip("/"), parts.query, parts.fragment, parts.username)
    if not parts.scheme or not parts.hostname or any(beyond):
        raise problem
    return f"{parts.scheme}://{parts.netloc.removesuffix(f':{_USUAL_PORTS.get(parts.scheme)}')}"


def read_keys(path: Path) -> tuple[str, ...]:
    """The keys of a file, one a line; blank lines and lines that start with # do not count.

    Raises:
        MeswitchError: it cannot be read, holds no key, or a key could not stand in a header.
    """
    try:
        if path.stat().st_size > _MAX_KEY_FILE_BYTES:
            raise MeswitchError(f"{path}: larger than a file of keys can be")
    except OSError as error:
        raise MeswitchError(f"{path}: cannot be read: {error.strerror}") from error
    lines = [line.strip() for line in read_text(path, MeswitchError, "a file of keys").lines]
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise MeswitchError(f"{path}: holds no key; write one a line")
    for number, key in enumerate(keys, 1):
        if not key.isascii() or any(character.isspace() or not character.isprintable() for character in key):
            raise MeswitchError(f"{path}: key {number} has characters that a header cannot carry")
    return keys
