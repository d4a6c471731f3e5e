"""Decode attention over a paged cache, each backend against plain PyTorch in float64."""

import itertools

import pytest
import torch

from meswitch_kernels.dispatch import available_backends, backend_module
from meswitch_kernels.testing import relative_error

ERROR_BOUND = {torch.float32: 2e-6, torch.bfloat16: 4e-3}
SHAPES = [(9, 3, 64), (4, 4, 24), (8, 1, 20), (2, 2, 256), (6, 3, 8)]
LENGTHS = [(1,), (5, 1, 33, 200, 17), (1, 1, 1), tuple(range(1, 33))]
BACKENDS = ["naive", pytest.param("cpu", marks=pytest.mark.skipif(bool(available_backends()["cpu"]), reason="numba"))]


def make(heads, key_heads, width, lengths, dtype, *, ring=False, seed=0):
    """Arguments over a cache whose rows are scattered; unused rows are NaN, and a ring's own entry points to one."""
    rng = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=rng).to(dtype)

    total, requests = sum(lengths), len(lengths)
    # Keys and values lie between one another, as in transformers' cache.
    cache = torch.full((2 * total + 8, 2, key_heads, width), torch.nan, dtype=dtype)
    rows = torch.randperm(2 * total, generator=rng)[:total] + 2
    for begin, end in itertools.pairwise(itertools.accumulate(lengths, initial=0)):
        cache[rows[begin : end - 1]] = random(end - 1 - begin, 2, key_heads, width)
    ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    last = ends[1:].long() - 1
    writes = rows[last].clone()
    if ring:
        rows[last] = 1
    query = random(1, requests, heads, width).transpose(1, 2)[0]
    return {
        "query": query,
        "key": random(key_heads, requests, width),
        "value": random(1, requests, key_heads, width).transpose(1, 2)[0],
        "key_cache": cache[:, 0],
        "value_cache": cache[:, 1],
        "rows": rows,
        "ends": ends,
        "writes": writes,
        "longest": max(lengths),
    }


def cloned(call):
    return {name: item.clone() if isinstance(item, torch.Tensor) else item for name, item in call.items()}


def truth(call, **options):
    wide = {
        name: item.double() if isinstance(item, torch.Tensor) and item.is_floating_point() else item
        for name, item in cloned(call).items()
    }
    return backend_module("naive").decode_attention(**wide, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ERROR_BOUND, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: f"{len(lengths)} requests, {max(lengths)} keys")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_backend_attends_like_the_truth(shape, lengths, dtype, backend):
    call = make(*shape, lengths, dtype)
    y = backend_module(backend).decode_attention(**call, scale=shape[2] ** -0.5)
    assert y.shape == (len(lengths), shape[0], shape[2])
    assert relative_error(y, truth(call, scale=shape[2] ** -0.5)) < ERROR_BOUND[dtype]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ERROR_BOUND, ids=str)
def test_scores_are_capped(dtype, backend):
    call = make(4, 2, 32, (7, 40), dtype)
    y = backend_module(backend).decode_attention(**call, scale=0.7, softcap=2.0)
    expected = truth(call, scale=0.7, softcap=2.0)
    assert relative_error(y, expected) < 2 * ERROR_BOUND[dtype]
    assert relative_error(truth(call, scale=0.7), expected) > 0.01


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_new_tokens_are_in_the_cache_afterwards_and_nothing_else_is(backend):
    call = make(4, 2, 24, (3, 1, 9), torch.bfloat16)
    before = (call["key_cache"].clone(), call["value_cache"].clone())
    backend_module(backend).decode_attention(**call, scale=0.2)
    for cache, old, new in zip(("key_cache", "value_cache"), before, ("key", "value"), strict=True):
        old[call["writes"]] = call[new].transpose(0, 1)
        torch.testing.assert_close(call[cache], old, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rings_own_entry_is_not_read(backend):
    call, ring = (make(4, 2, 24, (3, 1, 9), torch.float32, ring=ring) for ring in (False, True))
    y, z = (backend_module(backend).decode_attention(**item, scale=0.2) for item in (call, ring))
    torch.testing.assert_close(y, z, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_requests_without_a_past_need_no_rows(backend):
    call = make(4, 2, 24, (1, 1), torch.float32)
    call["rows"] = call["rows"][:0]
    y = backend_module(backend).decode_attention(**call, scale=0.2)
    torch.testing.assert_close(y, call["value"].transpose(0, 1).repeat_interleave(2, 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_mates_do_not_matter(backend):
    call = make(4, 2, 24, (3, 30, 9), torch.bfloat16)
    alone = {
        **call,
        **{name: call[name][:, 1:2] for name in ("query", "key", "value")},
        "rows": call["rows"][3:33],
        "ends": torch.tensor([0, 30], dtype=torch.int32),
        "writes": call["writes"][1:2],
        "longest": 30,
    }
    together, one = (backend_module(backend).decode_attention(**item, scale=0.2) for item in (call, alone))
    torch.testing.assert_close(together[1:2], one, rtol=0, atol=0)
