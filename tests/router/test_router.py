"""The router as a server sees it."""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from meswitch_cli.errors import RouterError
from meswitch_cli.router import RouteDecision, Router, open_router
from meswitch_cli.router.backends.base import ServedBase
from meswitch_cli.router.decide.conversation import SHORT_TURN_CHARACTERS
from meswitch_cli.router.decide.sessions import Sessions
from meswitch_cli.router.store import RouterArtifact
from meswitch_cli.router.train.training import TrainedRouter

from .conftest import sentences

LoadProbe = Callable[[Path], Router]


@pytest.fixture
def gateless(tfidf_router: Router) -> Router:
    """Without the distance gate, which knows these tests' few words too well to let a new mixture pass."""
    model = replace(tfidf_router.model, gate=replace(tfidf_router.model.gate, threshold=float("inf")))
    return Router(tfidf_router.backend, model)


def test_routes_each_domain_and_refuses_the_rest(tfidf_router: Router) -> None:
    for domain in ("maths", "code"):
        decisions = [tfidf_router.route(text) for text in sentences(domain, 40, seed=1)]
        assert sum(item.expert == domain and item.reason == "routed" for item in decisions) >= 36
        for item in decisions:
            assert sum(item.probabilities.values()) == pytest.approx(1, abs=1e-5)
            assert item.confidence == max(item.probabilities.values())
    junk = [tfidf_router.route(text) for text in sentences(None, 40, seed=1)]
    assert sum(item.expert == "base" and item.reason in ("out_of_domain", "low_confidence") for item in junk) >= 38


def test_a_loaded_probe_decides_as_the_trained_one(
    trained_probe: TrainedRouter, probe_folder: Path, load_probe: LoadProbe
) -> None:
    loaded = load_probe(probe_folder)
    assert loaded.labels == ("code", "maths")
    assert RouterArtifact.open(probe_folder).manifest.trained_for == trained_probe.manifest.trained_for
    for text in [*sentences("maths", 5, seed=2), *sentences(None, 5, seed=2)]:
        mine, theirs = loaded.route(text), trained_probe.router.route(text)
        assert (mine.expert, mine.reason) == (theirs.expert, theirs.reason)
        assert mine.probabilities == pytest.approx(theirs.probabilities, abs=1e-5)


def test_serving_gives_the_features_of_training(probe_folder: Path, base: Path, load_probe: LoadProbe) -> None:
    """Whoever gives hidden states: here another object that computes them prompt by prompt."""
    router = load_probe(probe_folder)

    class OneByOne:
        def pooled_hidden_states(self, token_ids: Sequence[Sequence[int]], layer: int) -> torch.Tensor:
            inner = router.backend._hidden_states  # type: ignore[attr-defined]
            return torch.cat([inner.pooled_hidden_states([ids], layer) for ids in token_ids])

    other = open_router(probe_folder, ServedBase(OneByOne(), router.backend._tokenizer))  # type: ignore[attr-defined]
    texts = [*sentences("maths", 4), "a much longer prompt " * 9]
    assert torch.allclose(other.backend.features(texts), router.backend.features(texts), atol=2e-2)


def test_empty_and_binary_prompts_fall_back(tfidf_router: Router) -> None:
    for prompt in ("", "  \n", [], [{"role": "system", "content": "You count."}]):
        assert tfidf_router.route(prompt).reason == "empty"
    for prompt in ("\0" * 20, "\ud800 lone surrogate", b"\x89PNG\r\n\x1a\n\x00".decode("latin-1")):
        decision = tfidf_router.route(prompt)
        assert (decision.expert, decision.reason) == ("base", "out_of_domain")


def test_a_huge_prompt_is_cut_and_said(
    probe_folder: Path, load_probe: LoadProbe, caplog: pytest.LogCaptureFixture
) -> None:
    router = load_probe(probe_folder)
    caplog.set_level(logging.INFO, logger="meswitch_cli.router")
    huge = " ".join(sentences("maths", 4000))
    assert len(huge) > 100_000
    decision = router.route(huge)
    assert decision.reason != "error" and decision.latency_ms < 5000
    assert f"a prompt of {len(huge)} characters is routed by 64 tokens of it" in caplog.text
    caplog.clear()
    router.route("two plus two")
    assert not caplog.text


