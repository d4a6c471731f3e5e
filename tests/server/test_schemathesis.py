"""Requests made from /openapi.json, good and bad: every answer is as described, and none is a server's failure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from server.family import Family, Running, start

from meswitch_cli.server.settings import ServerSettings

schemathesis = pytest.importorskip("schemathesis")

LIMITED = settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def open_server(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Whoever asks is an admin; what can be loaded is nothing."""
    folder: Path = tmp_path_factory.mktemp("nothing")
    server = start(family, settings=ServerSettings(admin_keys=("root",), experts_dir=folder), max_model_len=64)
    yield server
    server.stop()


@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_answers_are_as_described(open_server: Running, mode: str) -> None:
    checks = schemathesis.checks
    schema = schemathesis.openapi.from_url(f"{open_server.url}/openapi.json")
    tried = 0

    def check(case: Any) -> None:
        nonlocal tried
        tried += 1
        case.call_and_validate(
            headers={"authorization": "Bearer root"},
            # Only what the schema can know: names of experts, and values that fit together, are the server's own.
            excluded_checks=[checks.positive_data_acceptance],
        )

    operations = [result.ok() for result in schema.get_all_operations()]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/route"} <= {operation.path for operation in operations}
    for operation in operations:
        cases = operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode))
        try:
            LIMITED(given(case=cases)(check))()
        except Unsatisfiable:
            assert mode == "negative" and operation.method == "get"  # a GET without parameters has no bad form
    assert tried > 30


def test_the_engine_lives_on(open_server: Running) -> None:
    body = {"model": "base", "prompt": "x", "max_tokens": 2}
    assert open_server.post("/v1/completions", body).status_code == 200
