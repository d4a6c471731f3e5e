"""Experts in vLLM's compiled mode: torch.compile traces the model whole, and does not look into our operators."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
from engine.family import Family, requests
from engine.vllm.conftest import NEEDS_VLLM
from engine.vllm.plain_server import PlainServer

pytestmark = NEEDS_VLLM


@pytest.fixture(scope="module", params=["eager", "inductor"])
def server(
    request: pytest.FixtureRequest, family: Family, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PlainServer]:
    """One expert is known at the start, so that slots grow after the model has been traced."""
    config = json.dumps({"meswitch": {"loras": False}})
    adapters = {"alpha": family.artifacts["alpha"]}
    folder = tmp_path_factory.mktemp("compiled")
    options = ("--max-loras", "1", "--additional-config", config)
    environment = {"VLLM_CPU_CI_ENV": str(int(request.param == "eager")), "VLLM_CACHE_ROOT": str(folder / "cache")}
    with PlainServer(family.base, adapters, folder, *options, environment=environment) as it:
        yield it


def test_mixed_traffic_equals_plain_models(server: PlainServer, family: Family) -> None:
    own = replace(family, artifacts={name: family.artifacts[name] for name in ("alpha", "beta")})
    own.__dict__["references"] = family.references
    load = {"lora_name": "beta", "lora_path": str(family.artifacts["beta"])}
    assert server.post("/v1/load_lora_adapter", load).status_code == 200
    server.check(own, requests(own, 16, seed=6))
    log = server.log.read_text(errors="replace")
    assert re.search(r"mode'?: <CompilationMode.DYNAMO_TRACE_ONCE", log), "vLLM has not compiled"
