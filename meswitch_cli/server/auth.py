"""Who may ask: keys in the header Authorization or x-api-key, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from meswitch_cli.server.errors import ApiError, error_response
from meswitch_cli.server.settings import ServerSettings

PROTECTED = ("/v1/", "/tokenize", "/detokenize")
ADMIN = ("/v1/experts/", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")


class KeyRing:
    """A set of keys, kept as hashes."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._hashes = tuple(_digest(key) for key in keys)

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def holds(self, key: str) -> bool:
        """Whether the key is one of these; takes as long for a near miss as for a far one."""
        digest = _digest(key)
        found = False
        for known in self._hashes:
            found |= hmac.compare_digest(digest, known)
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def identity(headers: Headers) -> str:
    """A short name for the key that a request came with, for logs and sessions; "" without one."""
    key = bearer(headers)
    return _digest(key).hex()[:12] if key else ""


def bearer(headers: Headers) -> str:
    """The key of a request, "" without one; Anthropic's clients send it in a header of their own."""
    if "authorization" not in headers:
        return headers.get("x-api-key", "").strip()
    scheme, _, key = headers["authorization"].partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


class Authentication:
    """Middleware: 401 without a good key, 403 for the admin paths where no admin key exists."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self.app = app
        self._admins = KeyRing(settings.admin_keys)
        # An admin may do what every user may. Without user keys, the API is open, and the admin paths are not.
        self._users = KeyRing((*settings.api_keys, *settings.admin_keys) if settings.api_keys else ())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._refusal(scope) if scope["type"] == "http" else None
        if error is None:
            await self.app(scope, receive, send)
        else:
            await error_response(error, scope["path"])(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        path = scope["path"]
        if not path.startswith(PROTECTED):
            return None
        key = bearer(Headers(scope=scope))
        if path.startswith(ADMIN):
            if not self._admins:
                message = "this server has no admin key: start it with --admin-key-file to change experts over HTTP"
                return ApiError(403, message, code="admin_disabled")
            return None if self._admins.holds(key) else _unauthorised("an admin key")
        if not self._users or self._users.holds(key):
            return None
        return _unauthorised("an API key")


def _unauthorised(what: str) -> ApiError:
    message = f"{what} is needed, in the header: Authorization: Bearer KEY"
    return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
