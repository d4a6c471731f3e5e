"""How Triton's decode kernel shares its work: splits, tiles, and the last program that adds what the others left."""

import pytest
import torch

from meswitch_kernels import Capacity, ExpertBank, group_tokens
from meswitch_kernels.groups import tile_size_for
from meswitch_kernels.testing import ERROR_BOUND, random_call, random_expert, relative_error
from meswitch_kernels.tuning import Card, LaunchSettings, default_settings

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def ops(needs_triton):
    from meswitch_kernels import triton_ops

    return triton_ops


@pytest.fixture
def use(needs_triton, monkeypatch):
    """Launches decode by other settings."""
    from meswitch_kernels import triton_launch

    return lambda settings: monkeypatch.setattr(triton_launch, "launch_settings", lambda *_: settings)


def answer(ops, call, slots=None):
    slots = call.slot_of_token if slots is None else slots
    groups = group_tokens(call.slot_of_token, call.bank.slots)
    return ops.expert_linear(call.x, call.weight, call.bias, call.bank.tensors, slots, groups)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("delta_splits", [1, 3])
@pytest.mark.parametrize("delta_programs", [1, 2, 16])
def test_any_share_of_the_work_gives_the_same(ops, use, splits, delta_splits, delta_programs):
    """More splits than blocks of words, tiles handed on, programs without a tile; tickets are zero again after it."""
    use(LaunchSettings(32, 32, splits, 2, 2, delta_splits, delta_programs))
    call = random_call(
        13, 1100, 70, bits=(2, 1, 4), rank=(0, 3), channel_scale=True, bias=True, slots=6, device=DEVICE, planes=True
    )
    for _ in range(2):
        assert relative_error(answer(ops, call), call.truth()) < ERROR_BOUND[call.x.dtype]
        assert not call.bank.tensors.tickets.any()


def test_partial_sums_are_added_in_a_fixed_order(ops, use):
    use(LaunchSettings(32, 32, 4, 2, 2, 2, 2))
    call = random_call(9, 600, 40, device=DEVICE, planes=True)
    assert torch.equal(answer(ops, call), answer(ops, call))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [0, 3, 20, 260], ids=["none", "few", "wider tiles", "parts"])
def test_a_residual_is_added_to_what_is_rounded(ops, tokens, dtype):
    """As a decoder layer adds it: the very same numbers, in all ways that a batch can take."""
    call = random_call(tokens, 64, 48, bits=(2, 1), rank=(0, 3), bias=True, dtype=dtype, device=DEVICE, planes=True)
    residual = torch.randn(tokens, 48, generator=torch.Generator().manual_seed(2)).to(DEVICE, dtype)
    groups = ops.group_tokens(call.slot_of_token, call.bank.slots)
    given = call.x, call.weight, call.bias, call.bank.tensors, call.slot_of_token, groups
    assert torch.equal(ops.summed_linear(residual, *given), residual + ops.expert_linear(*given))


def test_a_residual_is_added_to_a_bank_without_codes(ops):
    bank = ExpertBank(2, 64, 48, Capacity(bits=0, rank=4), torch.float32, DEVICE, planes=True)
    x, weight, residual = (torch.randn(shape, device=DEVICE) for shape in ((3, 64), (48, 64), (3, 48)))
    slots = torch.tensor([-1, -1, -1], dtype=torch.int32, device=DEVICE)
    y = ops.summed_linear(residual, x, weight, None, bank.tensors, slots, ops.group_tokens(slots, 2))
    torch.testing.assert_close(y, residual + x @ weight.T)


@pytest.mark.parametrize("tokens", [3, 40])
def test_a_slot_that_cannot_be_served_gives_nan(ops, tokens):
    call = random_call(tokens, 64, 40, pattern="different", device=DEVICE, planes=True)
    call.bank.clear(2)
    y = answer(ops, call)
    empty = call.slot_of_token == 2
    assert torch.isnan(y[empty]).all()
    assert torch.isfinite(y[~empty]).all()


@pytest.mark.parametrize("held", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("k", [3, 20])
def test_salient_channels_of_another_type(ops, held, k):
    """More than a block of them, and none is rounded to the type of x."""
    call = random_call(5, 96, 33, device=DEVICE)
    bank = ExpertBank(4, 96, 33, Capacity(bits=2, salient=k), held, DEVICE, planes=True)
    for slot in range(4):
        bank.load(slot, random_expert(slot, 96, 33, k=k))
    call = type(call)(call.x, call.weight, None, bank, call.slot_of_token)
    assert relative_error(answer(ops, call), call.truth()) < ERROR_BOUND[call.x.dtype]


@pytest.mark.parametrize("mean", [0.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_codes_are_set_into_comes_off_again(ops, dtype, mean):
    """128 or 1024 beside every code: sums of an x that has a mean are large, and their difference is the answer."""
    call = random_call(5, 2048, 33, bits=(2, 1, 4), pattern="different", dtype=dtype, device=DEVICE, planes=True)
    call = call.with_tokens(call.x + mean, call.slot_of_token)
    base = torch.nn.functional.linear(call.x.double(), call.weight.double()).cpu()
    delta = call.truth() - base
    assert float((answer(ops, call).double().cpu() - call.truth()).norm() / delta.norm()) < 2 * ERROR_BOUND[dtype]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("tokens", [1, 8, 16, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gpu_one_launch_under_a_graph(ops, tokens, dtype):
    """Replayed often, with a grid that fills the card: whoever comes last must see what all have written."""
    call = random_call(tokens, 4096, 4096, bits=(2, 1), slots=16, dtype=dtype, device=DEVICE)
    answer(ops, call)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = answer(ops, call)
    graph.replay()
    expected = y.clone()
    assert relative_error(expected, call.truth()) < ERROR_BOUND[dtype]
    for _ in range(200):
        y.zero_()
        graph.replay()
        assert torch.equal(y, expected)


def test_tiles_grow_with_the_batch():
    assert [tile_size_for(tokens) for tokens in (1, 8, 16, 17, 64, 127, 128, 1024)] == [8, 8, 8, 16, 16, 16, 16, 16]


@pytest.mark.parametrize("shape", [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)], ids=str)
def test_a_large_card_has_programs_enough(shape):
    """Two for each processor of the base's, and one for each of the deltas even where one slot alone has tokens."""
    settings = default_settings(*shape, 16, Card("large", 132, True))
    blocks = shape[0] / settings.block_out
    assert blocks * settings.splits >= 2 * 132 or shape[1] < 8 * settings.block_k * settings.splits
    assert 1.1 * blocks * settings.delta_splits >= 132 or shape[1] < 2048 * settings.delta_splits
