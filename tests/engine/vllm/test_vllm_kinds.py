"""Artifacts of all kinds in one `vllm serve`: mixed rates, bit for bit, compressed adapters; a plain LoRA beside."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engine.family import Family, Kind, make_family, requests
from engine.vllm.conftest import HEAD_DIM, NEEDS_VLLM
from engine.vllm.plain_server import PlainServer
from transformers import AutoModelForCausalLM

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.compression.job import compress, prepare
from meswitch_cli.compression.settings import CompressionSettings
from meswitch_cli.delta.quantize import dequantize, quantize
from meswitch_cli.engine.exact import SLOT_CODE
from zoo.adapter import make_adapter, merged_weights

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
        own.references | restored | {"exact": coded(own.base, folder / "two-full"), "lora": merged(own.base, adapter)}
    )
    return made


def coded(base: Path, expert: Path) -> torch.nn.Module:
    """The expert with the codes of a slot: what is stored bit for bit is coded when it is loaded."""
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(expert, dtype=torch.float32)
    of_base = dict(plain.named_parameters())
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() == 2:
                found = quantize(of_base[name].detach(), value.detach(), SLOT_CODE)
                assert found is not None
                value.copy_(of_base[name] + dequantize(found[0]))
    return model.eval()


def merged(base: Path, adapter: Path) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, value in merged_weights(base, adapter).items():
            parameters[name].copy_(value)
    return model.eval()


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
