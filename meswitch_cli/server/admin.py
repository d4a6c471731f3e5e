"""Experts loaded, unloaded and pinned under traffic, under our names and vLLM's. `auth` has checked the admin key."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse

from meswitch_cli.engine.contract import BASE, EngineError, ShuttingDownError, UnknownExpertError
from meswitch_cli.errors import ArtifactError, MeswitchError, UsageError
from meswitch_cli.names import check_name
from meswitch_cli.server.errors import ApiError, InvalidValueError
from meswitch_cli.server.models import expert_object
from meswitch_cli.server.schemas import (
    LoadAdapterRequest,
    LoadRequest,
    PinRequest,
    UnloadAdapterRequest,
    UnloadRequest,
)
from meswitch_cli.server.service import Service

logger = logging.getLogger(__name__)
endpoints = APIRouter()


def allowed_folder(experts_dir: Path | None, path: str) -> Path:
    """The folder below the server's own that a request names, links followed.

    Raises:
        ApiError: there is no such folder, it lies elsewhere, or the server may load none.
    """
    if experts_dir is None:
        message = "this server loads no experts over HTTP: start it with --experts-dir"
        raise ApiError(403, message, code="no_experts_dir")
    root = experts_dir.resolve()
    try:
        folder = (root / path).resolve()
        exists = folder.is_dir()
    except (OSError, ValueError, RuntimeError) as error:
        raise InvalidValueError("path", "path: not the name of a folder") from error
    if root not in folder.parents:
        raise InvalidValueError("path", "path: outside the folder that this server may load experts from")
    if not exists:
        raise ApiError(404, f"path: there is no folder {path!r}", code="not_found", parameter="path")
    return folder


@endpoints.post("/v1/experts/load", summary="Serve one more expert")
async def load(request: Request, body: LoadRequest) -> dict[str, Any]:
    service = Service.of(request)
    service.admit()
    try:
        check_name(body.name)
    except UsageError as error:
        raise InvalidValueError("name", str(error)) from error
    folder = allowed_folder(service.settings.experts_dir, body.path or body.name)
    if service.engine.serves(body.name):
        message = f"{body.name!r} is served already; unload it first, or choose another name"
        raise ApiError(409, message, code="already_served", parameter="name")
    await _change(lambda: service.engine.load_expert(body.name, folder))
    logger.info("expert %r is served", body.name)
    return _expert(service, body.name)


@endpoints.post("/v1/experts/unload", summary="Serve an expert no longer, once its running requests have ended")
async def unload(request: Request, body: UnloadRequest) -> dict[str, Any]:
    service = Service.of(request)
    _served(service, body.name)
    await _change(lambda: service.engine.unload_expert(body.name))
    logger.info("expert %r is served no longer", body.name)
    return {"name": body.name, "object": "expert", "unloaded": True}


@endpoints.post("/v1/experts/pin", summary="Keep an expert on the device, or let it go again")
async def pin(request: Request, body: PinRequest) -> dict[str, Any]:
    service = Service.of(request)
    _served(service, body.name)
    await _change(lambda: service.engine.pin_expert(body.name, body.pinned))
    return _expert(service, body.name)


@endpoints.post("/v1/load_lora_adapter", summary="As vLLM calls loading", response_class=PlainTextResponse)
async def load_lora_adapter(request: Request, body: LoadAdapterRequest) -> str:
    await load(request, LoadRequest(name=body.lora_name, path=body.lora_path))
    return f"Success: LoRA adapter '{body.lora_name}' added successfully."


@endpoints.post("/v1/unload_lora_adapter", summary="As vLLM calls unloading", response_class=PlainTextResponse)
async def unload_lora_adapter(request: Request, body: UnloadAdapterRequest) -> str:
    await unload(request, UnloadRequest(name=body.lora_name))
    return f"Success: LoRA adapter '{body.lora_name}' removed successfully."


async def _change(work: Callable[[], None]) -> None:
    try:
        await asyncio.to_thread(work)
    except (ShuttingDownError, UnknownExpertError):
        raise
    except ArtifactError as error:
        raise ApiError(400, str(error), code="invalid_artifact", parameter="path") from error
    except (EngineError, MeswitchError) as error:
        raise ApiError(409, str(error), code="conflict", parameter="name") from error


def _served(service: Service, name: str) -> None:
    if name == BASE:
        raise InvalidValueError("name", "name: the base is always served")
    if not service.engine.serves(name):
        raise ApiError(404, f"expert {name!r} is not served", code="model_not_found", parameter="name")


def _expert(service: Service, name: str) -> dict[str, Any]:
    expert = service.experts().get(name)
    if expert is None:
        raise ApiError(409, f"expert {name!r} was unloaded meanwhile", code="conflict", parameter="name")
    return {"name": name, "object": "expert"} | expert_object(expert)
