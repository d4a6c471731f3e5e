"""The page at `/`: a few files of this package, and a policy that lets nothing else in."""

from __future__ import annotations

from functools import partial
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

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
}

#: What lies where, and what kind of file it is.
FILES = {
    "/": ("index.html", _TYPES[".html"]),
    "/favicon.ico": ("icon.svg", "image/svg+xml"),
} | {
    f"/page/{file.name}": (file.name, _TYPES[file.suffix])
    for file in sorted(FOLDER.iterdir())
    if file.suffix in (".css", ".js")
}

endpoints = APIRouter(include_in_schema=False)


def _file(name: str, media_type: str) -> Response:
    return Response((FOLDER / name).read_bytes(), media_type=media_type, headers=_HEADERS)


for _path, _of in FILES.items():
    endpoints.add_api_route(_path, partial(_file, *_of), methods=["GET"])
