"""`expert_linear` against the truth: every backend that runs here, every bit width, any mixture of slots."""

import itertools

import pytest
import torch

from meswitch_kernels import ExpertBank, available_backends, expert_linear, group_tokens
from meswitch_kernels.testing import ERROR_BOUND, SLOT_PATTERNS, random_call, random_expert, relative_error

BACKENDS = ["naive", "cpu"]
DTYPES = [torch.float32, torch.bfloat16]


def backends_here():
    reasons = available_backends()
    return [
        pytest.param(name, marks=pytest.mark.skipif(bool(reasons[name]), reason=str(reasons[name])))
        for name in BACKENDS
    ]


@pytest.fixture(params=backends_here())
def backend(request):
    return request.param


def check(call, backend, groups=None):
    y = expert_linear(call.x, call.weight, call.bias, call.bank, call.slot_of_token, groups, backend)
    assert y.dtype == call.x.dtype
    assert y.shape == (len(call.x), call.bank.out_features)
    assert relative_error(y, call.truth()) < ERROR_BOUND[call.x.dtype]
    return y


def test_naive_equals_a_dense_model_per_token():
    call = random_call(
        9, 40, 12, bits=(1, 2, 4), group_size=32, channel_scale=True, bias=True, dtype=torch.float32
    )
    y = call.truth()
    for t, slot in enumerate(call.slot_of_token.tolist()):
        weight, bias = call.weight.double(), call.bias.double()
        if slot >= 0:
            weight = weight + call.bank.dequantize(slot, torch.float64)
            bias = bias + call.bank.tensors.bias_delta[slot]
        torch.testing.assert_close(y[t], weight @ call.x[t].double() + bias, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("group_size", [0, 32, 96])
@pytest.mark.parametrize("scale", [False, True], ids=["", "scale"])
@pytest.mark.parametrize("k", [0, 1, 8])
def test_every_format(backend, dtype, bits, group_size, scale, k):
    """All formats crossed with all batch sizes, at a shape that is a multiple of nothing."""
    for tokens, pattern in itertools.product([1, 2, 15, 16, 17, 300], ["mixed"]):
        call = random_call(
            tokens, 200, 37, bits=bits, group_size=group_size, k=k, channel_scale=scale,
            bias=k == 1, pattern=pattern, dtype=dtype, seed=tokens,
        )  # fmt: skip
        check(call, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 300])
@pytest.mark.parametrize("pattern", SLOT_PATTERNS)
@pytest.mark.parametrize("bits", [1, 2, 4, (1, 2, 4)], ids=str)
def test_every_mixture(backend, dtype, tokens, pattern, bits):
    call = random_call(
        tokens, 200, 37, bits=bits, pattern=pattern, channel_scale=True, bias=True, dtype=dtype, seed=7
    )
    check(call, backend, group_tokens(call.slot_of_token, call.bank.slots))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(576, 192), (1536, 576), (4096, 67), (14336, 33), (31, 3), (33, 1), (1, 5)], ids=str
)
@pytest.mark.parametrize("tokens", [1, 8, 40])
def test_every_shape(backend, dtype, shape, tokens):
    call = random_call(tokens, *shape, bits=(2, 1, 4), k=min(8, shape[0]), dtype=dtype)
    check(call, backend)


