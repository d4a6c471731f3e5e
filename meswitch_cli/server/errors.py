"""Every error of the server in the envelope that OpenAI's clients expect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from meswitch_cli.engine.contract import (
    InvalidRequestError,
    QueueFullError,
    ShuttingDownError,
    UnknownExpertError,
)
from meswitch_cli.errors import MeswitchError, plain_reason
from meswitch_cli.server.record import RequestRecord

#: Seconds after which a client that was turned away may try again.
RETRY_AFTER = 1

#: Members of OpenAI's API, and of libraries for it, that this server has no use for, with the values that ask for
#: nothing beside null and the empty ones, which never do.
NOT_SUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "annotations": (),
    "audio": (),
    "cache_control": (),
    "conversation": (),
    "function_call": ("none", "auto"),
    "functions": (),
    "images": (),
    "modalities": (["text"],),
    "prediction": (),
    "previous_response_id": (),
    "provider_specific_fields": (),
    "reasoning": ("",),
    "reasoning_content": ("",),
    "reasoning_effort": (),
    "refusal": ("",),
    "store": (False,),
    "suffix": ("",),
    "thinking": ({"type": "disabled"},),
    "thinking_blocks": (),
    "tool_calls": (),
    "tool_choice": ("none",),
    "tools": (),
    "web_search_options": (),
}

#: What kind of error a status is, where it is not the request's or the server's fault at large.
_TYPES = {401: "authentication_error", 403: "permission_error", 503: "service_unavailable"}


class ApiError(Exception):
    """An answer that is an error: status, message for people, code for programs, the parameter at fault.

    `logged` stands in the log in the message's place, where that may quote what was asked.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        parameter: str | None = None,
        headers: Mapping[str, str] | None = None,
        logged: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.logged = logged or message
        self.code = code
        self.parameter = parameter
        self.headers = dict(headers or {})
        if status == 503:
            self.headers.setdefault("retry-after", str(RETRY_AFTER))


class InvalidValueError(ApiError):
    """400 for a parameter that cannot have this value, or not beside the others."""

    def __init__(self, parameter: str | None, message: str) -> None:
        super().__init__(400, message, code="invalid_value", parameter=parameter)


def envelope(status: int, message: str, code: str | None = None, parameter: str | None = None) -> dict[str, Any]:
    """The body of an error."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": parameter, "code": code}}


#: What Anthropic's API calls errors, by status.
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    503: "overloaded_error",
}
_ANTHROPIC_PATH = "/v1/messages"


def is_anthropic(path: str) -> bool:
    """Whether Anthropic's API is spoken there."""
    return path == _ANTHROPIC_PATH or path.startswith(f"{_ANTHROPIC_PATH}/")


def anthropic_envelope(error: ApiError) -> dict[str, Any]:
    """The body of an error in Anthropic's API."""
    kind = _ANTHROPIC_TYPES.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": str(error)}}


class ErrorResponse(JSONResponse):
    """The envelope of an error, whose reason goes into the request's record when it is sent."""

    def __init__(self, error: ApiError, path: str) -> None:
        body = envelope(error.status, str(error), error.code, error.parameter)
        if is_anthropic(path):
            body = anthropic_envelope(error)
        super().__init__(body, error.status, error.headers)
        self._reason = error.logged

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record = RequestRecord.at(scope)
        if record is not None and record.error is None:  # an exception has said more of itself
            record.error = self._reason
        await super().__call__(scope, receive, send)


def error_response(error: ApiError, path: str = "") -> JSONResponse:
    """An error as the API at that path has it."""
    return ErrorResponse(error, path)


def from_engine(error: Exception) -> ApiError:
    """What an engine refused, as an answer; an error that is not the client's is 500 without its details."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InvalidRequestError):
        return InvalidValueError(error.parameter, str(error))
    if isinstance(error, UnknownExpertError):
        return ApiError(404, str(error), code="model_not_found", parameter="model")
    if isinstance(error, QueueFullError):
        return ApiError(503, str(error), code="queue_full")
    if isinstance(error, ShuttingDownError):
        return ApiError(503, str(error), code="shutting_down")
    if isinstance(error, MeswitchError):
        return ApiError(500, str(error), code="internal_error")
    return ApiError(500, "the server failed; its log says why, under this request's id", code="internal_error")


def install_error_handlers(app: FastAPI) -> None:
    """Answer every error of the application in the envelope, 422 as 400 and with the parameter's name."""

    async def on_api_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return error_response(error, request.url.path)

    async def on_engine_error(request: Request, error: Exception) -> JSONResponse:
        return error_response(from_engine(error), request.url.path)

    async def on_invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return error_response(_from_validation(error), request.url.path)

    async def on_http_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        message = str(error.detail)
        if error.status_code == 404:
            message = f"there is nothing at {request.method} {request.url.path}"
        elif error.status_code == 405:
            message = f"{request.method} is not allowed on {request.url.path}"
        code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
        refusal = ApiError(error.status_code, message, code=code, headers=error.headers)
        return error_response(refusal, request.url.path)

    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(MeswitchError, on_engine_error)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http_error)


def _from_validation(error: RequestValidationError) -> ApiError:
    found = [(_parameter(one["loc"][1:], error.body, missing=one["type"] == "missing"), one) for one in error.errors()]
    # Every branch of a union complains; the one that got farthest is the one that was meant.
    parameter, first = max(found, key=lambda item: (item[0] or "").count("."))
    kind = first["type"]
    if kind == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['ctx']['error']}", code="invalid_json")
    if kind == "not_text":
        return ApiError(400, f"the body holds what is no text: {first['msg']}", code="invalid_json")
    if parameter is None:
        message = "the body must be a JSON object, sent with content-type: application/json"
        return ApiError(400, message, code="invalid_body")
    if kind == "extra_forbidden" and parameter.rpartition(".")[2] in NOT_SUPPORTED:
        message = f"{parameter}: not supported by this server"
        return ApiError(400, message, code="unsupported_parameter", parameter=parameter)
    if kind == "extra_forbidden":
        return ApiError(400, f"unknown parameter: {parameter}", code="unknown_parameter", parameter=parameter)
    if kind in ("missing_member", "union_tag_invalid", "union_tag_not_found"):
        member = str(first["ctx"].get("member") or first["ctx"]["discriminator"]).strip("'")
        parameter = f"{parameter}.{member}"
        kind = "invalid" if kind == "union_tag_invalid" else "missing"
    if kind == "missing":
        return ApiError(400, f"missing parameter: {parameter}", code="missing_parameter", parameter=parameter)
    reason = plain_reason(str(first["msg"]))
    return InvalidValueError(parameter, f"{parameter}: {reason}")


def _parameter(location: Sequence[str | int], body: Any, *, missing: bool) -> str | None:
    """The path of a member, as people write it: pydantic's own location also names the branches of unions."""
    parts: list[str] = []
    for index, part in enumerate(location):
        is_member = isinstance(body, Mapping) and part in body
        is_element = isinstance(body, list) and isinstance(part, int) and part < len(body)
        if is_member or is_element:
            body = body[part]
        elif not (missing and index == len(location) - 1):
            continue
        parts.append(str(part))
    return ".".join(parts) or None
