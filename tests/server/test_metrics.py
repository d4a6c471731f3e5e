"""The figures at /metrics are those of the requests that were made, under one set of labels."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from server.family import Running, Start
from server.fields import prompts

HISTOGRAMS = {f"{name}_seconds" for name in ("time_to_first_token", "inter_token", "request", "queue", "router")}
LABELS = {"expert", "reason"}
OF_ENGINE = ("slot_hits", "slot_loads", "slot_evictions", "slot_load_seconds", "slot_load_bytes")

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples(server: Running) -> Samples:
    families = text_string_to_metric_families(server.get("/metrics").text)
    return {
        (sample.name.removeprefix("meswitch_"), frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def counted(server: Running, requests: int) -> Samples:
    """The figures once so many requests of known paths are in them: each is counted just after its answer."""
    deadline = time.monotonic() + 60
    while True:
        found = samples(server)
        told = [(dict(labels), number) for (name, labels), number in found.items() if name == "requests_total"]
        if sum(number for labels, number in told if labels["path"] != "other") >= requests:
            return found
        assert time.monotonic() < deadline, told


def value(found: Samples, name: str, **labels: str) -> float:
    return found.get((name, frozenset(labels.items())), 0.0)


def ask(server: Running, model: str, text: str, **more: Any) -> Mapping[str, Any]:
    body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 5, "ignore_eos": True}
    response = server.post("/v1/chat/completions", body | more)
    assert response.status_code == 200, response.text
    return dict(response.json()) if not more.get("stream") else {}


def test_histograms_and_counters_are_of_what_was_asked(start_server: Start, router: Any) -> None:
    server = start_server(router=router)
    usages = [ask(server, "red", "hello", n=2)["usage"], ask(server, "red", "hello again")["usage"]]
    ask(server, "red", "hello", stream=True)
    found = counted(server, 3)
    pinned = {"expert": "red", "reason": "pinned"}
    assert value(found, "time_to_first_token_seconds_count", **pinned) == 3
    assert value(found, "request_seconds_count", **pinned) == 3
    assert value(found, "queue_seconds_count", **pinned) == 4  # choices
    assert value(found, "inter_token_seconds_count", **pinned) == 4 * 4
    assert sum(use["completion_tokens"] for use in usages) == 15
    assert value(found, "completion_tokens_total", **pinned) == 15 + 5
    prompt = value(found, "prompt_tokens_total", **pinned)
    # Two choices share the prompt of their request; the streamed request asked what the first did.
    assert prompt == 2 * usages[0]["prompt_tokens"] + usages[1]["prompt_tokens"]
    first, whole = (value(found, f"{name}_seconds_sum", **pinned) for name in ("time_to_first_token", "request"))
    assert 0 < value(found, "queue_seconds_sum", **pinned) / 4 <= first < whole
    status = {"path": "/v1/chat/completions", "status": "200"}
    assert value(found, "requests_total", **pinned, **status) == 3
    engine = server.service.engine.statistics()
    assert {name: value(found, f"{name}_total") for name in OF_ENGINE} == {
        name: getattr(engine, name) for name in OF_ENGINE
    }
    assert engine.slot_hits == 4 and engine.slot_loads == 3
    assert value(found, "expert_on_device", expert="red") == 1


def test_one_label_set_on_every_path(start_server: Start, router: Any) -> None:
    """Routed, fallback, pinned, unloaded, a failing router, a refused request: the same labels, never more."""
    server = start_server(router=router)
    ask(server, "auto", prompts("green", 9)[7])
    ask(server, "auto", "")
    ask(server, "base", "x")
    server.service.engine.unload_expert("blue")
    ask(server, "auto", prompts("blue", 9)[7])
    server.post("/v1/chat/completions", {"model": "violet", "messages": [{"role": "user", "content": "x"}]})
    server.post("/v1/chat/completions", {"colour": 1})
    server.get("/nowhere")
    found = counted(server, 6)
    seen = set()
    for name, labels in found:
        if name.rpartition("_")[0] in HISTOGRAMS or name.endswith("tokens_total"):
            assert {label for label, _ in labels} - {"le"} == LABELS, name
        if name == "requests_total":
            assert {label for label, _ in labels} == LABELS | {"path", "status"}
            told = dict(labels)
            seen.add((told["expert"], told["reason"], told["status"]))
    assert seen >= {
        ("green", "routed", "200"),
        ("base", "empty", "200"),
        ("base", "pinned", "200"),
        ("base", "unavailable", "200"),
        ("none", "none", "404"),
        ("none", "none", "400"),
    }
    router_seconds = {frozenset(labels) for name, labels in found if name == "router_seconds_count"}
    assert frozenset({("expert", "base"), ("reason", "unavailable")}) in router_seconds
    assert value(found, "router_failures_total") == 1