def test_a_session_is_kept_with_whom_it_is_told(tfidf_router: Router) -> None:
    """Also with an expert that the router does not know: nothing is asked of it."""
    tfidf_router.keep("pin", "some-other-expert")
    decision = tfidf_router.route(" ", session="pin")
    assert replace(decision, latency_ms=0) == RouteDecision("some-other-expert", 0.0, {}, "sticky", 0)
    assert decision.latency_ms > 0
    assert tfidf_router.route(" ", session="another").expert == "base"


def test_a_session_stays_until_another_is_likelier_by_the_margin(gateless: Router) -> None:
    maths, code = sentences("maths", 1, seed=5)[0], sentences("code", 1, seed=5)[0]
    assert gateless.route(maths, session="s").reason == "routed"
    # As much of one as of the other: the router is unsure, and each conversation stays where it is.
    mixed = f"{maths} {code}"
    assert gateless.route(code, session="t").reason == "routed"
    found = {session: gateless.route(mixed, session=session) for session in "st"}
    assert (found["s"].expert, found["t"].expert) == ("maths", "code")
    assert "sticky" in (found["s"].reason, found["t"].reason)
    empty = gateless.route("", session="s")
    assert (empty.expert, empty.reason) == ("maths", "sticky")
    switched = gateless.route(code, session="s")
    assert (switched.expert, switched.reason) == ("code", "routed")
    assert gateless.route("", session="s").expert == "code"


@pytest.mark.parametrize(("margin", "expert", "reason"), [(0.0, "code", "routed"), (1.0, "maths", "sticky")])
def test_the_margin_decides(tfidf_router: Router, margin: float, expert: str, reason: str) -> None:
    router = Router(tfidf_router.backend, tfidf_router.model, sticky_margin=margin)
    router.route(sentences("maths", 1, seed=5)[0], session="s")
    found = router.route(sentences("code", 1, seed=5)[0], session="s")
    assert (found.expert, found.reason) == (expert, reason)
    assert found.confidence == found.probabilities[expert]


def test_out_of_domain_leaves_the_session_alone(tfidf_router: Router) -> None:
    maths = sentences("maths", 1, seed=5)[0]
    tfidf_router.route(maths, session="away")
    assert tfidf_router.route(sentences(None, 1, seed=6)[0], session="away").expert == "base"
    assert tfidf_router.route("", session="away").expert == "maths"


def test_a_follow_up_is_read_with_what_was_said(gateless: Router) -> None:
    turns: list[dict[str, Any]] = [
        {"role": "system", "content": "You write python functions and loops; compile and import the class."},
        {"role": "user", "content": sentences("maths", 1, seed=8)[0]},
        {"role": "assistant", "content": "The total is the sum."},
        {"role": "user", "content": "And why?"},
    ]
    with_history, alone = gateless.route(turns), gateless.route("And why?")
    assert with_history.expert == "maths"
    assert with_history.probabilities["maths"] > alone.probabilities["maths"] + 0.1


def test_calibration_never_reorders(tfidf_router: Router) -> None:
    features = tfidf_router.backend.features(sentences("maths", 20, seed=3) + sentences("code", 20, seed=3))
    order = tfidf_router.model.scores(features).argmax(1)
    for temperature in (0.01, 1.0, 100.0):
        model = replace(tfidf_router.model, temperature=temperature)
        assert [item.label for item in model.judge(features)] == [model.labels[int(index)] for index in order]


class Broken:
    def pooled_hidden_states(self, token_ids: object, layer: int) -> torch.Tensor:
        raise RuntimeError("the device is gone")


class Nonsense:
    def pooled_hidden_states(self, token_ids: Sequence[object], layer: int) -> torch.Tensor:
        return torch.full((len(token_ids), 96), float("nan"))


