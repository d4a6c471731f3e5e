"""Linears of one input in the launches of one."""

import gc
import weakref

import pytest
import torch

from meswitch_kernels import Capacity, ExpertBank
from meswitch_kernels.groups import group_tokens
from meswitch_kernels.messages import MESSAGES
from meswitch_kernels.testing import ERROR_BOUND, Call, random_expert, relative_error, slots_for

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SLOTS = 4
EIGHTH, QUARTER, HALF, WHOLE = MESSAGES


def family(tokens, in_features, outs, *, dtype, pattern="mixed", bias=False, seed=0, **formats):
    """Calls of one x: each of `formats` goes to the linears in turn, and there to the slots."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, in_features, generator=rng).to(DEVICE, dtype)
    slots = slots_for(pattern, tokens, SLOTS).to(DEVICE)
    calls = []
    for index, out in enumerate(outs):
        own = {name: values[index % len(values)] for name, values in formats.items()}
        ranks, group_size, scale = own.get("rank", (0,)), own.get("group_size", 0), own.get("channel_scale", False)
        k, bits = own.get("k", 8), own["bits"]
        capacity = Capacity(
            bits=max((width for width in bits if width not in MESSAGES), default=0),
            messages=tuple(number for number in MESSAGES if number in bits),
            group_size=group_size, salient=k, rank=max(ranks), channel_scale=scale,
        )  # fmt: skip
        bank = ExpertBank(SLOTS, in_features, out, capacity, dtype, DEVICE, planes=True)
        for slot in range(SLOTS):
            expert = random_expert(
                seed + 10 * index + slot, in_features, out, bits[slot % len(bits)], group_size, k, scale, bias,
                rank=ranks[slot % len(ranks)],
            )  # fmt: skip
            bank.load(slot, expert)
        weight = torch.randn(out, in_features, generator=rng).mul(in_features**-0.5).to(DEVICE, dtype)
        own_bias = torch.randn(out, generator=rng).to(DEVICE, dtype) if bias else None
        calls.append(Call(x=x, weight=weight, bias=own_bias, bank=bank, slot_of_token=slots))
    return calls


def together(triton, calls):
    groups = group_tokens(calls[0].slot_of_token, SLOTS)
    operands = [(call.weight, call.bias, call.bank.tensors) for call in calls]
    return triton.expert_linears(calls[0].x, operands, calls[0].slot_of_token, groups)


def check(triton, calls):
    for y, call in zip(together(triton, calls), calls, strict=True):
        assert y.shape == (len(call.x), call.bank.out_features)
        assert y.is_contiguous()
        assert relative_error(y, call.truth()) < ERROR_BOUND[call.x.dtype]


CASES = [
    (1, 64, (32, 16, 16), {"bits": [(2,)]}),
    (5, 192, (64, 16, 32), {"bits": [(2, 1), (4,), (1,)], "rank": [(16, 0), (0,), (32,)]}),
    (17, 1024, (80, 80), {"bits": [(1, 2, 4)], "channel_scale": [True, False], "k": [8, 0], "bias": True}),
    (40, 96, (16, 48, 16), {"bits": [(4, 2), (2,)], "group_size": [32, 0], "rank": [(16,)]}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "width", "outs", "formats"), CASES, ids=["q-k-v", "formats", "biases", "groups"])
def test_siblings_answer_as_each_alone_would(tokens, width, outs, formats, dtype, triton, monkeypatch):
    monkeypatch.setattr(triton, "launch_decode", None)  # not one by one
    check(triton, family(tokens, width, outs, dtype=dtype, **formats))


@pytest.mark.parametrize(
    ("width", "outs", "formats"),
    [(62, (16, 16), {}), (64, (16, 17), {}), (64, (16, 16), {"rank": [(5,)]})],
    ids=["odd-input", "odd-output", "odd-rank"],
)
def test_odd_numbers_are_served_one_by_one(width, outs, formats, triton):
    check(triton, family(3, width, outs, dtype=torch.bfloat16, bits=[(2,)], **formats))


def test_siblings_of_mixed_rates(triton, monkeypatch):
    """Each linear's own order of x: an artifact of a size has other rates in each."""
    monkeypatch.setattr(triton, "launch_decode", None)  # not one by one
    bits = [(QUARTER,), (HALF, 2), (EIGHTH, WHOLE, 1)]
    ranks, scales = [(16, 0), (0,), (32,)], [True, False, False]
    check(triton, family(5, 160, (32, 16, 16), dtype=torch.bfloat16, bits=bits, rank=ranks, channel_scale=scales))
    check(triton, family(2, 64, (16, 16), dtype=torch.bfloat16, bits=bits))


