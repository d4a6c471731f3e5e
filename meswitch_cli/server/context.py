"""Around every request: an id, the headers that name the expert, a log line, metrics, and no escaping error."""

from __future__ import annotations

import json
import logging
import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from meswitch_cli.server.errors import error_response, from_engine
from meswitch_cli.server.logs import log_request
from meswitch_cli.server.metrics import Metrics
from meswitch_cli.server.record import RequestRecord

_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

#: Most experts whose probabilities a header carries.
MAX_PROBABILITIES = 32

#: What a browser's script from another origin may read.
EXPOSED_HEADERS = (
    "x-request-id",
    "retry-after",
    "x-meswitch-expert",
    "x-meswitch-confidence",
    "x-meswitch-reason",
    "x-meswitch-router-ms",
    "x-meswitch-probabilities",
)

#: The status in the log of a request whose client left; nobody reads it as an answer.
CLIENT_GONE = 499

logger = logging.getLogger(__name__)


class RequestContext:
    """The outermost middleware of the application."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        record = RequestRecord(given if _ID.fullmatch(given) else uuid.uuid4().hex, scope["method"], scope["path"])
        record.attach(scope)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                add_headers(MutableHeaders(scope=message), record)
            await send(message)

        try:
            await self.app(scope, receive, send_with_headers)
        except Exception as error:
            record.error = f"{type(error).__name__}: {error}"
            logger.exception("request %s failed", record.id)
            if not record.status:
                await error_response(from_engine(error), scope["path"])(scope, receive, send_with_headers)
        finally:
            if not record.status:
                record.status, record.error = CLIENT_GONE, "the client left before the answer"
            self.metrics.observe_request(record)
            log_request(record)


def add_headers(headers: MutableHeaders, record: RequestRecord) -> None:
    """Say which request this was and, once that is decided, which expert answers it and why."""
    headers["x-request-id"] = record.id
    choice = record.choice
    if choice is None:
        return
    headers["x-meswitch-expert"] = choice.expert
    headers["x-meswitch-confidence"] = f"{choice.confidence:.4f}"
    headers["x-meswitch-reason"] = choice.reason
    headers["x-meswitch-router-ms"] = f"{choice.router_ms:.1f}"
    if choice.probabilities:
        likeliest = sorted(choice.probabilities.items(), key=lambda item: -item[1])[:MAX_PROBABILITIES]
        headers["x-meswitch-probabilities"] = json.dumps({name: round(value, 4) for name, value in likeliest})
