"""The page at `/`: three files of this package, and a policy that lets nothing else in."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Response

FOLDER = Path(__file__).parent / "page"

_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}

endpoints = APIRouter(include_in_schema=False)


def _file(name: str, media_type: str) -> Response:
    return Response((FOLDER / name).read_bytes(), media_type=media_type, headers=_HEADERS)


@endpoints.get("/")
def index() -> Response:
    return _file("index.html", "text/html; charset=utf-8")


@endpoints.get("/page/style.css")
def style() -> Response:
    return _file("style.css", "text/css; charset=utf-8")


@endpoints.get("/page/chat.js")
def script() -> Response:
    return _file("chat.js", "text/javascript; charset=utf-8")


@endpoints.get("/favicon.ico")
def icon() -> Response:
    return _file("icon.svg", "image/svg+xml")
