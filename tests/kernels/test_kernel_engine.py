"""The engine on the Triton backend, as on a GPU, with small models of a few families."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch

from meswitch_kernels import Capacity, ExpertBank, dispatch
from meswitch_kernels.dispatch import backend_module
from meswitch_kernels.messages import MESSAGES

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
    summed: list[int] = []
    own, own_sum = triton.merged_linear, triton.summed_linear  # type: ignore[attr-defined]

    def counted(*arguments: object) -> None:
        merged.append(arguments[5])  # type: ignore[arg-type]
        own(*arguments)

    def sum_counted(residual: torch.Tensor, *arguments: object) -> torch.Tensor:
        summed.append(len(residual))
        y: torch.Tensor = own_sum(residual, *arguments)
        return y

    monkeypatch.setattr(triton, "merged_linear", counted)
    monkeypatch.setattr(triton, "summed_linear", sum_counted)
    proof.prove({"model_type": family, **SIZES}, "base", DEVICE, torch.float32)
    assert proof.SLOT in merged
    assert min(summed) < 6 < max(summed)  # of tokens that decode alone, and of prompts that are merged


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


class Recorder:
    """In place of a kernel: notes what each launch is compiled for, and computes nothing."""

    def __init__(self, name: str) -> None:
        self.name, self.seen = name, set[tuple[object, ...]]()

    def __getitem__(self, grid: object) -> object:
        def launch(*arguments: object, **constants: object) -> None:
            self.seen.add((self.name, *sorted(constants.items())))

        return launch


@pytest.mark.parametrize("layers", [3, 24])
def test_kernels_do_not_grow_with_layers_that_mix_codes(
    layers: int, triton: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As artifacts of `--size` do: each weight of each layer has rates of its own."""
    compiling = pytest.importorskip("meswitch_cli.engine.compiling")
    monkeypatch.setattr(compiling, "MOST_THREADS", 1)
    launch = importlib.import_module("meswitch_kernels.triton_launch")
    rng = torch.Generator().manual_seed(3)

    def linear(width: int, out: int) -> object:
        made = modules.ExpertLinear(torch.nn.Linear(width, out, False, DEVICE, torch.bfloat16), current, triton)
        held = [bool(chosen) for chosen in torch.randint(0, 2, (6,), generator=rng)]
        messages = tuple(number for number, chosen in zip(MESSAGES, held[:4], strict=True) if chosen)
        bits = 2 if held[4] or not messages else int(held[5])
        made.bank = ExpertBank(
            2, width, out, Capacity(bits=bits, messages=messages, rank=16), torch.bfloat16, DEVICE, planes=True
        )
        return made

    current, linears = modules.CurrentBatch(), []
    for _ in range(layers):
        for width, outs in [(64, (64, 32, 32)), (64, (64,)), (64, (96, 96)), (96, (64,))]:
            together = [linear(width, out) for out in outs]
            for item in together:
                item.siblings = modules.Siblings(together, triton) if len(together) > 1 else None
            linears += together
    recorders = {name: Recorder(name) for name in ("decode", "decode_siblings", "prepare", "prepare_siblings")}
    for name, recorder in recorders.items():
        monkeypatch.setattr(launch, name, recorder)
    phases: list[int] = []
    run = compiling._run

    def counted(threads: object, calls: list[object], what: str) -> None:
        run(threads, calls, what)
        phases.append(len(calls))
        phases.append(len(recorders["decode"].seen | recorders["decode_siblings"].seen))

    monkeypatch.setattr(compiling, "_run", counted)
    compiling.compile_products(linears, triton, 2)
    separate, kernels, _, at_the_end = phases
    # Alone or siblings, of three sizes, for (2, 1), (1,) and each message.
    assert separate == kernels == at_the_end <= 2 * 3 * 6
    assert len(recorders["prepare"].seen | recorders["prepare_siblings"].seen) <= 2 * 3 * 6
    compiled = {name: set(recorder.seen) for name, recorder in recorders.items()}
    for tokens in (1, 7, 20, 33, 70):
        slots = torch.full((tokens,), 1, dtype=torch.int32, device=DEVICE)
        groups = triton.group_tokens(slots, 2)  # type: ignore[attr-defined]
        for item in linears:
            x = torch.zeros(tokens, item.in_features, dtype=torch.bfloat16, device=DEVICE)
            if item.siblings is None:
                item.multiply(x, item.weight, None, item.bank.tensors, slots, groups)
            else:
                operands = [(each.weight, None, each.bank.tensors) for each in item.siblings.layers]
                item.siblings.multiply(x, operands, slots, groups)
    assert {name: set(recorder.seen) for name, recorder in recorders.items()} == compiled
