"""Messages of trellis codes, decoded by the kernels themselves."""

import pytest
import torch

from meswitch_cli.delta.codes import TRELLIS_CODES, unpack
from meswitch_cli.delta.trellis import decode
from meswitch_kernels import Capacity, ExpertBank, expert_embedding, group_tokens
from meswitch_kernels.messages import MESSAGES, decode_message, find_message, row_words
from meswitch_kernels.testing import ERROR_BOUND, random_call, random_expert, relative_error, slots_for

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NUMBERS = tuple(MESSAGES)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("code", TRELLIS_CODES.values(), ids=lambda code: str(code.bits))
@pytest.mark.parametrize("width", [31, 256, 700])
def test_messages_are_the_codes_that_artifacts_store(code, width):
    message = find_message(code.channels_a_bit, code.taps)
    assert message is not None and message.width == code.width and message.memory == code.memory
    words = random_words(5, row_words(width, message.number))
    assert words.shape[1] == code.words(width)
    assert torch.equal(decode_message(words, message, width), unpack(decode(words, code, width), code.width, width))
    assert find_message(code.channels_a_bit, (*code.taps[:-1], 1)) is None


def random_words(*shape):
    return torch.randint(-(2**31), 2**31, shape, generator=torch.Generator().manual_seed(7)).to(torch.int32)


def answer(ops, call):
    groups = group_tokens(call.slot_of_token, call.bank.slots)
    return ops.expert_linear(call.x, call.weight, call.bias, call.bank.tensors, call.slot_of_token, groups)


# Widths below, at and beyond a block of words of some codes and not of others, in one row a tail of one channel.
SHAPES = [(31, 3), (256, 40), (200, 37), (513, 33), (1024, 66), (2080, 35)]


