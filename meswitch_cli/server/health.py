"""For machines that watch: is it alive, does it take requests, what is it, what has it counted."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from meswitch_cli import __version__
from meswitch_cli.server.errors import ApiError
from meswitch_cli.server.metrics import Metrics
from meswitch_cli.server.service import Service

endpoints = APIRouter()


@endpoints.get("/health", summary="Whether the process is alive; 503 once its engine has failed for good")
async def health(request: Request) -> dict[str, str]:
    _refuse_if_failed(Service.of(request))
    return {"status": "ok"}


@endpoints.get("/ready", summary="Whether requests are taken; 503 while it shuts down")
async def ready(request: Request) -> dict[str, str]:
    service = Service.of(request)
    service.admit()
    _refuse_if_failed(service)
    return {"status": "ready"}


def _refuse_if_failed(service: Service) -> None:
    """An engine that is closed although nobody shuts the server down has failed, and only a new process helps."""
    if service.engine.closed is not None and not service.draining:
        raise ApiError(503, service.engine.closed, code="engine_failed")


@endpoints.get("/version", summary="The server's version")
async def version() -> dict[str, str]:
    return {"name": "meswitch", "version": __version__}


@endpoints.get("/metrics", summary="Metrics for Prometheus", response_class=Response)
def metrics(request: Request) -> Response:
    return Response(Service.of(request).metrics.text(), media_type=Metrics.content_type)
