"""The engine on the Triton backend, as on a GPU, with small models of a few families."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch

from meswitch_kernels import Capacity, ExpertBank, dispatch
from meswitch_kernels.dispatch import backend_module

proof = pytest.importorskip("meswitch_cli.engine.proof")
modules = pytest.importorskip("meswitch_cli.engine.modules")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 160, "max_position_embeddings": 128,
}  # fmt: skip


@pytest.fixture
def triton(needs_triton: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """The backend, with which the engine serves here; prompts of six tokens of a slot are worth merging weights."""
    caches = (dispatch.default_backend, modules.kernels, proof._problem)
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "triton")
    backend = backend_module("triton")
    monkeypatch.setattr(backend, "merge_tokens", lambda device: 6)
    yield backend
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize("family", ["qwen3"])  # as Llama, and with norms of heads
def test_a_family_comes_out_as_plain_transformers(family: str, triton: object, monkeypatch: pytest.MonkeyPatch) -> None:
    merged: list[int] = []
    own = triton.merged_linear  # type: ignore[attr-defined]

    def counted(*arguments: object) -> None:
        merged.append(arguments[5])  # type: ignore[arg-type]
        own(*arguments)

    monkeypatch.setattr(triton, "merged_linear", counted)
    proof.prove({"model_type": family, **SIZES}, "base", DEVICE, torch.float32)
    assert proof.SLOT in merged


def test_every_kind_of_linear_is_compiled_at_every_size(triton: object, monkeypatch: pytest.MonkeyPatch) -> None:
    compiling = pytest.importorskip("meswitch_cli.engine.compiling")
    monkeypatch.setattr(compiling, "MOST_THREADS", 1)  # the interpreter is one
    called: list[tuple[int, int, int]] = []

    def linear(out: int, slots: int = 2) -> object:
        made = modules.ExpertLinear(torch.nn.Linear(64, out, device=DEVICE), modules.CurrentBatch(), triton)
        made.bank = ExpertBank(slots, 64, out, Capacity(bits=2, salient=4), torch.float32, DEVICE)
        multiply = made.multiply

        def noted(x: torch.Tensor, weight: torch.Tensor, *rest: object) -> torch.Tensor:
            called.append((*x.shape, weight.shape[0]))
            return multiply(x, weight, *rest)

        made.multiply = noted
        return made

    together, alone = [linear(64), linear(32)], [linear(96), linear(96), linear(64)]
    for item in together:
        item.siblings = modules.Siblings(together, triton)
        item.siblings.multiply = lambda x, operands, *rest: called.append((*x.shape, len(operands)))
    compiling.compile_products([*together, *alone], triton, 2)
    assert sorted(called) == sorted((size, 64, kind) for size in compiling.SIZES for kind in (2, 64, 96))


@pytest.mark.parametrize("slots", [4, 32])
def test_batches_of_all_sizes_meet_kernels_that_are_compiled(slots: int, triton: object) -> None:
    """A kernel that is compiled while requests wait costs them seconds."""
    compiling = pytest.importorskip("meswitch_cli.engine.compiling")
    launch = importlib.import_module("meswitch_kernels.triton_launch")

    def constants(tokens: int) -> str:
        slot_of_token = torch.full((tokens,), -1, dtype=torch.int32, device=DEVICE)
        groups = triton.group_tokens(slot_of_token, slots)  # type: ignore[attr-defined]
        x = torch.zeros(tokens, 4096, dtype=torch.bfloat16, device=DEVICE)
        return str(launch._Shape.of(x, groups, 4096, (2,), 0, grouped=False, biased=False).constants)

    prepared = {constants(size) for size in compiling.SIZES}
    assert {constants(size) for size in (1, 2, 3, 5, 8, 15, 17, 31, 33, 48, 63, 65, 100, 127)} <= prepared
