"""`POST /v1/embeddings`: the base's hidden states, averaged over a text's tokens."""

from __future__ import annotations

import base64
from typing import Any

from fastapi import APIRouter, Request
from torch.nn.functional import normalize

from meswitch_cli.names import AUTO, BASE
from meswitch_cli.server.errors import ApiError, InvalidValueError
from meswitch_cli.server.prompts import text_tokens
from meswitch_cli.server.record import RequestRecord
from meswitch_cli.server.routing import choose
from meswitch_cli.server.schemas import EmbeddingsRequest, listed
from meswitch_cli.server.service import Service

endpoints = APIRouter()


@endpoints.post("/v1/embeddings", summary="Texts as vectors of length 1, from the base's hidden states")
async def embed(request: Request, body: EmbeddingsRequest) -> dict[str, Any]:
    service, record = Service.of(request), RequestRecord.of(request)
    service.admit()
    record.user = body.user
    if body.model == AUTO:
        raise InvalidValueError("model", f"model: embeddings are the base's: {BASE!r}")
    record.choice = await choose(service, request, body.model, None)
    if body.model != BASE:
        raise InvalidValueError("model", f"model: embeddings are the base's: {BASE!r}, not {body.model!r}")
    layers = service.engine.num_layers
    layer = (layers + 1) // 2 if body.layer is None else body.layer
    if layer > layers:
        raise InvalidValueError("layer", f"layer: the base has {layers}")
    tokens = [
        await text_tokens(service, BASE, prompt) if isinstance(prompt, str) else tuple(prompt)
        for prompt in listed(body.input, service.settings.max_prompts, "input")
    ]
    _check(service, tokens)
    pooled = await service.routing(lambda: service.engine.pooled_hidden_states(tokens, layer))
    rows = normalize(pooled, dim=1).cpu().numpy().astype("<f4")
    record.prompt_tokens = count = sum(map(len, tokens))
    in_base64 = body.encoding_format == "base64"
    vectors = [base64.b64encode(row.tobytes()).decode() if in_base64 else row.tolist() for row in rows]
    return {
        "object": "list",
        "model": BASE,
        "data": [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(vectors)],
        "usage": {"prompt_tokens": count, "total_tokens": count},
    }


def _check(service: Service, prompts: list[tuple[int, ...]]) -> None:
    for prompt in prompts:
        if not prompt:
            raise InvalidValueError("input", "input: a text without tokens has no embedding")
        if len(prompt) >= service.engine.max_model_len:
            message = f"input: {len(prompt)} tokens; at most {service.engine.max_model_len - 1} fit"
            raise ApiError(400, message, code="context_length_exceeded", parameter="input")