@pytest.mark.parametrize("case", range(12))
def test_each_message_and_any_mixture_with_scalar_codes(case, triton):
    bits = [*NUMBERS, (NUMBERS[1], 2), (*NUMBERS, 4, 1)][case % 6]
    width, out_features = SHAPES[(case + case // 6) % 6]
    call = random_call(
        [3, 13, 40][case % 3],
        width,
        out_features,
        bits=bits,
        slots=6,
        k=[8, 0][case % 2],
        channel_scale=case // 2 % 2 == 0,
        bias=case // 3 % 2 == 0,
        rank=[0, 5, (20, 0)][(case + case // 3) % 3],
        dtype=DTYPES[case // 4 % 3] if case % 4 else torch.bfloat16,
        device=DEVICE,
        planes=True,
        seed=case,
    )
    assert relative_error(answer(triton, call), call.truth()) < ERROR_BOUND[call.x.dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bank_of_groups_holds_messages_too(dtype, triton):
    call = random_call(
        9, 320, 40, bits=(NUMBERS[1], 4, NUMBERS[3]), group_size=64, slots=3, dtype=dtype, device=DEVICE, planes=True
    )
    assert relative_error(answer(triton, call), call.truth()) < ERROR_BOUND[dtype]


def test_launches_of_a_mixed_bank_share_tickets(triton):
    """One product of three launches leaves none behind: the next one, and another batch's, come out as before."""
    call = random_call(7, 256, 70, bits=(NUMBERS[1], 2, NUMBERS[3], 1), pattern="different", device=DEVICE, planes=True)
    first = answer(triton, call)
    assert not call.bank.tensors.tickets.any()
    of_one_kind = call.with_tokens(call.x, torch.full_like(call.slot_of_token, 2))
    assert relative_error(answer(triton, of_one_kind), of_one_kind.truth()) < ERROR_BOUND[call.x.dtype]
    assert torch.equal(answer(triton, call), first)
    call.bank.clear(2)
    slots = torch.tensor([0, 2, -1, 1, 3, 0, 0], dtype=torch.int32, device=DEVICE)
    groups = triton.group_tokens(slots, call.bank.slots)
    y = triton.expert_linear(call.x, call.weight, None, call.bank.tensors, slots, groups)
    assert y[1].isnan().all() and not y[[0, 2, 3, 4, 5, 6]].isnan().any()


@pytest.mark.parametrize("splits", [1, 3])
def test_blocks_of_messages_are_shared_among_programs(splits, triton, monkeypatch):
    from meswitch_kernels import triton_launch
    from meswitch_kernels.tuning import LaunchSettings

    monkeypatch.setattr(triton_launch, "launch_settings", lambda *_: LaunchSettings(32, 32, 1, 2, 2, splits, 2))
    call = random_call(6, 2600, 33, bits=(NUMBERS[1], NUMBERS[2]), pattern="different", device=DEVICE, planes=True)
    assert relative_error(answer(triton, call), call.truth()) < ERROR_BOUND[call.x.dtype]


def test_what_codes_are_set_into_comes_off_again(triton):
    call = random_call(5, 2048, 33, bits=NUMBERS, pattern="different", device=DEVICE, planes=True)
    call = call.with_tokens(call.x + 3, call.slot_of_token)
    base = torch.nn.functional.linear(call.x.double(), call.weight.double()).cpu()
    wrong = (answer(triton, call).double().cpu() - call.truth()).norm()
    assert float(wrong / (call.truth() - base).norm()) < 2 * ERROR_BOUND[call.x.dtype]


@pytest.mark.parametrize("case", range(6))
def test_messages_are_merged(case, triton, monkeypatch):
    width, out_features = [(31, 3), (256, 9), (200, 5), (1056, 4), (1024, 3), (96, 33)][case]
    monkeypatch.setattr(triton, "merge_tokens", lambda device: 5)
    runs = [(0, 6), (1, 5), (-1, 2), (2, 7)]
    slots = torch.tensor([slot for slot, length in runs for _ in range(length)], dtype=torch.int32, device=DEVICE)
    call = random_call(
        20,
        width,
        out_features,
        bits=[NUMBERS, (2, NUMBERS[1]), (NUMBERS[3], 1, NUMBERS[2])][case % 3],
        k=[8, 3][case % 2],
        rank=[0, 5][case // 2 % 2],
        channel_scale=case % 2 == 0,
        group_size=[0, 0, 64][case % 3],
        dtype=DTYPES[case % 3],
        device=DEVICE,
        planes=True,
    ).with_tokens(torch.randn(20, width, device=DEVICE, dtype=DTYPES[case % 3]), slots)
    groups = triton.group_tokens(slots, call.bank.slots, runs)
    assert [slot for slot, _ in groups.plan.merged] == [0, 1, 2]
    y = triton.expert_linear(call.x, call.weight, None, call.bank.tensors, slots, groups)
    assert relative_error(y, call.truth()) < ERROR_BOUND[call.x.dtype]


@pytest.mark.parametrize("bits", [NUMBERS, (2, NUMBERS[1])], ids=["messages", "mixed"])
def test_embedding_rows(bits, triton):
    call = random_call(1, 700, 50, bits=bits, device=DEVICE, planes=True)
    ids = torch.arange(0, 50, 3, device=DEVICE)
    slots = slots_for("mixed", len(ids), call.bank.slots).to(DEVICE)
    rows = expert_embedding(ids, call.weight, call.bank, slots, "triton")
    expected = expert_embedding(ids.cpu(), call.weight.cpu().double(), call.bank, slots.cpu(), "naive")
    assert relative_error(rows, expected) < ERROR_BOUND[call.x.dtype]


def test_an_expert_without_codes_beside_messages(triton):
    """Its slot has as many words as a message: none of those behind them may be read."""
    call = random_call(4, 2048, 40, bits=NUMBERS[1], pattern="different", device=DEVICE, planes=True)
    call.bank.load(3, random_expert(5, 2048, 40, bits=0))
    assert call.bank.tensors.slot_bits.tolist() == [NUMBERS[1]] * 4
    assert relative_error(answer(triton, call), call.truth()) < ERROR_BOUND[call.x.dtype]


def test_a_quarter_bit_takes_a_quarter_of_the_memory():
    banks = [
        ExpertBank(4, 4096, 64, capacity, planes=True)
        for capacity in (Capacity(bits=1), Capacity(messages=(NUMBERS[1],)), Capacity(messages=(NUMBERS[0],)))
    ]
    assert [bank.tensors.codes.nbytes * 8 / (4 * 4096 * 64) for bank in banks] == [1, 0.25, 0.125]


@pytest.mark.parametrize(
    ("expert", "message"),
    [
        (lambda: random_expert(0, 256, 8, NUMBERS[0]), "message 24 does not fit"),
        (lambda: random_expert(0, 256, 8, 2), "bits 2 does not fit a bank of 0"),
    ],
    ids=["another-rate", "scalar"],
)
def test_what_a_bank_has_no_room_for_is_refused(expert, message):
    bank = ExpertBank(1, 256, 8, Capacity(messages=(NUMBERS[1],), salient=8), planes=True)
    with pytest.raises(ValueError, match=message):
        bank.load(0, expert())


def test_the_cpu_kernels_refuse_messages():
    pytest.importorskip("numba")
    from meswitch_kernels import cpu

    call = random_call(2, 256, 8, bits=NUMBERS[1], planes=True)
    with pytest.raises(ValueError, match="reads no messages"):
        cpu.expert_linear(call.x, call.weight, None, call.bank.tensors, call.slot_of_token)
