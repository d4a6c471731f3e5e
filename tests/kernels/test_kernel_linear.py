"""`expert_linear` against the truth: every backend that runs here, every bit width, any mixture of slots."""

import os
import subprocess
import sys

import pytest
import torch

from meswitch_kernels import Capacity, ExpertBank, available_backends, expert_linear, group_tokens
from meswitch_kernels.testing import ERROR_BOUND, SLOT_PATTERNS, random_call, random_expert, relative_error

from .conftest import check, device_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS = [1, 2, 15, 16, 17, 300]
DTYPES = {"naive": [torch.float32], "cpu": [torch.float32, torch.bfloat16]}
SHAPES = [(576, 192), (1536, 576), (4096, 67), (14336, 33), (31, 3), (33, 1), (1, 5)]
WIDTHS = [1, 2, 4, (1, 2, 4)]


def skip_if_unavailable(name):
    if reason := available_backends()[name]:
        pytest.skip(reason)


@pytest.fixture(params=[(name, dtype) for name in DTYPES for dtype in DTYPES[name]], ids=str)
def backend_and_dtype(request):
    """The backends that are quick enough here for full cross products."""
    skip_if_unavailable(request.param[0])
    return request.param


def test_naive_equals_a_dense_model_per_token():
    call = random_call(
        9, 40, 12, bits=(1, 2, 4), group_size=32, channel_scale=True, bias=True, dtype=torch.float32, rank=(5, 0, 8)
    )
    y = call.truth()
    for t, slot in enumerate(call.slot_of_token.tolist()):
        weight, bias = call.weight.double(), call.bias.double()
        if slot >= 0:
            weight = weight + call.bank.dequantize(slot, torch.float64)
            bias = bias + call.bank.tensors.bias_delta[slot]
        torch.testing.assert_close(y[t], weight @ call.x[t].double() + bias, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("group_size", [0, 32, 96])
@pytest.mark.parametrize("scale", [False, True], ids=["", "scale"])
@pytest.mark.parametrize("k", [0, 1, 8])
def test_every_format(backend_and_dtype, bits, group_size, scale, k):
    """All formats crossed with all batch sizes, at a shape that is a multiple of nothing."""
    backend, dtype = backend_and_dtype
    for tokens in TOKENS:
        call = random_call(
            tokens, 200, 37, bits=bits, group_size=group_size, k=k, channel_scale=scale, bias=k == 1,
            dtype=dtype, seed=tokens,
        )  # fmt: skip
        check(call, backend)


@pytest.mark.parametrize("pattern", SLOT_PATTERNS)
@pytest.mark.parametrize("bits", WIDTHS, ids=str)
def test_every_mixture(backend_and_dtype, pattern, bits):
    backend, dtype = backend_and_dtype
    for tokens in TOKENS:
        call = random_call(
            tokens, 200, 37, bits=bits, pattern=pattern, channel_scale=True, bias=True, dtype=dtype, seed=7
        )
        check(call, backend, group_tokens(call.slot_of_token, call.bank.slots))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 8, 40])
def test_every_shape(backend_and_dtype, shape, tokens):
    backend, dtype = backend_and_dtype
    check(random_call(tokens, *shape, bits=(2, 1, 4), k=min(8, shape[0]), dtype=dtype), backend)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("case", range(8))
