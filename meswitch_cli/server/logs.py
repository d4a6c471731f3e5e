"""Logs on stderr: lines for people on a terminal, JSON elsewhere. Prompts and answers are in none unless asked for."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any, Literal, TextIO

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


class ConsoleFormatter(logging.Formatter):
    """A record as a line for people: time, level, message, and of a request who answered, how fast, or why not."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        fields: Mapping[str, Any] = getattr(record, "fields", {})
        parts = [time, f"{record.levelname.lower():<7}", _one_line(record.getMessage())]
        parts += _request(fields) if "status" in fields else [f"{key}={value}" for key, value in fields.items()]
        line = " ".join(_one_line(part) for part in parts)
        return line + (f"\n{self.formatException(record.exc_info)}" if record.exc_info else "")


def _one_line(text: str) -> str:
    """The text without control characters, with which a request could write lines of its own or move the cursor."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def _request(fields: Mapping[str, Any]) -> list[str]:
    """What a person wants to know of a request that has ended."""
    parts = [str(fields["status"]), f"{fields['milliseconds']:,.0f} ms"]
    if "expert" in fields:
        parts.append(f"{fields['expert']} ({fields['reason']})")
    if fields.get("completion_tokens"):
        parts.append(f"{fields['prompt_tokens']}+{fields['completion_tokens']} tokens")
    parts += [f"{name}: {fields[name]}" for name in ("error", "prompt") if name in fields]
    return parts


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to what stderr is at the moment: while something moves on the terminal, that makes room for the line."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def configure_logging(level: str, style: Literal["auto", "console", "json"] = "auto") -> None:
    """Send our logs and uvicorn's to stderr, from `level` (debug, info, warning, error) on.

    `style` auto writes lines for people where stderr is a terminal, JSON elsewhere.
    """
    handler = _StderrHandler()
    on_console = style == "console" or (style == "auto" and sys.stderr.isatty())
    handler.setFormatter(ConsoleFormatter() if on_console else JsonFormatter())
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