@pytest.mark.parametrize(("states", "said"), [(Broken(), "the device is gone"), (Nonsense(), "not finite")])
def test_a_failure_is_raised_with_its_cause(probe_folder: Path, load_probe: LoadProbe, states: Any, said: str) -> None:
    tokenizer = load_probe(probe_folder).backend._tokenizer  # type: ignore[attr-defined]
    router = open_router(probe_folder, ServedBase(states, tokenizer))
    with pytest.raises(RouterError, match=f"the router failed: .*{said}"):
        router.route("two plus two")


def test_sessions_are_bounded_and_forget_the_oldest() -> None:
    sessions = Sessions(limit=2)
    sessions.put("a", "maths")
    sessions.put("b", "code")
    assert sessions.get("a") == "maths"
    sessions.put("c", "code")
    assert (sessions.get("a"), sessions.get("b"), len(sessions)) == ("maths", None, 2)


def test_an_idle_session_begins_anew() -> None:
    now = 0.0
    sessions = Sessions(idle_seconds=60, clock=lambda: now)
    sessions.put("a", "maths")
    now = 59.0
    assert sessions.get("a") == "maths"
    now = 118.0
    assert sessions.get("a") == "maths"
    now = 179.0
    assert sessions.get("a") is None and len(sessions) == 0


def test_an_open_tool_call_stays_with_its_expert(gateless: Router) -> None:
    maths, code = sentences("maths", 1, seed=5)[0], sentences("code", 1, seed=5)[0]
    assert gateless.route(maths, session="tool").expert == "maths"
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": code},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
    ]
    result = {"role": "tool", "content": code}
    for conversation in (turns, [*turns, result]):
        decision = gateless.route(conversation, session="tool")
        assert (decision.expert, decision.reason) == ("maths", "sticky")
    answered = [*turns, result, {"role": "assistant", "content": "done"}, {"role": "user", "content": code}]
    assert gateless.route(answered, session="tool").expert == "code"
    assert gateless.route(turns, session="unheard of").expert == "code"


def test_a_long_conversation_is_left_for_a_larger_lead(tfidf_router: Router) -> None:
    maths, code = sentences("maths", 1, seed=5)[0], sentences("code", 40, seed=5)
    asked = {"role": "user", "content": " ".join(code[:4])}
    long = [{"role": "system", "content": "Read this. " * 2000}, asked]
    lead = tfidf_router.route([asked], gate="off")
    lead_of = lead.probabilities["code"] - lead.probabilities["maths"]
    router = Router(tfidf_router.backend, tfidf_router.model, sticky_margin=lead_of / 2, gate="off")
    for session, conversation, expert in (("short", [asked], "code"), ("long", long, "maths")):
        router.route(maths, session=session)
        assert router.route(conversation, session=session).expert == expert


def test_a_short_turn_of_another_subject_needs_no_history(tfidf_router: Router) -> None:
    maths, code = sentences("maths", 1, seed=5)[0], sentences("code", 1, seed=5)[0]
    assert len(code) < SHORT_TURN_CHARACTERS
    turns = [{"role": "user", "content": maths}, {"role": "assistant", "content": maths}]
    alone = tfidf_router.route(code)
    assert (alone.expert, alone.reason) == ("code", "routed")
    after = tfidf_router.route([*turns, {"role": "user", "content": code}])
    assert (after.expert, after.probabilities) == ("code", alone.probabilities)
    for gate in ("normal", "off"):  # what is nobody's by itself is read with what was said before
        assert tfidf_router.route([*turns, {"role": "user", "content": "And then?"}], gate=gate).expert == "maths"


def test_threads_share_a_router(tfidf_router: Router) -> None:
    wrong: list[str] = []

    def talk(domain: str) -> None:
        for index, text in enumerate(sentences(domain, 25, seed=9)):
            decision = tfidf_router.route(text, session=f"{domain}{index % 3}")
            if decision.expert not in (domain, "base"):
                wrong.append(text)

    threads = [threading.Thread(target=talk, args=(domain,)) for domain in ("maths", "code") * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
