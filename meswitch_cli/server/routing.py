"""Which expert answers: the one that was named, or the one that the router chooses."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.engine.contract import BASE, Engine
from meswitch_cli.errors import MeswitchError
from meswitch_cli.server.auth import identity
from meswitch_cli.server.errors import ApiError
from meswitch_cli.server.record import RequestRecord
from meswitch_cli.server.schemas import RouteRequest
from meswitch_cli.server.service import Service
from meswitch_cli.server.settings import AUTO

if TYPE_CHECKING:
    from meswitch_cli.router import Router

#: A conversation keeps its expert while its requests carry the same value here.
SESSION_HEADER = "x-meswitch-session"
_MAX_SESSION = 256

logger = logging.getLogger(__name__)
endpoints = APIRouter()

Subject = str | list[dict[str, str]]


@dataclass(frozen=True)
class Choice:
    """Who answers, and how that came about; `reason` is one of the router's, or "unavailable"."""

    expert: str
    confidence: float
    reason: str
    router_ms: float = 0.0
    probabilities: Mapping[str, float] = field(default_factory=dict)


def check_router(router: Router, engine: Engine) -> list[str]:
    """Make sure that a router and an engine belong together.

    Returns:
        What is worth a warning: experts that were compressed anew since the router was trained.

    Raises:
        MeswitchError: the router knows an expert that is not served, or was trained for another base.
    """
    served = {expert.name: expert for expert in engine.experts()}
    if missing := sorted(set(router.labels) - set(served) - {BASE}):
        raise MeswitchError(
            f"the router knows {', '.join(map(repr, missing))}, which this server does not serve "
            f"(it serves {', '.join(map(repr, sorted(served))) or 'none'}): add --expert NAME=ARTIFACT, or train a "
            "router for these experts"
        )
    fingerprints = {Artifact.open(expert.path).manifest.base.fingerprint for expert in served.values()}
    if router.base_fingerprint and fingerprints and router.base_fingerprint not in fingerprints:
        raise MeswitchError(
            f"the router was trained for the base {router.base_fingerprint}, the experts are of "
            f"{', '.join(sorted(fingerprints))}: give the router of this base"
        )
    return [
        f"expert {name!r} is not the artifact that the router was trained for; routing may be off"
        for name, artifact in router.experts.items()
        if artifact and name in served and served[name].artifact != artifact
    ]


async def choose(service: Service, request: Request, model: str, subject: Subject | None) -> Choice:
    """Decide who answers and write it into the request's record.

    `subject` is what the router reads; None where the prompt is token ids, whose text depends on the expert.

    Raises:
        ApiError: nobody of that name is served, there is no router to ask, or the router failed and is strict.
    """
    session = _session(request)
    if model == AUTO:
        choice = await _routed(service, request, subject, session)
    elif model == BASE or model in service.experts():
        choice = Choice(model, 1.0, "pinned")
        router = service.router
        if router is not None and session is not None:  # the conversation goes on with whom it was pinned to
            await service.routing(lambda: router.route(subject or "", session=session, pinned=model))
    else:
        routed = (AUTO,) if service.router else ()
        names = ", ".join(repr(name) for name in (*sorted(service.experts()), BASE, *routed))
        raise ApiError(
            404, f"model {model!r} is not served; there are {names}", code="model_not_found", parameter="model"
        )
    record_choice(RequestRecord.of(request), choice)
    return choice


def record_choice(record: RequestRecord, choice: Choice) -> None:
    """Keep a choice for the headers, the log and the metrics."""
    record.expert, record.reason, record.confidence = choice.expert, choice.reason, choice.confidence
    record.router_ms, record.probabilities = choice.router_ms, dict(choice.probabilities)


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
    started = time.perf_counter()
    failure: Exception | None = None
    choice = Choice(BASE, 0.0, "error")
    try:
        decision = await service.routing(lambda: router.route(subject, session=session))
    except Exception as error:
        failure = error
        logger.exception("request %s: the router failed", RequestRecord.of(request).id)
    else:
        choice = Choice(
            decision.expert, decision.confidence, decision.reason, probabilities=dict(decision.probabilities)
        )
        if choice.reason == "error":
            failure = MeswitchError("the router answered with an error")
        elif choice.expert != BASE and choice.expert not in service.experts():
            failure = MeswitchError(f"the router chose {choice.expert!r}, which is not served now")
            logger.warning("request %s: %s", RequestRecord.of(request).id, failure)
            choice = Choice(BASE, 0.0, "unavailable", probabilities=choice.probabilities)
    elapsed = time.perf_counter() - started
    service.metrics.router.labels(choice.expert, choice.reason).observe(elapsed)
    if failure is not None:
        service.metrics.router_failures.inc()
        if service.settings.router_strict:
            raise ApiError(500, f"the router failed: {type(failure).__name__}", code="router_failed") from failure
    return Choice(choice.expert, choice.confidence, choice.reason, 1000 * elapsed, choice.probabilities)


@endpoints.post("/v1/route", summary="Who would answer, without an answer")
async def route(request: Request, body: RouteRequest) -> dict[str, Any]:
    service = Service.of(request)
    choice = await _routed(service, request, body.subject(), None)  # a dry run leaves sessions as they are
    record_choice(RequestRecord.of(request), choice)
    return {
        "object": "route",
        "expert": choice.expert,
        "confidence": choice.confidence,
        "reason": choice.reason,
        "router_ms": round(choice.router_ms, 3),
        "probabilities": dict(choice.probabilities),
    }
