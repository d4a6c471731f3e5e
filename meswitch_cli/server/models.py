"""What is served: `GET /v1/models` as OpenAI's clients know it, `GET /v1/status` for people who watch."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request

from meswitch_cli import __version__
from meswitch_cli.engine.contract import ExpertStatus
from meswitch_cli.names import AUTO, BASE
from meswitch_cli.server.errors import ApiError
from meswitch_cli.server.service import Service

endpoints = APIRouter()


def expert_object(expert: ExpertStatus) -> dict[str, Any]:
    """An expert as the API tells of it: no path of this machine, but what identifies its weights."""
    return {
        "artifact": expert.digest,
        "bytes": expert.nbytes,
        "residency": expert.residency,
        "slot": expert.slot,
        "pinned": expert.pinned,
        "running": expert.running,
        "waiting": expert.waiting,
    }


def _model(service: Service, name: str, kind: str, extra: dict[str, Any]) -> dict[str, Any]:
    head = {"id": name, "object": "model", "created": service.created, "owned_by": "meswitch", "kind": kind}
    if name != AUTO:
        head["sampling"] = dict(service.engine.sampling_defaults(name))
    return head | {"base": service.engine.base_id, "max_model_len": service.engine.max_model_len} | extra


def _models(service: Service) -> list[dict[str, Any]]:
    routed = [_model(service, AUTO, "router", {"experts": list(service.router.labels)})] if service.router else []
    experts = [
        _model(service, name, "expert", expert_object(expert)) for name, expert in sorted(service.experts().items())
    ]
    return [*routed, _model(service, BASE, "base", {}), *experts]


@endpoints.get("/v1/models", summary="Experts, the base and, with a router, auto")
def list_models(request: Request) -> dict[str, Any]:
    return {"object": "list", "data": _models(Service.of(request))}


@endpoints.get("/v1/models/{name:path}", summary="One of them")
def one_model(request: Request, name: str) -> dict[str, Any]:
    for model in _models(Service.of(request)):
        if model["id"] == name:
            return model
    raise ApiError(404, f"model {name!r} is not served", code="model_not_found", parameter="model")


@endpoints.get("/v1/status", summary="Counters since the start, and what is where now")
def status(request: Request) -> dict[str, Any]:
    service = Service.of(request)
    return {
        "object": "status",
        "version": __version__,
        "base": service.engine.base_id,
        "router": service.router is not None,
        "feedback": service.router is not None and service.feedback is not None,
        "draining": service.draining,
        "uptime_seconds": round(time.time() - service.created, 1),
        "completion_tokens": service.tokens,
        "engine": asdict(service.engine.statistics()),
        "experts": [{"name": name} | expert_object(expert) for name, expert in sorted(service.experts().items())],
    }
