"""The application: endpoints, middleware, error handlers, and its OpenAPI description."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.middleware.cors import CORSMiddleware

from meswitch_cli import __version__
from meswitch_cli.server import (
    admin,
    anthropic,
    chat,
    completions,
    embeddings,
    feedback,
    health,
    models,
    responses,
    routing,
    tokenize,
    webpage,
)
from meswitch_cli.server.auth import Authentication
from meswitch_cli.server.context import EXPOSED_HEADERS, RequestContext
from meswitch_cli.server.errors import install_error_handlers, is_anthropic
from meswitch_cli.server.head import HeadAsGet
from meswitch_cli.server.limits import BodyLimit
from meswitch_cli.server.service import Service

_MODULES = (
    chat,
    completions,
    responses,
    anthropic,
    embeddings,
    models,
    routing,
    feedback,
    tokenize,
    admin,
    health,
    webpage,
)

_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


_ANTHROPIC_ERROR_SCHEMA = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
    },
}


def create_app(service: Service) -> FastAPI:
    """The ASGI application of a service whose engine has started."""
    app = FastAPI(title="meswitch", version=__version__, docs_url=None, redoc_url=None)
    app.state.service = service
    for module in _MODULES:
        app.include_router(module.endpoints)
    install_error_handlers(app)
    # The last one added is the outermost.
    app.add_middleware(BodyLimit, limit=service.settings.max_body_bytes)
    app.add_middleware(Authentication, settings=service.settings)
    if service.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.settings.cors_origins,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],  # clients' libraries send headers of their own; one that nobody reads does no harm
            allow_private_network=True,  # a page of an allowed origin may call a server on its reader's machine
            expose_headers=EXPOSED_HEADERS,
        )
    app.add_middleware(HeadAsGet)
    app.add_middleware(RequestContext, metrics=service.metrics)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _openapi(app: FastAPI) -> dict[str, Any]:
    """As FastAPI describes it, with our errors in place of its own."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        schemas = schema.setdefault("components", {}).setdefault("schemas", {})
        schemas["Error"] = _ERROR_SCHEMA
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
        schemas["AnthropicError"] = _ANTHROPIC_ERROR_SCHEMA
        for path, operations in schema["paths"].items():
            error = _error("Anthropic", "AnthropicError") if is_anthropic(path) else _error("OpenAI", "Error")
            for operation in operations.values():
                operation["responses"].pop("422", None)
                operation["responses"]["default"] = error
        app.openapi_schema = schema
    return app.openapi_schema


def _error(whose: str, schema: str) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    return {"description": f"An error, in {whose}'s envelope.", "content": content}