def test_slots_of_other_settings_are_served_together(backend):
    """One bank: widths, groups and salient channels all differ from slot to slot."""
    call = random_call(11, 160, 24, bits=4, group_size=32, k=8, slots=4, dtype=torch.float32)
    for slot, (bits, group, k) in enumerate([(4, 32, 8), (2, 64, 3), (1, 0, 0), (2, 96, 1)]):
        random_expert(slot, 160, 24, bits, group, k, channel_scale=slot == 1, bias=slot == 2).load_into(
            call.bank, slot
        )
    check(call, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_batch(backend, dtype):
    assert check(random_call(0, 64, 10, dtype=dtype), backend).shape == (0, 10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [3, 40])
def test_non_contiguous_operands(backend, dtype, tokens):
    call = random_call(tokens, 96, 20, dtype=dtype)
    wide = torch.full((tokens, 200), torch.nan, dtype=dtype)
    wide[:, 50:146] = call.x
    check(call.with_tokens(wide[:, 50:146], call.slot_of_token), backend)
    check(call.with_tokens(call.x.T.contiguous().T, call.slot_of_token), backend)
    transposed = type(call)(call.x, call.weight.T.contiguous().T, call.bias, call.bank, call.slot_of_token)
    check(transposed, backend)


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_the_whole_output_is_written(backend, tokens, monkeypatch):
    """Fresh memory is NaN, so that an element nobody writes shows."""
    monkeypatch.setattr(torch, "empty", lambda *size, **kw: torch.full(*_size(size), float("nan"), **kw))
    check(random_call(tokens, 100, 33), backend)
    check(random_call(tokens, 100, 33, dtype=torch.float32, pattern="base"), backend)


def _size(size):
    return (size[0] if len(size) == 1 and not isinstance(size[0], int) else size,)


def test_the_base_slot_gets_exactly_what_a_batch_of_base_tokens_gets(backend):
    """Experts beside it in the batch do not move a base token, nor does the order of the batch."""
    call = random_call(6, 128, 40, pattern="mixed", dtype=torch.float32)
    y = check(call, backend)
    reverse = call.with_tokens(call.x.flip(0), call.slot_of_token.flip(0))
    torch.testing.assert_close(check(reverse, backend).flip(0), y, rtol=1e-5, atol=1e-6)


def test_padding_of_salient_channels_adds_nothing(backend):
    """Channel 0 pads `salient_index`; an infinity there must not reach a slot with fewer channels."""
    call = random_call(3, 64, 16, k=0, pattern="one", dtype=torch.float32)
    bank = ExpertBank(4, 64, 16, 2, max_salient=8, dtype=torch.float32)
    random_expert(1, 64, 16, k=2).load_into(bank, 3)
    check(type(call)(call.x, call.weight, None, bank, call.slot_of_token), backend)


@pytest.mark.parametrize("tokens", [1, 40])
def test_twice_gives_the_same_bytes(backend, tokens):
    call = random_call(tokens, 576, 192, bits=(1, 2, 4))
    arguments = (call.x, call.weight, call.bias, call.bank, call.slot_of_token)
    first, second = (expert_linear(*arguments, backend=backend) for _ in range(2))
    assert torch.equal(first, second)


def bad_calls():
    call = random_call(3, 64, 16, bias=True)
    good = {
        "x": call.x,
        "weight": call.weight,
        "bias": call.bias,
        "bank": call.bank,
        "slot_of_token": call.slot_of_token,
    }
    slots = call.slot_of_token
    cases = {
        "x width": ({"x": call.x[:, :32]}, ValueError, "in_features 64"),
        "x rank": ({"x": call.x[None]}, ValueError, "tokens"),
        "x integer": ({"x": call.x.int()}, TypeError, "floating"),
        "weight shape": ({"weight": call.weight.T}, ValueError, "weight"),
        "weight dtype": ({"weight": call.weight.float()}, TypeError, "weight is torch.float32"),
        "weight device": ({"weight": call.weight.to("meta")}, ValueError, "meta"),
        "bias shape": ({"bias": call.bias[:3]}, ValueError, "bias"),
        "bias dtype": ({"bias": call.bias.float()}, TypeError, "bias"),
        "x device": ({"x": call.x.to("meta")}, ValueError, "meta"),
        "slots too long": ({"slot_of_token": torch.zeros(4, dtype=torch.int32)}, ValueError, "4 entries for 3"),
        "slots dtype": ({"slot_of_token": slots.long()}, TypeError, "int64"),
        "slots rank": ({"slot_of_token": slots[None]}, ValueError, "slot_of_token"),
        "slot too large": ({"slot_of_token": torch.full_like(slots, 4)}, IndexError, "holds 4"),
        "slot too small": ({"slot_of_token": torch.full_like(slots, -2)}, IndexError, "holds -2"),
        "groups of another batch": (
            {"groups": group_tokens(torch.zeros(4, dtype=torch.int32), 4)}, ValueError, "4 tokens"
        ),
        "groups of another bank": ({"groups": group_tokens(slots, 9)}, ValueError, "9 slots"),
        "no such backend": ({"backend": "cuda"}, ValueError, "naive, cpu, triton"),
    }  # fmt: skip
    return good, cases


GOOD, BAD_CALLS = bad_calls()


@pytest.mark.parametrize("case", BAD_CALLS)
def test_a_bad_call_is_refused_before_any_kernel_runs(case):
    changes, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=message):
        expert_linear(**{**GOOD, **changes})


def test_an_empty_slot_is_refused():
    call = random_call(2, 64, 16, pattern="one")
    call.bank.clear(3)
    with pytest.raises(ValueError, match="holds 3, which is empty"):
        expert_linear(call.x, call.weight, None, call.bank, call.slot_of_token)