def test_tables_follow_banks(triton):
    """A bank in another's place has a table of its own."""
    calls = family(3, 64, (16, 16), dtype=torch.bfloat16, bits=[(2,)])
    check(triton, calls)
    other = family(3, 64, (16, 16), dtype=torch.bfloat16, bits=[(4,)], seed=5)
    check(
        triton,
        [calls[0], Call(calls[0].x, *(getattr(other[1], n) for n in ("weight", "bias", "bank", "slot_of_token")))],
    )
    check(triton, calls)


def test_a_bank_that_is_let_go_gives_its_memory_back(triton):
    calls = family(3, 64, (16, 16), dtype=torch.bfloat16, bits=[(2,)])
    check(triton, calls)
    codes = [weakref.ref(call.bank.tensors.codes) for call in calls]
    gc.disable()
    try:
        calls.clear()
        assert [reference() for reference in codes] == [None, None]
    finally:
        gc.enable()


def test_more_tokens_than_decode_takes_at_once(triton):
    check(triton, family(270, 64, (16, 32), dtype=torch.bfloat16, bits=[(2,)]))


def test_siblings_of_a_step_with_prompts(triton, monkeypatch):
    """Merged weights, and few tokens of many slots, in an order that no scheduler makes."""
    monkeypatch.setattr(triton, "merge_tokens", lambda device: 80)
    monkeypatch.setattr(triton, "merged_linear", None)  # not one by one
    runs = [(0, 3), (1, 80), (2, 70), (-1, 2), (0, 4)]
    calls = family(159, 64, (16, 32), dtype=torch.bfloat16, bits=[(2,), (1, 4)], rank=[(16,)], bias=True)
    slots = torch.tensor([slot for slot, length in runs for _ in range(length)], dtype=torch.int32, device=DEVICE)
    calls = [call.with_tokens(call.x, slots) for call in calls]
    groups = triton.group_tokens(slots, SLOTS, runs)
    assert len(groups.plan.merged) == len(groups.plan.parts) == 1
    operands = [(call.weight, call.bias, call.bank.tensors) for call in calls]
    for y, call in zip(triton.expert_linears(calls[0].x, operands, slots, groups), calls, strict=True):
        assert relative_error(y, call.truth()) < ERROR_BOUND[torch.bfloat16]


def test_a_bad_slot_is_answered_with_nan(triton):
    calls = family(3, 64, (16, 32), dtype=torch.bfloat16, bits=[(2,)], pattern="one")
    calls[1].bank.clear(3)
    first, second = together(triton, calls)
    assert first.isfinite().all()
    assert second.isnan().all()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("rank", [0, 16])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_gpu_a_captured_graph_follows_new_slots(bits, rank, triton):
    calls = family(16, 1024, (2048, 512, 512), dtype=torch.bfloat16, bits=[(bits,)], rank=[(rank,)])
    wanted, slots = calls[0].slot_of_token, torch.full_like(calls[0].slot_of_token, -1)
    operands = [(call.weight, call.bias, call.bank.tensors) for call in calls]

    def step():
        return triton.expert_linears(calls[0].x, operands, slots, group_tokens(slots, SLOTS))

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    slots.copy_(wanted)
    graph.replay()
    torch.cuda.synchronize()
    for y, call in zip(results, calls, strict=True):
        assert relative_error(y, call.truth()) < ERROR_BOUND[torch.bfloat16]
