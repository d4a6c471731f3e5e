"""model: "auto" with a real router, and what happens when it cannot decide."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import openai
import pytest
from server.family import Running, Start
from server.fields import FIELDS, prompts

from meswitch_cli.errors import MeswitchError
from meswitch_cli.router import Router
from meswitch_cli.router.decide.router import Reason
from meswitch_cli.router.store import check_membership, write_router
from meswitch_cli.router.train.data import read_examples
from meswitch_cli.router.train.training import TrainedRouter
from meswitch_cli.server import webpage
from meswitch_cli.server.routing import POLICY, open_served_router, served_base, served_experts
from meswitch_cli.server.settings import ServerSettings

HEADERS = ("expert", "confidence", "reason", "router-ms")


def chat(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "auto", "messages": [{"role": "user", "content": text}], "max_tokens": 3} | more


def test_auto_asks_the_expert_of_the_field_and_says_so(routed: Running) -> None:
    for field in FIELDS:
        for stream in (False, True):
            response = routed.post("/v1/chat/completions", chat(prompts(field, 9)[7], stream=stream))
            assert response.status_code == 200
            assert response.headers["x-meswitch-expert"] == field
            assert response.headers["x-meswitch-reason"] == "routed"
            assert 0.5 < float(response.headers["x-meswitch-confidence"]) <= 1
            assert float(response.headers["x-meswitch-router-ms"]) > 0
            probabilities = json.loads(response.headers["x-meswitch-probabilities"])
            assert set(probabilities) == set(FIELDS) and max(probabilities, key=probabilities.get) == field
            assert f'"model":"{field}"' in response.text
    client = openai.OpenAI(base_url=f"{routed.url}/v1", api_key="none", max_retries=0)
    answer = client.completions.create(model="auto", prompt=prompts("blue", 9)[6], max_tokens=2)
    assert answer.model == "blue"
    assert "auto" in {model.id for model in client.models.list()}


def test_every_answer_has_the_same_headers_and_labels(routed: Running) -> None:
    requests = [
        chat(prompts("red", 9)[0]),
        chat(""),
        chat("zzz qqq"),
        chat("x", model="green"),
        chat("x", model="base"),
        chat("x", model="green", max_tokens=100_000),
    ]
    reasons = []
    for body in requests:
        response = routed.post("/v1/chat/completions", body)
        assert all(f"x-meswitch-{name}" in response.headers for name in HEADERS), response.text
        reasons.append(response.headers["x-meswitch-reason"])
    assert reasons[0] == "routed" and reasons[1] == "empty" and reasons[3:] == ["pinned"] * 3
    counted = [line for line in routed.get("/metrics").text.splitlines() if line.startswith("meswitch_requests_total")]
    assert counted and all(
        all(f'{label}="' in line for label in ("path", "status", "expert", "reason")) for line in counted
    )
    assert any('expert="base"' in line and 'reason="empty"' in line for line in counted)
    assert any('status="400"' in line and 'expert="green"' in line and 'reason="pinned"' in line for line in counted)


def test_a_dry_run_answers_nothing_and_remembers_nothing(routed: Running) -> None:
    before = routed.service.engine.statistics().generated_tokens
    body = {"messages": [{"role": "user", "content": prompts("green", 9)[8]}]}
    session = {"x-meswitch-session": "dry"}
    answer = routed.post("/v1/route", body, headers=session)
    assert answer.json()["expert"] == "green" and answer.headers["x-meswitch-expert"] == "green"
    assert sum(answer.json()["probabilities"].values()) == pytest.approx(1)
    assert routed.service.engine.statistics().generated_tokens == before
    after = routed.post("/v1/chat/completions", chat(prompts("red", 9)[1]), headers=session)
    assert after.headers["x-meswitch-expert"] == "red"


def test_a_session_keeps_its_expert(routed: Running) -> None:
    first = routed.post("/v1/chat/completions", chat(prompts("blue", 9)[2]), headers={"x-meswitch-session": "a"})
    assert first.headers["x-meswitch-expert"] == "blue"
    vague = chat(" ")
    again = routed.post("/v1/chat/completions", vague, headers={"x-meswitch-session": "a"})
    assert (again.headers["x-meswitch-expert"], again.headers["x-meswitch-reason"]) == ("blue", "sticky")
    other = routed.post("/v1/chat/completions", vague, headers={"x-meswitch-session": "b"})
    assert other.headers["x-meswitch-reason"] != "sticky"
    routed.post("/v1/chat/completions", chat("x", model="green"), headers={"x-meswitch-session": "c"})
    pinned = routed.post("/v1/chat/completions", vague, headers={"x-meswitch-session": "c"})
    assert (pinned.headers["x-meswitch-expert"], pinned.headers["x-meswitch-reason"]) == ("green", "sticky")
    refused = routed.post("/v1/chat/completions", vague, headers={"x-meswitch-session": "x" * 257})
    assert refused.json()["error"]["param"] == "x-meswitch-session"


def test_sessions_of_two_keys_are_two(start_server: Start, router: Router) -> None:
    server = start_server(router=router, settings=ServerSettings(api_keys=("one", "two")))
    session = {"x-meswitch-session": "same"}
    server.post("/v1/chat/completions", chat(prompts("blue", 9)[3]), headers=session | {"authorization": "Bearer one"})
    vague = server.post("/v1/chat/completions", chat(" "), headers=session | {"authorization": "Bearer two"})
    assert vague.headers["x-meswitch-reason"] != "sticky"


def test_what_auto_cannot_route_is_refused(routed: Running) -> None:
    for prompt in ([5, 6], ["a", "b"], [[5], [6]]):
        response = routed.post("/v1/completions", {"model": "auto", "prompt": prompt})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "model")


def broken(texts: Any, on_done: Any = None) -> None:
    raise RuntimeError("no features today")


def test_a_router_that_fails_is_the_base_is_counted_and_logged(
    routed: Running, router: Router, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(router.backend, "features", broken)
    response = routed.post("/v1/chat/completions", chat("anything"))
    assert response.status_code == 200 and response.json()["model"] == "base"
    assert (response.headers["x-meswitch-reason"], response.headers["x-meswitch-expert"]) == ("error", "base")
    assert response.headers["x-meswitch-confidence"] == "0.0000"
    assert "no features today" in caplog.text
    assert "meswitch_router_failures_total 1.0" in routed.get("/metrics").text


@pytest.mark.parametrize("loaded", [True, False], ids=["fallback served", "fallback unloaded"])
def test_a_router_that_fails_is_the_base_whatever_its_fallback(
    start_server: Start, router: Router, monkeypatch: pytest.MonkeyPatch, loaded: bool
) -> None:
    """`train-router --fallback red` says where prompts go that pass no gate, not who answers a failure."""
    server = start_server(router=Router(router.backend, router.model, fallback="red"))
    if not loaded:
        server.service.engine.unload_expert("red")
    empty = server.post("/v1/chat/completions", chat(" "))
    expected = ("red", "empty") if loaded else ("base", "unavailable")
    assert (empty.headers["x-meswitch-expert"], empty.headers["x-meswitch-reason"]) == expected
    monkeypatch.setattr(router.backend, "features", broken)
    for path, body in (("/v1/chat/completions", chat("anything")), ("/v1/route", {"prompt": "anything"})):
        response = server.post(path, body)
        assert response.status_code == 200, response.text
        assert (response.headers["x-meswitch-expert"], response.headers["x-meswitch-reason"]) == ("base", "error")


def test_the_page_has_words_for_every_reason() -> None:
    """And says that the base answers where the router's fallback has no part in it, there alone."""
    script = (webpage.FOLDER / "answer.js").read_text()
    words = dict(re.findall(r'^  (\w+): "(.*)",$', script.partition("const REASONS = {")[2].partition("};")[0], re.M))
    assert set(words) == set(get_args(Reason))
    assert {reason for reason, text in words.items() if "the base answers" in text} == {"error", "unavailable"}
    fallback = {reason for reason, text in words.items() if "fallback answers" in text}
    assert fallback == {"low_confidence", "out_of_domain", "empty"}


