"""Artifacts of all kinds in one `vllm serve`: mixed rates, bit for bit, compressed adapters; a plain LoRA beside."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from engine.family import Family, Kind, coded_model, make_family, merged_model, requests
from engine.vllm.conftest import HEAD_DIM, NEEDS_VLLM
from engine.vllm.plain_server import PlainServer

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.compression.job import compress, prepare
from meswitch_cli.compression.settings import CompressionSettings
from zoo.adapter import make_adapter

pytestmark = NEEDS_VLLM

RATES = {
    "quarter": Kind({"bits": 0.25, "salient": 4, "rank": 12}),
    "one": Kind({"bits": 1, "salient": 0, "rank": 8}),
    "two": Kind({"bits": 2, "salient": 4}),
}


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Experts of three rates, one of them stored bit for bit too, a LoRA as it is and compressed."""
    folder = tmp_path_factory.mktemp("kinds")
    own = make_family(folder, head_dim=HEAD_DIM, experts=RATES)
    adapter = make_adapter(own.base, folder / "adapter", seed=3)
    for name, source, settings in (
        ("exact", folder / "two-full", {"exact": True}),
        ("compressed", adapter, {}),
    ):
        chosen = CompressionSettings.with_defaults(**settings)
        compress(prepare(str(own.base), str(source), folder / name, chosen, None))
    paths = {name: folder / name for name in ("exact", "compressed")}
    made = Family(own.base, own.artifacts | paths | {"lora": adapter}, own.dtype)
    restored = Family(own.base, {"compressed": folder / "compressed"}, own.dtype).references
    vars(made)["references"] = (
        own.references
        | restored
        | {"exact": coded_model(own.base, folder / "two-full"), "lora": merged_model(own.base, adapter)}
    )
    return made


@pytest.fixture(scope="module")
def server(everything: Family, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PlainServer]:
    options = ("--max-loras", "3", "--max-lora-rank", "8", "--enable-prefix-caching")
    with PlainServer(everything.base, everything.artifacts, tmp_path_factory.mktemp("served"), *options) as it:
        yield it


def test_mixed_traffic_of_every_kind_equals_plain_models(server: PlainServer, everything: Family) -> None:
    exact = Artifact.open(everything.artifacts["exact"]).manifest
    assert exact.exact and exact.format_version == 4
    batch = requests(everything, 21, seed=5, prefix=32)
    assert {request.expert for request in batch} >= everything.artifacts.keys()
    server.check(everything, batch)
