"""What users say about the router's choices, kept for `meswitch router add --feedback`."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field

from meswitch_cli.names import BASE
from meswitch_cli.router.decide.conversation import routing_text
from meswitch_cli.server.errors import ApiError, InvalidValueError
from meswitch_cli.server.feedback_file import MAX_BYTES
from meswitch_cli.server.schemas import RouteRequest
from meswitch_cli.server.service import Service

endpoints = APIRouter()


class FeedbackRequest(RouteRequest):
    """A prompt and who should have answered it: an expert, or "base" where it is no expert's."""

    expert: Annotated[str, Field(max_length=256)]


@endpoints.post("/v1/route/feedback", summary="Who should have answered; kept for training the router")
async def feedback(request: Request, body: FeedbackRequest) -> dict[str, Any]:
    service = Service.of(request)
    if service.feedback is None or service.router is None:
        message = "this server keeps no feedback: start it with --router and --feedback FILE"
        raise ApiError(404, message, code="not_found")
    known = (*service.router.labels, BASE)
    if body.expert not in known:
        raise InvalidValueError("expert", f"must be one of {', '.join(known)}")
    text = routing_text(body.subject())
    if not text:
        raise InvalidValueError("messages", "there is no text of a user to learn from")
    kept = service.feedback
    domain = None if body.expert == BASE else body.expert
    if not await service.routing(lambda: kept.append(text, domain)):
        raise ApiError(507, f"the feedback file has reached {MAX_BYTES} bytes", code="feedback_full")
    return {"object": "route.feedback", "expert": body.expert}