def test_a_strict_router_that_fails_is_an_error(
    start_server: Start, router: Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_server(router=router, settings=ServerSettings(router_strict=True))
    monkeypatch.setattr(router, "route", lambda *a, **k: 1 / 0)
    response = server.post("/v1/chat/completions", chat("anything"))
    assert (response.status_code, response.json()["error"]["code"]) == (500, "router_failed")


def test_an_unloaded_expert_is_not_routed_to(start_server: Start, router: Router) -> None:
    routed = start_server(router=router)
    routed.service.engine.unload_expert("red")
    response = routed.post("/v1/chat/completions", chat(prompts("red", 9)[4]))
    assert response.status_code == 200
    assert (response.headers["x-meswitch-expert"], response.headers["x-meswitch-reason"]) == ("base", "unavailable")


def test_a_router_and_a_server_that_do_not_belong_together(
    start_server: Start, trained: TrainedRouter, family: Any, tmp_path: Path
) -> None:
    written = save(trained, tmp_path / "router")
    few = start_server(experts={"red": family.artifacts["red"]}).service.engine
    warnings: list[str] = []
    with pytest.raises(MeswitchError, match=r"'blue', 'green'.*this server does not have.*--expert blue=ARTIFACT"):
        open_served_router(written, few, warnings.append)
    every = start_server().service.engine
    opened = open_served_router(written, every, warnings.append)
    assert opened.route(prompts("red", 9)[0]).expert == "red" and warnings == []
    another = replace(trained.manifest.trained_for, base_id="other", base_fingerprint="sha256:" + "0" * 64)
    base, experts = served_base(every), served_experts(every)
    with pytest.raises(MeswitchError, match="the router was made for another base"):
        check_membership(another, base, experts, POLICY)
    assert check_membership(replace(another, base_fingerprint=base.fingerprint), base, experts, POLICY) == []
    anew = replace(trained, manifest=replace(trained.manifest, experts=experts | {"red": "0" * 64}))
    open_served_router(save(anew, tmp_path / "anew"), every, warnings.append)
    assert len(warnings) == 1
    assert "'red': the router was trained for the artifact with manifest 000000000000" in warnings[0]


def save(trained: TrainedRouter, folder: Path) -> Path:
    return write_router(folder, trained.manifest, trained.router.model, trained.backend, trained.store).path


def test_feedback_is_kept_and_learned_from(start_server: Start, router: Router, tmp_path: Path) -> None:
    kept = tmp_path / "feedback.jsonl"
    server = start_server(router=router, settings=ServerSettings(feedback=kept))
    assert server.get("/v1/status").json()["feedback"] is True
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Was für ein Tag! ünïcode"}]
    assert server.post("/v1/route/feedback", {"messages": turns, "expert": "blue"}).status_code == 200
    assert server.post("/v1/route/feedback", {"prompt": "a dozen coins", "expert": "base"}).status_code == 200
    found = [(item.text, item.domain) for item in read_examples(kept)]
    assert found == [("Was für ein Tag! ünïcode", "blue"), ("a dozen coins", None)]
    for body, parameter in (
        ({"prompt": "x", "expert": "nobody"}, "expert"),
        ({"prompt": " ", "expert": "red"}, "messages"),
        ({"expert": "red"}, "messages"),
        ({"prompt": "x"}, "expert"),
    ):
        response = server.post("/v1/route/feedback", body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, parameter)
    assert len(read_examples(kept)) == 2


def test_no_feedback_is_kept_unasked(routed: Running) -> None:
    assert routed.get("/v1/status").json()["feedback"] is False
    response = routed.post("/v1/route/feedback", {"prompt": "x", "expert": "red"})
    assert response.status_code == 404 and "--feedback" in response.json()["error"]["message"]


def test_a_request_says_how_much_is_refused(routed: Running) -> None:
    asked = {"prompt": "Which river is longer, the Nile or the Amazon?"}
    assert routed.post("/v1/route", asked).json()["reason"] == "out_of_domain"
    answer = routed.post("/v1/route", asked, headers={"x-meswitch-gate": "off"}).json()
    assert answer["reason"] == "routed" and answer["expert"] in FIELDS
    refused = routed.post("/v1/chat/completions", chat("x"), headers={"x-meswitch-gate": "loose"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "x-meswitch-gate")
