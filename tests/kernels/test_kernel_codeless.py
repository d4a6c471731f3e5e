"""Experts without codes, a low-rank part alone: in banks of their own, and beside experts with codes."""

import pytest
import torch

from meswitch_kernels import Capacity, ExpertBank, ExpertDelta, group_tokens
from meswitch_kernels.dispatch import backend_module
from meswitch_kernels.testing import (
    ERROR_BOUND,
    SLOT_PATTERNS,
    random_call,
    random_expert,
    random_low_rank,
    relative_error,
)

from .conftest import check, device_of


def test_the_truth_is_the_base_and_two_products():
    call = random_call(9, 40, 12, bits=0, dtype=torch.float32, rank=(5, 0, 8))
    expected = call.x.double() @ call.weight.double().T
    for t, slot in enumerate(call.slot_of_token.tolist()):
        if slot >= 0 and (rank := (5, 0, 8)[slot % 3]):
            left, right = (part.double() for part in random_low_rank(slot + 1, 40, 12, rank))
            expected[t] += left @ (right @ call.x[t].double())
    torch.testing.assert_close(call.truth(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pattern", SLOT_PATTERNS)
@pytest.mark.parametrize("tokens", [1, 7, 20, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bank_without_codes(backend, pattern, tokens, dtype):
    call = random_call(
        tokens, 100, 37, bits=0, rank=(5, 0, 33), bias=True, pattern=pattern, dtype=dtype, device=device_of(backend)
    )
    check(call, backend, group_tokens(call.slot_of_token, call.bank.slots))


@pytest.mark.parametrize("tokens", [3, 20, 150])
@pytest.mark.parametrize("bits", [(0, 2), (4, 0), (1, 0, 2)], ids=str)
def test_beside_experts_with_codes(backend, tokens, bits):
    """One batch of both kinds; the slots without codes had some before, of which nothing may be left."""
    call = random_call(tokens, 104, 40, bits=bits, rank=(8, 5), dtype=torch.float32, device=device_of(backend))
    for slot in range(4):
        if not bits[slot % len(bits)]:
            call.bank.load(slot, random_expert(50 + slot, 104, 40, max(bits), rank=8))
            call.bank.load(slot, random_expert(slot + 1, 104, 40, 0, rank=8))
            left, right = (part.float() for part in random_low_rank(slot + 1, 104, 40, 8))
            torch.testing.assert_close(call.bank.dequantize(slot).cpu(), left @ right, rtol=1e-5, atol=1e-6)
    check(call, backend)


def test_siblings_of_which_one_has_no_codes(backend):
    multiply = getattr(backend_module(backend), "expert_linears", None)
    if multiply is None:
        pytest.skip("this backend has no joined launch")
    calls = [
        random_call(6, 96, 24, bits=bits, rank=4, dtype=torch.float32, device=device_of(backend)) for bits in (0, 2)
    ]
    x, slots = calls[0].x, calls[0].slot_of_token
    groups = group_tokens(slots, 4)
    found = multiply(x, [(call.weight, call.bias, call.bank.tensors) for call in calls], slots, groups)
    for y, call in zip(found, calls, strict=True):
        assert relative_error(y, call.with_tokens(x, slots).truth()) < ERROR_BOUND[torch.float32]


def test_an_empty_slot_and_one_outside_are_not_the_base(backend):
    call = random_call(5, 64, 24, bits=0, rank=3, dtype=torch.float32, device=device_of(backend))
    call.bank.clear(1)
    slots = torch.tensor([-1, 0, 1, 2, 9], dtype=torch.int32, device=call.x.device)
    y = backend_module(backend).expert_linear(call.x, call.weight, None, call.bank.tensors, slots, None)
    assert torch.isnan(y).all(1).tolist() == [False, False, True, False, True]
    assert torch.isfinite(y[[0, 1, 3]]).all()


def test_a_bank_without_codes_takes_their_memory_from_nobody():
    with_codes, without = (
        ExpertBank(4, 1024, 512, Capacity(bits=bits, rank=16), device="meta").nbytes for bits in (1, 0)
    )
    assert with_codes - without == 4 * (512 * 1024 // 8 + 512 * 4)


def test_what_does_not_fit_is_refused():
    bank = ExpertBank(1, 64, 24, Capacity(rank=4))
    with pytest.raises(ValueError, match="bits 2 does not fit a bank of 0"):
        bank.load(0, random_expert(0, 64, 24, 2))
    nothing = ExpertDelta.of_nothing(64, 24)
    odd = ExpertDelta(bits=0, codes=nothing.codes, steps=nothing.steps, channel_scale=torch.ones(64).half())
    with pytest.raises(ValueError, match="go with codes"):
        bank.load(0, odd)


def test_a_factor_beyond_the_banks_type_reaches_nobody_else():
    bank = ExpertBank(2, 64, 24, Capacity(rank=2), torch.float16)
    left, right = random_low_rank(0, 64, 24, 2)
    nothing = ExpertDelta.of_nothing(64, 24)
    for slot, size in enumerate((1.0, 1e30)):
        bank.load(
            slot,
            ExpertDelta(bits=0, codes=nothing.codes, steps=nothing.steps, left=left.float() * size, right=right),
        )
    assert torch.isfinite(bank.tensors.left).all()
