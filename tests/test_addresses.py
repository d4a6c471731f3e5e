"""Which addresses are of this machine, for servers that warn and clients that choose a way."""

from __future__ import annotations

import pytest
import requests

from meswitch_cli.addresses import is_loopback, is_this_machine, without_proxy


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.3.2.1", "::1", "[::1]", "localhost", "LocalHost", "api.localhost", "127.1", "::ffff:127.0.0.1"],
)
def test_loopback(host: str) -> None:
    assert is_loopback(host) and is_this_machine(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "[::]", "0"])
def test_every_address_is_this_machine_to_a_client_alone(host: str) -> None:
    assert is_this_machine(host) and not is_loopback(host)


@pytest.mark.parametrize("host", ["192.168.0.1", "example.org", "localhost.example.org", "128.0.0.1", "::2", "", "x"])
def test_other_machines(host: str) -> None:
    assert not is_loopback(host) and not is_this_machine(host)


@pytest.mark.parametrize("before", [None, "intranet.example"])
def test_clients_that_heed_the_environment(monkeypatch: pytest.MonkeyPatch, before: str | None) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, before) if before else monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://proxy.example:3128")
    assert requests.utils.get_environ_proxies("http://127.0.0.1:8000/v1")["http"] == "http://proxy.example:3128"
    without_proxy("127.0.0.1")
    assert requests.utils.get_environ_proxies("http://127.0.0.1:8000/v1") == {}
    assert "http" in requests.utils.get_environ_proxies("http://models.example/v1")
    assert bool(before) == (requests.utils.get_environ_proxies("http://intranet.example/v1") == {})
