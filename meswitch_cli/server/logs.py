"""Logs as JSON, one object a line, on stderr. Prompts and answers are in none unless that was asked for."""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime, timezone
from typing import Any

from meswitch_cli.server.record import RequestRecord

_access = logging.getLogger("meswitch_cli.server.access")

#: Requests that machines make all the time; logged at debug level.
_QUIET = ("/health", "/ready", "/metrics", "/v1/status")


class JsonFormatter(logging.Formatter):
    """A record's message and its `fields` as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {"time": time, "level": record.levelname.lower(), "logger": record.name}
        line["message"] = record.getMessage()
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def configure_logging(level: str) -> None:
    """Send our logs and uvicorn's to stderr as JSON, from `level` (debug, info, warning, error) on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name in ("meswitch_cli", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
        logger.setLevel(level.upper())
    logging.getLogger("uvicorn").setLevel(max(logging.WARNING, logging.getLogger("uvicorn").level))


def log_request(record: RequestRecord) -> None:
    """The one line of a request that has ended."""
    fields: dict[str, Any] = {
        "request_id": record.id,
        "method": record.method,
        "path": record.path,
        "status": record.status,
        "milliseconds": round(1000 * record.seconds, 1),
    }
    if choice := record.choice:
        fields |= {"expert": choice.expert, "reason": choice.reason, "confidence": round(choice.confidence, 4)}
        fields["router_milliseconds"] = round(choice.router_ms, 1)
    if record.generates:
        fields |= {"prompt_tokens": record.prompt_tokens, "completion_tokens": record.completion_tokens}
        fields |= {"cached_tokens": record.cached_tokens, "finish_reasons": record.finish_reasons}
        if record.first_token is not None:
            fields["first_token_milliseconds"] = round(1000 * record.first_token, 1)
    for name in ("user", "hints", "error", "prompt"):
        if (value := getattr(record, name)) is not None:
            fields[name] = value
    level = logging.DEBUG if record.path in _QUIET and record.status < 400 else logging.INFO
    _access.log(level, "%s %s", record.method, record.path, extra={"fields": fields})