def test_triton_covers_formats_mixtures_and_shapes(tokens, case):
    """A covering array, since an interpreted kernel is slow: steps prime to the lengths mix all settings."""
    skip_if_unavailable("triton")
    n = TOKENS.index(tokens) * 8 + case
    width, out_features = [(200, 37), (64, 70), (31, 3), (288, 66), (576, 65)][n % 5]
    call = random_call(
        tokens,
        width,
        out_features,
        bits=WIDTHS[(n + tokens) % 4],
        group_size=[0, 32, 96][n * 2 % 3],
        k=[0, 1, 8][(n // 3 + n) % 3],
        channel_scale=n % 2 == 0,
        bias=n // 2 % 2 == 0,
        pattern=SLOT_PATTERNS[n * 3 % 5],
        dtype=[torch.float32, torch.bfloat16, torch.float16][n * 7 % 3],
        device=DEVICE,
        seed=n,
    )
    check(call, "triton", group_tokens(call.slot_of_token, call.bank.slots) if n % 2 else None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("in_features", [31, 1000, 1024, 2100])
@pytest.mark.parametrize("group_size", [0, 64])
def test_codes_in_planes(dtype, in_features, group_size):
    """A bank as it lies on a GPU: whole blocks of words, a rest, both, and slots of every width."""
    skip_if_unavailable("triton")
    for tokens in (3, 17):
        call = random_call(
            tokens, in_features, 35, bits=(4, 2, 1), group_size=group_size, channel_scale=tokens == 17, dtype=dtype,
            device=DEVICE, planes=True,
        )  # fmt: skip
        check(call, "triton")
        check(call, "naive")


@pytest.mark.skipif(DEVICE == "cuda", reason="the cpu backend reads no bank on a GPU")
def test_the_cpu_backend_refuses_codes_in_planes():
    skip_if_unavailable("cpu")
    with pytest.raises(ValueError, match="planes"):
        check(random_call(3, 64, 16, planes=True), "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("tokens", [1, 17, 300, 1100])
@pytest.mark.parametrize("shape", [(576, 1536), (4096, 1024)], ids=str)
@pytest.mark.parametrize("bits", [2, (4, 2, 1)], ids=str)
@pytest.mark.parametrize("group_size", [0, 128])
def test_gpu_at_real_shapes(tokens, shape, bits, group_size):
    call = random_call(tokens, *shape, bits=bits, group_size=group_size, channel_scale=True, slots=8, device=DEVICE)
    check(call, "triton")


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("tokens", [8, 200])
def test_gpu_a_captured_graph_follows_new_slots(tokens):
    """Grouping and kernels are captured once; the slots written afterwards decide the answer."""
    call = random_call(tokens, 576, 192, device=DEVICE)
    x, slots = call.x.clone(), torch.full_like(call.slot_of_token, -1)

    def step():
        groups = group_tokens(slots, call.bank.slots)
        return expert_linear(x, call.weight, call.bias, call.bank, slots, groups)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    slots.copy_(call.slot_of_token)
    graph.replay()
    torch.cuda.synchronize()
    assert relative_error(y, call.truth()) < ERROR_BOUND[x.dtype]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_gpu_answers_a_bad_slot_with_nan():
    call = random_call(3, 64, 16, pattern="one", device=DEVICE)
    slots = torch.tensor([0, 4, -2], dtype=torch.int32, device=DEVICE)
    y = expert_linear(call.x, call.weight, None, call.bank, slots)
    assert torch.isfinite(y[0]).all()
    assert torch.isnan(y[1:]).all()


def test_slots_of_other_settings_are_served_together(backend):
    """One bank: widths, groups and salient channels all differ from slot to slot."""
    call = random_call(
        11, 160, 24, bits=4, group_size=32, k=8, channel_scale=True, slots=4, dtype=torch.float32,
        device=device_of(backend),
    )  # fmt: skip
    for slot, (bits, group, k) in enumerate([(4, 32, 8), (2, 64, 3), (1, 0, 0), (2, 96, 1)]):
        call.bank.load(slot, random_expert(slot, 160, 24, bits, group, k, channel_scale=slot == 1, bias=slot == 2))
    check(call, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_empty_batch(backend, dtype):
    assert check(random_call(0, 64, 10, dtype=dtype, device=device_of(backend)), backend).shape == (0, 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [3, 40])
def test_non_contiguous_operands(backend, dtype, tokens):
    call = random_call(tokens, 96, 20, dtype=dtype, device=device_of(backend))
    wide = torch.full((tokens, 200), torch.nan, dtype=dtype, device=device_of(backend))
    wide[:, 50:146] = call.x
    check(call.with_tokens(wide[:, 50:146], call.slot_of_token), backend)
    check(call.with_tokens(call.x.T.contiguous().T, call.slot_of_token), backend)
    transposed = type(call)(call.x, call.weight.T.contiguous().T, call.bias, call.bank, call.slot_of_token)
    check(transposed, backend)


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_the_whole_output_is_written(backend, tokens, monkeypatch):
    """Fresh memory is NaN, so that an element nobody writes shows."""

    def poisoned(*size, **settings):
        shape = size[0] if isinstance(size[0], tuple | torch.Size) else size
        fill = torch.nan if settings.get("dtype", torch.float32).is_floating_point else 0
        return torch.full(shape, fill, **settings)

    monkeypatch.setattr(torch, "empty", poisoned)

    def poisoned_like(x, *size, **settings):
        return poisoned(*size, **{"dtype": x.dtype, "device": x.device, **settings})

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned_like)
    check(random_call(tokens, 100, 33, device=device_of(backend)), backend)
    check(random_call(tokens, 100, 33, dtype=torch.float32, pattern="base", device=device_of(backend)), backend)


def test_the_base_slot_gets_exactly_what_a_batch_of_base_tokens_gets(backend):
    """Experts beside it in the batch do not move a base token, nor does the order of the batch."""
    call = random_call(6, 128, 40, pattern="mixed", dtype=torch.float32, device=device_of(backend))
    y = check(call, backend)
    reverse = call.with_tokens(call.x.flip(0), call.slot_of_token.flip(0))
    torch.testing.assert_close(check(reverse, backend).flip(0), y, rtol=1e-5, atol=1e-6)


def test_padding_of_salient_channels_adds_nothing(backend):
    """Channel 0 pads `salient_index`; an infinity there must not reach a slot with fewer channels."""
    call = random_call(3, 64, 16, k=0, pattern="one", dtype=torch.float32, device=device_of(backend))
    bank = ExpertBank(4, 64, 16, Capacity(bits=2, salient=8), torch.float32, device_of(backend))
    bank.load(3, random_expert(1, 64, 16, k=2))
    check(type(call)(call.x, call.weight, None, bank, call.slot_of_token), backend)


@pytest.mark.parametrize("tokens", [1, 40])
def test_twice_gives_the_same_bytes(backend, tokens):
    call = random_call(tokens, 576, 70, bits=(1, 2, 4), device=device_of(backend))
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


PORTABLE = """
import torch
from meswitch_kernels import cpu_vector, expert_linear
from meswitch_kernels.testing import ERROR_BOUND, random_call, relative_error
assert not cpu_vector.HAS_BF16
for dtype in (torch.float32, torch.bfloat16):
    for tokens in (1, 5, 20):
        for group_size in (0, 32):
            call = random_call(tokens, 200, 37, bits=(1, 2, 4), group_size=group_size, channel_scale=True, dtype=dtype)
            y = expert_linear(call.x, call.weight, None, call.bank, call.slot_of_token, backend="cpu")
            assert relative_error(y, call.truth()) < ERROR_BOUND[dtype], (dtype, tokens, group_size)
"""


@pytest.mark.parametrize("processor", ["generic", "haswell"])  # SSE2; AVX2
def test_a_machine_without_bf16_vectors_gets_the_same_answers(processor):
    """Numba told to forget what this processor can do takes the portable instructions."""
    skip_if_unavailable("cpu")
    environment = {**os.environ, "NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": ""}
    subprocess.run([sys.executable, "-c", PORTABLE], env=environment, check=True)


def test_threads_without_pytorchs_openmp(monkeypatch):
    skip_if_unavailable("cpu")
    from meswitch_kernels import cpu_threads

    monkeypatch.setattr(cpu_threads, "_parallel", lambda: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    check(random_call(5, 200, 300), "cpu")
    check(random_call(40, 200, 300), "cpu")


def test_an_empty_slot_is_refused():
    call = random_call(2, 64, 16, pattern="one")
    call.bank.clear(3)
    with pytest.raises(ValueError, match="holds 3, which is empty"):
        expert_linear(call.x, call.weight, None, call.bank, call.slot_of_token)
