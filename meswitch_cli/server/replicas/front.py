"""The address before the replicas: each request goes to one of them as it came, and its answer back as it comes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import httpx2
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from meswitch_cli.names import AUTO, BASE
from meswitch_cli.server.errors import ApiError, envelope, error_response
from meswitch_cli.server.limits import BodyLimit
from meswitch_cli.server.replicas.choice import choose
from meswitch_cli.server.replicas.metrics import joined_metrics
from meswitch_cli.server.replicas.process import Replica

logger = logging.getLogger(__name__)

#: Headers of one connection (RFC 9110, section 7.6.1), which are not the next one's; lengths are told anew.
_OWN_HEADERS = frozenset(
    (
        "connection", "content-length", "host", "keep-alive", "proxy-authenticate", "proxy-authorization", "te",
        "trailer", "transfer-encoding", "upgrade",
    )
)  # fmt: skip
SESSION_HEADER = "x-meswitch-session"
REPLICA_HEADER = "x-meswitch-replica"
#: What changes every replica.
_OF_ALL = ("/v1/experts/load", "/v1/experts/unload", "/v1/experts/pin")


class Front:
    """An ASGI application that hands requests on."""

    def __init__(self, replicas: Sequence[Replica], client: httpx2.AsyncClient) -> None:
        """`client` must wait for answers without end: how long one may take is the replicas' concern."""
        self.replicas, self._client = tuple(replicas), client

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        path = scope["path"]
        try:
            if path == "/health":
                response: Response = JSONResponse({"status": "ok"})
            elif path == "/ready":
                response = self._ready()
            elif path == "/metrics":
                response = await self._metrics()
            elif path in _OF_ALL:
                response = await self._all(scope, await _body(receive))
            else:
                await self._one(scope, await _body(receive), receive, send)
                return
        except ApiError as error:
            response = error_response(error, path)
        await response(scope, receive, send)

    def _ready(self) -> Response:
        states = {str(replica.load.number): replica.load.ready for replica in self.replicas}
        if not any(states.values()):
            raise _no_replica()
        return JSONResponse({"status": "ready", "replicas": states})

    async def _metrics(self) -> Response:
        texts = {}
        for replica in self.replicas:
            with contextlib.suppress(httpx2.HTTPError):
                if replica.load.ready:
                    texts[replica.load.number] = (await self._client.get(f"{replica.url}/metrics")).text
        return Response(joined_metrics(texts), media_type=CONTENT_TYPE_LATEST)

    async def _all(self, scope: Scope, body: bytes) -> Response:
        """Have every replica do it, one after the other; the first that refuses ends it, with its own answer."""
        response: Response | None = None
        for replica in self.replicas:
            if not replica.load.ready:
                raise ApiError(503, f"replica {replica.load.number} is not ready; nothing more was changed")
            try:
                answer = await self._client.send(self._request(replica, scope, body))
            except httpx2.HTTPError as error:
                raise _failed(replica, error) from error
            response = Response(answer.content, answer.status_code, _handed_on(answer.headers))
            if answer.status_code != 200:
                return response
        assert response is not None
        return response

    async def _one(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Have one replica answer. The client's leaving ends the request there too."""
        expert, session = _expert(body), Headers(scope=scope).get(SESSION_HEADER)
        left = asyncio.ensure_future(_disconnected(receive))
        answering = asyncio.ensure_future(self._answer(scope, body, expert, session, send))
        try:
            await asyncio.wait([left, answering], return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                answering.result()
        finally:
            for task in (left, answering):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, ApiError):
                    await task

    async def _answer(self, scope: Scope, body: bytes, expert: str | None, session: str | None, send: Send) -> None:
        while True:
            load = choose((replica.load for replica in self.replicas), expert, session)
            if load is None:
                raise _no_replica()
            replica = self.replicas[load.number]
            load.requests += 1
            try:
                answer = await self._client.send(self._request(replica, scope, body), stream=True)
            except httpx2.ConnectError:
                load.ready = False  # it has not seen the request, so another may answer
                load.requests -= 1
                continue
            except httpx2.HTTPError as error:
                load.requests -= 1
                raise _failed(replica, error) from error
            except BaseException:
                load.requests -= 1
                raise
            try:
                await _pass_on(replica, answer, send)
            finally:
                load.requests -= 1
                await answer.aclose()
            return

    def _request(self, replica: Replica, scope: Scope, body: bytes) -> httpx2.Request:
        query = scope["query_string"].decode("latin-1")
        url = f"{replica.url}{scope['raw_path'].decode('latin-1').partition('?')[0]}" + (f"?{query}" if query else "")
        return self._client.build_request(scope["method"], url, headers=_handed_on(Headers(scope=scope)), content=body)


def front_app(replicas: Sequence[Replica], client: httpx2.AsyncClient, max_body_bytes: int) -> ASGIApp:
    """The whole application: bodies are read up to their limit before one is looked at."""
    return BodyLimit(Front(replicas, client), max_body_bytes)


async def _pass_on(replica: Replica, answer: httpx2.Response, send: Send) -> None:
    """Send an answer on, part by part. Where the replica ends before it, a stream of events says so."""
    headers = {**_handed_on(answer.headers), REPLICA_HEADER: str(replica.load.number)}
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    events = answer.headers.get("content-type", "").startswith("text/event-stream")
    if not events:  # whole, so that one that breaks off is an error and not half an answer
        try:
            content = await answer.aread()
        except httpx2.HTTPError as error:
            raise _failed(replica, error) from error
        raw.append((b"content-length", str(len(content)).encode()))
        await send({"type": "http.response.start", "status": answer.status_code, "headers": raw})
        await send({"type": "http.response.body", "body": content})
        return
    await send({"type": "http.response.start", "status": answer.status_code, "headers": raw})
    try:
        async for part in answer.aiter_raw():
            await send({"type": "http.response.body", "body": part, "more_body": True})
        last = b""
    except httpx2.HTTPError as error:
        failed = _failed(replica, error)
        last = f"data: {json.dumps(envelope(failed.status, str(failed), failed.code))}\n\n".encode()
    await send({"type": "http.response.body", "body": last})


def _handed_on(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower() not in _OWN_HEADERS}


def _expert(body: bytes) -> str | None:
    """The expert that a request names; None where it names none, or what it says is for a replica to refuse."""
    try:
        said: Any = json.loads(body) if body else None
    except ValueError:
        return None
    model = said.get("model") if isinstance(said, dict) else None
    return model if isinstance(model, str) and model not in (AUTO, BASE) else None


async def _body(receive: Receive) -> bytes:
    """All of a body, which `BodyLimit` has read already."""
    parts = bytearray()
    while True:
        message = await receive()
        parts += message.get("body", b"")
        if not message.get("more_body"):
            return bytes(parts)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _no_replica() -> ApiError:
    return ApiError(503, "no replica takes requests; they are starting, or all of them have ended", code="no_replica")


def _failed(replica: Replica, error: Exception) -> ApiError:
    logger.error("replica %d broke off an answer: %s", replica.load.number, str(error) or type(error).__name__)
    message = f"replica {replica.load.number} ended before it had answered; try again"
    return ApiError(502, message, code="replica_failed")
