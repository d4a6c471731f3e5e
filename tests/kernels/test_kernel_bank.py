from dataclasses import replace

import pytest
import torch

from meswitch_kernels import Capacity, ExpertBank
from meswitch_kernels.packing import unpack_codes
from meswitch_kernels.testing import random_expert

IN, OUT = 100, 6


def dense(expert):
    """The delta by the definition, one element at a time."""
    codes = unpack_codes(expert.codes, expert.bits, IN)
    delta = torch.zeros(OUT, IN)
    for o in range(OUT):
        for i in range(IN):
            step = expert.steps[o, i // expert.group_size if expert.group_size else 0].float()
            scale = 1.0 if expert.channel_scale is None else expert.channel_scale[i].float()
            delta[o, i] = (codes[o, i].float() - (2**expert.bits - 1) / 2) * step * scale
        for j, i in enumerate(expert.salient_index.tolist()):
            delta[o, i] += expert.salient_value[o, j].float()
        if expert.left is not None:
            for left, right in zip(expert.left[o].float(), expert.right.float(), strict=True):
                delta[o] += left * right
    return delta


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("group_size", [0, 32, 64])
@pytest.mark.parametrize("k", [0, 1, 8])
@pytest.mark.parametrize("scale", [False, True])
def test_dequantize_follows_the_definition(bits, group_size, k, scale):
    expert = random_expert(1, IN, OUT, bits, group_size, k, channel_scale=scale)
    for planes in (False, True):
        capacity = Capacity(bits=4, group_size=32, salient=8, channel_scale=scale)
        bank = ExpertBank(2, IN, OUT, capacity, planes=planes)
        bank.load(1, expert)
        torch.testing.assert_close(bank.dequantize(1), dense(expert), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rank", [1, 5, 8])
@pytest.mark.parametrize("k", [0, 8])
def test_the_low_rank_part_is_added(rank, k):
    bank = ExpertBank(2, IN, OUT, Capacity(bits=2, salient=8, rank=8))
    expert = random_expert(1, IN, OUT, k=k, rank=rank)
    bank.load(1, expert)
    expected = dense(expert)
    torch.testing.assert_close(bank.dequantize(1), expected, rtol=1e-5, atol=1e-6)
    rows = torch.tensor([4, 0, 4])
    torch.testing.assert_close(bank.dequantize_rows(1, rows), expected[rows], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank", [0, 3])
def test_reloading_a_slot_leaves_nothing_of_the_expert_before(rank):
    first = random_expert(1, IN, OUT, 4, 32, 8, channel_scale=True, bias=True, rank=8)
    second = random_expert(2, IN, OUT, 1, 0, 1, rank=rank)
    capacity = Capacity(bits=4, group_size=32, salient=8, rank=8, channel_scale=True)
    used, fresh = (ExpertBank(1, IN, OUT, capacity) for _ in range(2))
    used.load(0, first)
    used.load(0, second)
    fresh.load(0, second)
    assert torch.equal(used.dequantize(0), fresh.dequantize(0))
    for name in ("bias_delta", "left", "right", "slot_rank"):
        assert torch.equal(getattr(used.tensors, name), getattr(fresh.tensors, name))


def test_loading_one_slot_leaves_the_others_alone():
    bank = ExpertBank(3, IN, OUT, Capacity(bits=2, salient=8))
    bank.load(0, random_expert(1, IN, OUT))
    before = bank.dequantize(0)
    bank.load(1, random_expert(2, IN, OUT))
    bank.clear(1)
    assert torch.equal(bank.dequantize(0), before)
    with pytest.raises(ValueError, match="empty"):
        bank.check_slots(torch.tensor([1]))
    with pytest.raises(ValueError, match="slot 1 is empty"):
        bank.dequantize(1)


def test_nbytes_counts_every_byte_and_does_not_move_with_loading():
    capacity = Capacity(bits=2, group_size=32, salient=4)
    bank = ExpertBank(3, IN, OUT, capacity)
    words, groups = 7, 4
    per_slot = OUT * words * 4 + OUT * groups * 4 + 4 * 4 + OUT * 4 * 2 + IN * 2 + OUT * 4 + 3 * 4
    tickets = 4
    assert bank.nbytes == ExpertBank(3, IN, OUT, capacity, device="meta").nbytes == 3 * per_slot + tickets
    ranked = ExpertBank(3, IN, OUT, replace(capacity, rank=5))
    assert ranked.nbytes == 3 * (per_slot + 5 * (IN + OUT) * 2 + 4) + tickets
    bank.load(0, random_expert(1, IN, OUT, k=4))
    assert bank.nbytes == 3 * per_slot + tickets


def test_a_float32_bank_holds_both_16_bit_types_exactly():
    bank = ExpertBank(1, IN, OUT, Capacity(bits=2, salient=8), torch.float32)
    expert = random_expert(3, IN, OUT)
    value = torch.rand(OUT, 8).half()
    bank.load(0, replace(expert, salient_value=value))
    assert torch.equal(bank.tensors.salient_value[0].half(), value)


def load(bank, slot=0, **changes):
    bank.load(slot, replace(random_expert(1, IN, OUT), **changes))


BAD_LOADS = {
    "slot": ({"slot": 2}, IndexError, "slot 2"),
    "negative slot": ({"slot": -1}, IndexError, "slot -1"),
    "codes shape": ({"codes": torch.zeros(OUT, 6, dtype=torch.int32)}, ValueError, "codes"),
    "codes dtype": ({"codes": torch.zeros(OUT, 7, dtype=torch.int64)}, TypeError, "codes"),
    "too wide": ({"bits": 4}, ValueError, "bits 4"),
    "no such width": ({"bits": 3}, ValueError, "bits"),
    "steps shape": ({"steps": torch.zeros(OUT, 3)}, ValueError, "steps"),
    "steps dtype": ({"steps": torch.zeros(OUT, 1, dtype=torch.float64)}, TypeError, "steps"),
    "finer groups": ({"group_size": 32}, ValueError, "group"),
    "odd groups": ({"group_size": 48}, ValueError, "multiple of 32"),
    "k too large": (
        {"salient_index": torch.arange(9, dtype=torch.int32), "salient_value": torch.zeros(OUT, 9).half()},
        ValueError,
        "salient 9 does not fit a bank of 8",
    ),
    "index outside": ({"salient_index": torch.full((8,), IN, dtype=torch.int32)}, IndexError, "100 input"),
    "index dtype": ({"salient_index": torch.arange(8)}, TypeError, "salient_index"),
    "value shape": ({"salient_value": torch.zeros(OUT, 7).half()}, ValueError, "salient_value"),
    "value without index": ({"salient_index": None}, ValueError, "together"),
    "scale shape": ({"channel_scale": torch.ones(IN - 1).half()}, ValueError, "channel_scale"),
    "scale dtype": ({"channel_scale": torch.ones(IN)}, TypeError, "channel_scale"),
    "bias shape": ({"bias_delta": torch.ones(OUT + 1)}, ValueError, "bias_delta"),
    "added rows": ({"added_rows": torch.ones(1, IN)}, ValueError, "added_rows"),
    "left without right": ({"left": torch.ones(OUT, 2)}, ValueError, "together"),
    "right without left": ({"right": torch.ones(2, IN)}, ValueError, "together"),
    "rank too large": (
        {"left": torch.ones(OUT, 5), "right": torch.ones(5, IN)},
        ValueError,
        "rank 5 does not fit a bank of 4",
    ),
    "ranks differ": ({"left": torch.ones(OUT, 2), "right": torch.ones(3, IN)}, ValueError, "right"),
    "left shape": ({"left": torch.ones(OUT + 1, 2), "right": torch.ones(2, IN)}, ValueError, "left"),
    "left rank": ({"left": torch.ones(4), "right": torch.ones(4, IN)}, ValueError, "left"),
    "right shape": ({"left": torch.ones(OUT, 2), "right": torch.ones(2, IN - 1)}, ValueError, "right"),
    "left dtype": ({"left": torch.ones(OUT, 2, dtype=torch.int32), "right": torch.ones(2, IN)}, TypeError, "left"),
    "right dtype": ({"left": torch.ones(OUT, 2), "right": torch.ones(2, IN).double()}, TypeError, "right"),
}


@pytest.mark.parametrize("case", BAD_LOADS)
def test_a_bad_load_is_refused_and_changes_nothing(case):
    changes, error, message = BAD_LOADS[case]
    bank = ExpertBank(2, IN, OUT, Capacity(bits=2, salient=8, rank=4, channel_scale=True))
    bank.load(0, random_expert(5, IN, OUT, rank=3))
    before = bank.dequantize(0)
    with pytest.raises(error, match=message):
        load(bank, **changes)
    assert torch.equal(bank.dequantize(0), before)


def test_channel_scales_need_a_bank_that_reads_them():
    bank = ExpertBank(1, IN, OUT, Capacity(bits=2, salient=8))
    with pytest.raises(ValueError, match="without channel scales"):
        load(bank, channel_scale=torch.ones(IN).half())


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"slots": 0}, ValueError),
        ({"bits": 3}, ValueError),
        ({"group_size": 48}, ValueError),
        ({"salient": -1}, ValueError),
        ({"salient": IN + 1}, ValueError),
        ({"dtype": torch.float64}, TypeError),
        ({"added_rows": -1}, ValueError),
        ({"rank": -1}, ValueError),
    ],
)
def test_bad_settings_are_refused(arguments, error):
    settings = {"slots": 1, "in_features": IN, "out_features": OUT}
    with pytest.raises(error):
        own = {name: value for name, value in arguments.items() if name in ("slots", "dtype")}
        capacity = Capacity(**{"bits": 2} | {name: value for name, value in arguments.items() if name not in own})
        ExpertBank(**settings | own, capacity=capacity)
