"""The limit on a request's body, whether its length is announced or not."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from meswitch_cli.server.errors import ApiError, error_response


class BodyTooLarge(ApiError):
    """More bytes came than a body may have."""

    def __init__(self, limit: int) -> None:
        super().__init__(413, f"the body is larger than {limit:,} bytes", code="body_too_large")


class BodyLimit:
    """Middleware: reads a body up to its limit before anything looks at it, and answers 413 beyond."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH", "DELETE"):
            return await self.app(scope, receive, send)
        try:
            body = await self._read(Headers(scope=scope), receive)
        except BodyTooLarge as error:
            return await error_response(error, scope["path"])(scope, receive, send)
        if body is None:  # the client left before it had said what it wants
            return None
        unread = True

        async def replay() -> Message:
            nonlocal unread
            if unread:
                unread = False
                return {"type": "http.request", "body": body, "more_body": False}
            return await receive()

        await self.app(scope, replay, send)

    async def _read(self, headers: Headers, receive: Receive) -> bytes | None:
        announced = headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > self.limit:
            raise BodyTooLarge(self.limit)
        parts = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts += message.get("body", b"")
            if len(parts) > self.limit:
                raise BodyTooLarge(self.limit)
            if not message.get("more_body"):
                return bytes(parts)
