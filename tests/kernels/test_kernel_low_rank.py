"""The low-rank part of a delta, y += (x·Rᵀ)·Lᵀ: every backend against the truth, slots of any rank in one batch."""

import subprocess
import sys

import pytest
import torch

from meswitch_kernels import Capacity, ExpertBank, available_backends, expert_linear, group_tokens
from meswitch_kernels.testing import (
    SLOT_PATTERNS,
    random_call,
    random_expert,
    random_low_rank,
    relative_error,
)

from .conftest import check, device_of

TOKENS = [1, 3, 6, 15, 16, 40, 300]
RANKS = [5, 8, 32, 128, (32, 0, 5), (0, 1, 33, 17)]
CPU_DTYPES = [torch.float32, torch.bfloat16]


def test_the_truth_is_two_products():
    """(x·Rᵀ)·Lᵀ of each token's own slot, beside what the same experts give without it."""
    call, plain = (random_call(9, 40, 12, dtype=torch.float32, rank=rank) for rank in ((5, 0, 8), 0))
    expected = plain.truth()
    for t, slot in enumerate(call.slot_of_token.tolist()):
        if slot >= 0 and (rank := (5, 0, 8)[slot % 3]):
            left, right = (part.double() for part in random_low_rank(slot + 1, 40, 12, rank))
            expected[t] += left @ (right @ call.x[t].double())
    torch.testing.assert_close(call.truth(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("rank", RANKS, ids=str)
@pytest.mark.parametrize("k", [0, 8])
def test_every_rank(backend, tokens, rank, k):
    if backend == "triton" and (k == 0) != (tokens % 2 == 0):
        pytest.skip("an interpreted kernel is slow; half the cases cover it")
    for dtype in CPU_DTYPES if backend == "cpu" else [torch.float32]:
        call = random_call(tokens, 200, 37, rank=rank, k=k, dtype=dtype, device=device_of(backend), seed=tokens)
        check(call, backend)


@pytest.mark.parametrize("pattern", SLOT_PATTERNS)
@pytest.mark.parametrize("tokens", [7, 150])
def test_every_mixture(backend, pattern, tokens):
    for dtype in [torch.float32, torch.bfloat16]:
        call = random_call(
            tokens, 104, 70, bits=(1, 2, 4), group_size=32, channel_scale=True, bias=True, pattern=pattern,
            rank=(8, 0, 20), dtype=dtype, device=device_of(backend), seed=3,
        )  # fmt: skip
        check(call, backend, group_tokens(call.slot_of_token, call.bank.slots))


@pytest.mark.parametrize("shape", [(576, 192), (4096, 67), (31, 3), (33, 1), (1, 5)], ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_every_shape(shape, tokens, bits):
    if available_backends()["cpu"]:
        pytest.skip("needs numba")
    for dtype in CPU_DTYPES:
        check(random_call(tokens, *shape, bits=bits, k=min(8, shape[0]), rank=(32, 5), dtype=dtype), "cpu")


@pytest.mark.parametrize("tokens", [3, 40, 130])
@pytest.mark.parametrize("held", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bank_of_another_dtype(backend, tokens, held, dtype):
    """A backend may round L and R to the type of x, no more: both hold the bfloat16 factors exactly here."""
    call = random_call(tokens, 96, 33, dtype=dtype, device=device_of(backend))
    bank = ExpertBank(4, 96, 33, Capacity(bits=2, salient=8, rank=12), held, device_of(backend))
    for slot in range(4):
        bank.load(slot, random_expert(slot, 96, 33, rank=3 * slot))
    check(type(call)(call.x, call.weight, None, bank, call.slot_of_token), backend)


@pytest.mark.parametrize("tokens", [2, 20, 140])
def test_many_input_channels(backend, tokens):
    """Enough that Triton's programs share them, the last with fewer than the others."""
    check(random_call(tokens, 1300, 40, rank=(33, 0, 5), dtype=torch.float32, device=device_of(backend)), backend)


@pytest.mark.parametrize("tokens", [3, 40, 150])
def test_non_contiguous_x(backend, tokens):
    call = random_call(tokens, 96, 20, rank=(8, 5), device=device_of(backend))
    wide = torch.full((tokens, 200), torch.nan, dtype=call.x.dtype, device=device_of(backend))
    wide[:, 50:146] = call.x
    check(call.with_tokens(wide[:, 50:146], call.slot_of_token), backend)
    check(call.with_tokens(call.x.T.contiguous().T, call.slot_of_token), backend)


@pytest.mark.parametrize("tokens", [12, 150])
@pytest.mark.parametrize("part", ["left", "right"])
def test_a_number_that_is_none_reaches_its_own_slot_alone(backend, tokens, part):
    """Neither padding of a lower rank nor memory of another slot is multiplied."""
    call = random_call(tokens, 64, 24, rank=(3, 8, 0, 8), dtype=torch.float32, device=device_of(backend))
    getattr(call.bank.tensors, part)[1].fill_(torch.nan)
    getattr(call.bank.tensors, part)[0].narrow(1 if part == "left" else 0, 3, 5).fill_(torch.nan)
    y = expert_linear(call.x, call.weight, None, call.bank, call.slot_of_token, backend=backend)
    own = call.slot_of_token == 1
    assert torch.isnan(y[own]).all()
    assert torch.isfinite(y[~own]).all()


@pytest.mark.parametrize("tokens", [1, 5, 40, 150])
def test_no_memory_is_read_before_it_is_written(backend, tokens, monkeypatch):
    """Fresh memory is NaN, so that an element nobody writes shows."""

    def poisoned(*size, **settings):
        shape = size[0] if isinstance(size[0], tuple | torch.Size) else size
        fill = torch.nan if settings.get("dtype", torch.float32).is_floating_point else 255
        return torch.full(shape, fill, **settings)

    def poisoned_like(x, *size, **settings):
        return poisoned(*size, **{"dtype": x.dtype, "device": x.device, **settings})

    call = random_call(tokens, 100, 33, rank=(5, 0, 20), dtype=torch.float32, device=device_of(backend))
    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned_like)
    check(call, backend)


@pytest.mark.parametrize("tokens", [1, 40, 150])
def test_twice_gives_the_same_bytes(backend, tokens):
    call = random_call(tokens, 576, 70, rank=(32, 0, 5), device=device_of(backend))
    arguments = (call.x, call.weight, call.bias, call.bank, call.slot_of_token)
    first, second = (expert_linear(*arguments, backend=backend) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("tokens", [5, 20, 150])
@pytest.mark.parametrize("change", ["left", "right"])
def test_another_slots_factor_is_noticed(backend, tokens, change):
    """The bound these tests hold a backend to is far below what a mix-up of two slots makes."""
    call = random_call(tokens, 200, 37, rank=8, dtype=torch.float32, device=device_of(backend))
    truth = call.truth()
    factor = getattr(call.bank.tensors, change)
    factor.copy_(factor.roll(1, 0))
    y = expert_linear(call.x, call.weight, None, call.bank, call.slot_of_token, backend=backend)
    assert relative_error(y, truth) > 0.1


def test_threads_without_pytorchs_openmp(monkeypatch):
    if available_backends()["cpu"]:
        pytest.skip("needs numba")
    from meswitch_kernels import cpu_threads

    monkeypatch.setattr(cpu_threads, "_parallel", lambda: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for _ in range(20):
        check(random_call(9, 200, 300, rank=(32, 7, 0)), "cpu")


PORTABLE = """
import torch
from meswitch_kernels import cpu_vector, expert_linear
from meswitch_kernels.testing import ERROR_BOUND, random_call, relative_error
assert not cpu_vector.HAS_BF16
for dtype in (torch.float32, torch.bfloat16):
    for tokens in (1, 5, 20):
        call = random_call(tokens, 200, 37, bits=(1, 2, 4), rank=(32, 0, 5), dtype=dtype)
        y = expert_linear(call.x, call.weight, None, call.bank, call.slot_of_token, backend="cpu")
        assert relative_error(y, call.truth()) < ERROR_BOUND[dtype], (dtype, tokens)
"""


def test_a_machine_without_bf16_vectors_gets_the_same_answers(monkeypatch):
    if available_backends()["cpu"]:
        pytest.skip("needs numba")
    monkeypatch.setenv("NUMBA_CPU_NAME", "generic")
    monkeypatch.setenv("NUMBA_CPU_FEATURES", "")
    subprocess.run([sys.executable, "-c", PORTABLE], check=True)
