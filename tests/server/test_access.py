"""Who may ask: keys, and the pages of other origins."""

from __future__ import annotations

import pytest
from server.family import Running, Start
from server.refusals import refused

from meswitch_cli.errors import UsageError
from meswitch_cli.server.settings import ServerSettings, read_origin


def test_keys(start_server: Start) -> None:
    server = start_server(settings=ServerSettings(api_keys=("one", "two"), admin_keys=("root",)))
    for headers in ({}, {"authorization": "Bearer three"}, {"authorization": "Basic one"}, {"authorization": "one"}):
        for path in ("/v1/models", "/v1/status", "/v1/nothing"):
            response = server.get(path, headers=headers)
            assert "API key" in refused(response, 401, None, "invalid_api_key")
            assert response.headers["www-authenticate"] == "Bearer"
        assert server.post("/tokenize", {"model": "red", "prompt": "x"}, headers=headers).status_code == 401
    for key in ("one", "two", "root"):
        assert server.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
    for path in ("/", "/health", "/ready", "/version", "/metrics"):
        assert server.get(path).status_code == 200
    pin = {"name": "red"}
    refused(server.post("/v1/experts/pin", pin, headers={"authorization": "Bearer one"}), 401, None, "invalid_api_key")
    pinned = server.post("/v1/experts/pin", pin, headers={"authorization": "Bearer root"})
    assert pinned.json()["pinned"] is True


def test_without_an_admin_key_nobody_is_an_admin(running: Running) -> None:
    refused(running.post("/v1/experts/unload", {"name": "red"}), 403, None, "admin_disabled")


def test_cors_is_closed_until_it_is_opened(running: Running, start_server: Start) -> None:
    asks = {"origin": "https://page.example", "access-control-request-method": "POST"}
    closed = running.request("OPTIONS", "/v1/chat/completions", headers=asks)
    assert closed.status_code == 405 and "access-control-allow-origin" not in closed.headers
    settings = ServerSettings(cors_origins=("https://page.example",), api_keys=("one",))
    server = start_server(settings=settings)
    assert server.request("OPTIONS", "/v1/chat/completions", headers=asks).status_code == 200
    answer = server.get("/v1/models", headers=asks | {"authorization": "Bearer one"})
    assert answer.headers["access-control-allow-origin"] == "https://page.example"
    assert "x-meswitch-expert" in answer.headers["access-control-expose-headers"]
    other = server.get("/v1/models", headers={"origin": "https://evil.example", "authorization": "Bearer one"})
    assert "access-control-allow-origin" not in other.headers


STAINLESS = (
    "authorization,content-type,x-stainless-arch,x-stainless-lang,x-stainless-os,x-stainless-package-version,"
    "x-stainless-retry-count,x-stainless-runtime,x-stainless-runtime-version,x-stainless-timeout"
)


def test_a_page_may_send_what_its_library_sends(start_server: Start) -> None:
    server = start_server(settings=ServerSettings(cors_origins=("https://page.example",), api_keys=("one",)))
    asks = {"origin": "https://page.example", "access-control-request-method": "POST"}
    for headers in (
        STAINLESS,
        "authorization,content-type,openai-organization,openai-project",
        "authorization,content-type,user-agent",
        "api-key,http-referer,x-title,x-meswitch-session,traceparent",
    ):
        wanted = asks | {"access-control-request-headers": headers}
        allowed = server.request("OPTIONS", "/v1/chat/completions", headers=wanted)
        assert allowed.status_code == 200, allowed.text
        assert set(headers.split(",")) <= set(allowed.headers["access-control-allow-headers"].lower().split(","))
    near = asks | {"access-control-request-private-network": "true"}
    allowed = server.request("OPTIONS", "/v1/models", headers=near)
    assert (allowed.status_code, allowed.headers["access-control-allow-private-network"]) == (200, "true")
    other = asks | {"origin": "https://evil.example", "access-control-request-headers": STAINLESS}
    denied = server.request("OPTIONS", "/v1/chat/completions", headers=other)
    assert denied.status_code == 400 and "access-control-allow-origin" not in denied.headers
    turned_away = server.get("/v1/models", headers={"origin": "https://page.example"})
    assert turned_away.status_code == 401  # which the page may read, as any other answer
    assert turned_away.headers["access-control-allow-origin"] == "https://page.example"
    assert "retry-after" in turned_away.headers["access-control-expose-headers"]


@pytest.mark.parametrize(
    ("given", "origin"),
    [
        ("http://localhost:3000", "http://localhost:3000"),
        ("http://localhost:3000/", "http://localhost:3000"),
        ("HTTPS://Page.Example", "https://page.example"),
        ("https://page.example:443", "https://page.example"),
        ("http://page.example:80/", "http://page.example"),
        ("http://page.example:443", "http://page.example:443"),
        ("chrome-extension://abc", "chrome-extension://abc"),
        ("*", "*"),
        ("null", "null"),
    ],
)
def test_origins_as_people_write_them(given: str, origin: str) -> None:
    assert read_origin(given) == origin


@pytest.mark.parametrize(
    "odd", ["localhost:3000", "page.example", "https://page.example/app", "", "http://[", "http://a:x"]
)
def test_origins_that_are_none(odd: str) -> None:
    with pytest.raises(UsageError, match="--cors-origin"):
        read_origin(odd)
