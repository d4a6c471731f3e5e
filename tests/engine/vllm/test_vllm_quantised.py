"""A base that vLLM keeps quantised: its own method computes the base's product, banks add the experts' deltas."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from checkpoint.test_quantised import quantise
from engine.family import EXPERTS, Family, check_near_ties, compress_experts, make_family, requests
from engine.vllm.conftest import HEAD_DIM, NEEDS_VLLM, PAGE_SIZE

from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.compression.job import compress, prepare
from meswitch_cli.compression.settings import CompressionSettings
from meswitch_cli.engine import EngineSettings, generate
from meswitch_cli.engine.contract import EngineError
from meswitch_cli.engine.vllm.engine import VllmEngine
from meswitch_cli.model.weights import CheckpointWeights

pytestmark = NEEDS_VLLM


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> tuple[Family, Family]:
    """A Llama in compressed-tensors' INT4 with an expert, and the same as an ordinary model."""
    folder = tmp_path_factory.mktemp("int4")
    plain = make_family(
        folder / "plain", experts={}, dtype=torch.bfloat16, head_dim=HEAD_DIM, intermediate_size=128
    ).base
    quantised, meant = folder / "quantised", folder / "meant"
    shutil.copytree(plain, meant)
    safetensors.torch.save_file(
        quantise(plain, quantised, "int4"), meant / "model.safetensors", metadata={"format": "pt"}
    )
    _without_input_scales(quantised)
    reference = compress_experts(meant, folder / "reference", torch.float32, experts={"alpha": EXPERTS["alpha"]})
    settings = CompressionSettings(samples=4, sequence_length=32, embedding_bits=2, **EXPERTS["alpha"].settings)
    expert = folder / "reference" / "alpha-full"
    compress(prepare(str(quantised), str(expert), folder / "alpha", settings, None))
    return Family(quantised, {"alpha": folder / "alpha"}, torch.bfloat16), reference


def _without_input_scales(folder: Path) -> None:
    """Leave out what vLLM's models have no place for."""
    file = folder / "model.safetensors"
    held = safetensors.torch.load_file(file)
    kept = {name: tensor for name, tensor in held.items() if not name.endswith("input_scale")}
    safetensors.torch.save_file(kept, file, metadata={"format": "pt"})


def test_tokens_are_those_of_what_it_stands_for(int4: tuple[Family, Family]) -> None:
    """Up to near ties: vLLM rounds what it unpacks, and the base's product, to bfloat16, as a plain model does."""
    quantised, exact = int4
    own = Family(exact.base, exact.artifacts, torch.bfloat16)
    settings = EngineSettings(
        base=str(quantised.base),
        experts=quantised.artifacts,
        dtype="bfloat16",
        max_model_len=128,
        cache_tokens=4096,
        page_size=PAGE_SIZE,
        strict=True,
    )
    engine = VllmEngine(settings)
    batch = requests(exact, 12, seed=1)
    try:
        engine.start()
        completions = generate(engine, batch)
    finally:
        engine.stop()
    check_near_ties(exact, own, batch, completions)


class _Computes:
    """A method of vLLM's that computes with a weight."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight

    def apply(self, layer: object, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return x @ self.weight.T


@pytest.mark.parametrize("wrong", ["", "rows", "scale"])
def test_numbers_that_vllm_takes_otherwise_are_refused(int4: tuple[Family, Family], wrong: str) -> None:
    from meswitch_cli.engine.vllm.layers import Rows
    from meswitch_cli.engine.vllm.quantised import compare_quantised
    from meswitch_cli.engine.vllm.shards import LayerShard

    base = CheckpointWeights(Checkpoint.open(str(int4[0].base)))
    names = [f"model.layers.0.self_attn.{leaf}_proj" for leaf in ("q", "k", "v")]
    meant = [base.read(f"{name}.weight").float() for name in names]
    parts = {
        name: Rows(torch.zeros_like(weight), None, LayerShard.whole(tuple(weight.shape)))
        for name, weight in zip(names, meant, strict=True)
    }
    if wrong == "rows":
        meant[0] = meant[0].roll(1, 0)
    if wrong == "scale":
        meant[2] = meant[2] * 1.1
    module = SimpleNamespace(quant_method=_Computes(torch.cat(meant)))
    refused = pytest.raises(EngineError, match=f"takes {names[0 if wrong == 'rows' else 2]} for other weights")
    with refused if wrong else nullcontext():
        compare_quantised(module, parts, base, 8)
