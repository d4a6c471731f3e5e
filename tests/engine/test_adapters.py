"""LoRA adapters served: beside full fine-tunes in one batch, and alone, in banks that have no codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import in_process
from engine.family import EXPERTS, Family, make_family, merged_model, requests
from transformers import AutoModelForCausalLM

from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.artifact.restore import restore
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.compression.job import compress, prepare
from meswitch_cli.compression.settings import CompressionSettings
from meswitch_cli.engine import TransformersEngine, generate
from meswitch_cli.engine.bank_layout import bank_layout
from meswitch_cli.engine.banks import Banks
from meswitch_cli.engine.base_model import load_base
from meswitch_cli.engine.memory import plan_memory
from zoo.adapter import make_adapter

Start = Callable[..., TransformersEngine]

#: Adapters by name: of some linears, of every weight matrix with tokens' own rows, of one kind of layer.
ADAPTERS: dict[str, dict[str, Any]] = {
    "some": {},
    "all": {"targets": ("_proj", "embed_tokens", "lm_head"), "rank": 7, "use_rslora": True},
    "values": {"targets": ("v_proj",), "rank": 2, "saved": ("model.norm",)},
}


def with_adapters(family: Family, folder: Path, **settings: Any) -> Family:
    """The family and adapters of its base, compressed. The adapters' references are their merged models."""
    artifacts, references = {}, dict(family.references)
    for seed, (name, options) in enumerate(ADAPTERS.items()):
        adapter = make_adapter(family.base, folder / f"{name}-adapter", seed=seed, **options)
        references[name] = merged_model(family.base, adapter)
        artifacts[name] = folder / name
        chosen = CompressionSettings.with_defaults(**settings)
        compress(prepare(str(family.base), str(adapter), artifacts[name], chosen, None))
    own = Family(family.base, family.artifacts | artifacts, family.dtype)
    vars(own)["references"] = references
    return own


def with_restored(family: Family, folder: Path) -> Family:
    """The same, the adapters' references being what their artifacts restore to: coded factors are a little off."""
    for name in ADAPTERS:
        plain = restore(
            Artifact.open(family.artifacts[name]), Checkpoint.open(str(family.base)), folder / f"{name}-plain"
        )
        family.references[name] = AutoModelForCausalLM.from_pretrained(plain, dtype=family.dtype).eval()
    return family


@pytest.mark.parametrize("slots", [2, 6])
@pytest.mark.parametrize("factor_bits", [16, 8])
def test_one_batch_of_adapters_and_full_fine_tunes(
    slots: int, factor_bits: int, family: Family, start: Start, tmp_path: Path
) -> None:
    own = with_adapters(family, tmp_path, factor_bits=factor_bits)
    if factor_bits < 16:
        own = with_restored(own, tmp_path)
    engine = start(own, slots=slots, max_wait=0.05)
    batch = requests(own, 28, seed=slots)
    assert {request.expert for request in batch} == {"base", *EXPERTS, *ADAPTERS}
    for request, completion in zip(batch, generate(engine, batch), strict=True):
        assert completion.error is None
        assert completion.tokens == own.greedy(request), request.expert


def test_adapters_alone_take_no_room_for_codes(tmp_path: Path, start: Start) -> None:
    own = with_adapters(make_family(tmp_path, experts={}), tmp_path)
    engine = start(own, slots=3)
    batch = requests(own, 16, seed=1)
    for request, completion in zip(batch, generate(engine, batch), strict=True):
        assert completion.tokens == own.greedy(request), request.expert
    base = load_base(Checkpoint.open(str(own.base)), torch.device("cpu"), torch.float32)
    banks = Banks(base, bank_layout(base, [Artifact.open(path).manifest for path in own.artifacts.values()]), 3)
    assert all(bank.tensors.codes.numel() == 0 for bank in banks.banks.values())


@pytest.mark.parametrize(("name", "config"), [("gpt_neox", {"num_key_value_heads": 4}), ("qwen2", {}), ("gemma2", {})])
def test_families(name: str, config: dict[str, int], tmp_path: Path, start: Start) -> None:
    own = make_family(tmp_path, name, experts={"alpha": EXPERTS["alpha"]}, **config)
    adapter = make_adapter(own.base, tmp_path / "adapter", targets=("query_key_value", "dense", "q_proj", "up_proj"))
    artifact = tmp_path / "lora"
    compress(prepare(str(own.base), str(adapter), artifact, CompressionSettings.with_defaults(), None))
    references = own.references | {"lora": merged_model(own.base, adapter)}
    own = Family(own.base, own.artifacts | {"lora": artifact}, own.dtype)
    vars(own)["references"] = references
    batch = requests(own, 9, seed=3)
    for request, completion in zip(batch, generate(start(own), batch), strict=True):
        assert completion.tokens == own.greedy(request), request.expert


def test_plan_of_adapters_is_what_is_allocated(tmp_path: Path) -> None:
    own = make_family(tmp_path, experts={}, dtype=torch.bfloat16)
    adapter = make_adapter(own.base, tmp_path / "adapter", targets=("_proj",), rank=8)
    job = prepare(str(own.base), str(adapter), tmp_path / "lora", CompressionSettings.with_defaults(), None)
    compress(job)
    plan = plan_memory(Checkpoint.open(str(own.base)), {}, adapter_rank=8, device_nbytes=10**8, experts=3)
    base = load_base(Checkpoint.open(str(own.base)), torch.device("cpu"), torch.bfloat16)
    banks = Banks(base, bank_layout(base, [Artifact.open(job.out).manifest]), 3)
    assert banks.nbytes == plan.slots_nbytes
    options = ("plan", "--base", own.base, "--experts", 3, "--device-memory", "100MB", "--adapter-rank", 8, "--json")
    told = json.loads(in_process(*options).stdout)
    assert told["slots_bytes"] == banks.nbytes
    refused = in_process(*options, "--card", "H100")
    assert refused.returncode == 2
    assert "--card" in refused.stderr
