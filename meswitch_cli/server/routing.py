"""Which expert answers: the one that was named, or the one that the router chooses."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.engine.contract import Engine
from meswitch_cli.errors import MeswitchError
from meswitch_cli.names import AUTO, BASE, GATE_MODES, GateMode
from meswitch_cli.router.backends.base import ServedBase
from meswitch_cli.router.decide import RouteDecision, Router
from meswitch_cli.router.store import Policy, open_router
from meswitch_cli.server.auth import identity
from meswitch_cli.server.errors import ApiError
from meswitch_cli.server.messages import Subject
from meswitch_cli.server.record import RequestRecord
from meswitch_cli.server.schemas import RouteRequest
from meswitch_cli.server.service import Service

#: A conversation keeps its expert while its requests carry the same value here.
SESSION_HEADER = "x-meswitch-session"
#: How much the router refuses, for this request.
GATE_HEADER = "x-meswitch-gate"
_MAX_SESSION = 256

logger = logging.getLogger(__name__)
endpoints = APIRouter()


@dataclass(frozen=True)
class Choice(RouteDecision):
    """Who answers, and how that came about.

    Attributes:
        router_ms: milliseconds from asking the router to its answer: the wait until it is free, and `latency_ms`.
    """

    router_ms: float = 0.0


#: A server goes on with an expert that was compressed anew: its field is the same, its prompts may be near.
POLICY = Policy("this server", "add --expert {name}=ARTIFACT", another_artifact="warning")


def open_served_router(
    path: Path, engine: Engine, on_warning: Callable[[str], None], gate: GateMode | None = None
) -> Router:
    """Open a router that reads the engine's own base; `gate` is how much it refuses, None its own.

    Raises:
        RouterError: it is no router, damaged, for another base, or can choose an expert that is not served.
    """
    router = open_router(path, served_base(engine), served_experts(engine), POLICY, on_warning)
    router.gate = gate or router.gate
    return router


def served_base(engine: Engine) -> ServedBase:
    """The engine's base as a router reads it."""
    served = engine.experts()
    # Each of them was compared with the base when it was loaded.
    fingerprint = Artifact.open(served[0].path).manifest.base.fingerprint if served else None
    return ServedBase(engine, engine.tokenizer(BASE), name=engine.base_id, fingerprint=fingerprint)


def served_experts(engine: Engine) -> dict[str, str | None]:
    """Name to SHA-256 of the artifact's manifest."""
    return {expert.name: expert.digest for expert in engine.experts()}


async def choose(service: Service, request: Request, model: str, subject: Subject | None) -> Choice:
    """Decide who answers.

    `subject` is what the router reads; None where the prompt is token ids, whose text depends on the expert.

    Raises:
        ApiError: nobody of that name is served, there is no router to ask, or the router failed and is strict.
    """
    session = _session(request)
    if model == AUTO:
        return await _routed(service, request, subject, session)
    if not service.engine.serves(model):
        routed = (AUTO,) if service.router else ()
        names = ", ".join(repr(name) for name in (*sorted(service.experts()), BASE, *routed))
        raise ApiError(
            404, f"model {model!r} is not served; there are {names}", code="model_not_found", parameter="model"
        )
    if service.router is not None and session is not None:  # the conversation goes on with whom it was pinned to
        service.router.keep(session, model)
    return Choice(model, 1.0, {}, "pinned", 0.0)


def _gate(request: Request) -> GateMode | None:
    given = request.headers.get(GATE_HEADER)
    for mode in GATE_MODES:
        if given == mode:
            return mode
    if given is None:
        return None
    message = f"the header {GATE_HEADER} must be one of {', '.join(GATE_MODES)}"
    raise ApiError(400, message, code="invalid_value", parameter=GATE_HEADER)


def _session(request: Request) -> str | None:
    """What the router knows a conversation by: two keys' sessions of one name are two sessions."""
    session = request.headers.get(SESSION_HEADER)
    if session is None:
        return None
    if not 0 < len(session) <= _MAX_SESSION:
        message = f"the header {SESSION_HEADER} must have 1 to {_MAX_SESSION} characters"
        raise ApiError(400, message, code="invalid_value", parameter=SESSION_HEADER)
    return f"{identity(request.headers)}:{session}"


async def _routed(service: Service, request: Request, subject: Subject | None, session: str | None) -> Choice:
    router = service.router
    if router is None:
        message = f"model {AUTO!r} needs a router: start the server with --router, or name an expert"
        raise ApiError(404, message, code="model_not_found", parameter="model")
    if subject is None:
        message = f"model {AUTO!r} routes one prompt of text; for several prompts or token ids, name the expert"
        raise ApiError(400, message, code="invalid_value", parameter="model")
    gate = _gate(request)
    started = time.perf_counter()
    failure: Exception | None = None
    try:
        decision = await service.routing(lambda: router.route(subject, session=session, gate=gate))
    except Exception as error:  # whatever goes wrong in a router must not fail the user's request
        failure = error
        logger.exception("request %s: the router failed", RequestRecord.of(request).id)
        decision = RouteDecision(BASE, 0.0, {}, "error", 0.0)
    if not service.engine.serves(decision.expert):
        failure = MeswitchError(f"the router chose {decision.expert!r}, which is not served now")
        logger.warning("request %s: %s", RequestRecord.of(request).id, failure)
        decision = replace(decision, expert=BASE, confidence=0.0, reason="unavailable")
    elapsed = time.perf_counter() - started
    service.metrics.router.labels(decision.expert, decision.reason).observe(elapsed)
    if failure is not None:
        service.metrics.router_failures.inc()
        if service.settings.router_strict:
            cause = type(failure.__cause__ or failure).__name__
            raise ApiError(500, f"the router failed: {cause}", code="router_failed") from failure
    return Choice(**vars(decision), router_ms=1000 * elapsed)


@endpoints.post("/v1/route", summary="Who would answer, without an answer")
async def route(request: Request, body: RouteRequest) -> dict[str, Any]:
    service = Service.of(request)
    choice = await _routed(service, request, body.subject(), None)  # a dry run leaves sessions as they are
    RequestRecord.of(request).choice = choice
    return {
        "object": "route",
        "expert": choice.expert,
        "confidence": choice.confidence,
        "reason": choice.reason,
        "router_ms": round(choice.router_ms, 3),
        "probabilities": dict(choice.probabilities),
    }
