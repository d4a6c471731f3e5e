"""Attention of single new tokens over pages, each backend against plain PyTorch in float64."""

import pytest
import torch

from meswitch_kernels.dispatch import available_backends, backend_module
from meswitch_kernels.testing import relative_error

ERROR_BOUND = {torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
SHAPES = [(9, 3, 64), (4, 4, 24), (8, 1, 96), (4, 2, 128), (2, 2, 256), (32, 2, 16)]
LENGTHS = [(1,), (5, 1, 33, 200, 17), (1, 1, 1), tuple(range(1, 17))]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [
    "naive",
    pytest.param("triton", marks=pytest.mark.skipif(bool(available_backends()["triton"]), reason="no triton")),
]


def make(heads, key_heads, width, lengths, dtype, *, page_size=16, window=None, padding=0, seed=0):
    """Arguments over scattered pages; rows that nobody holds are NaN."""
    rng = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=rng).to(dtype).to(DEVICE)

    requests = len(lengths) + padding
    held = [min(length, window or length) for length in lengths]
    pages = [-(-count // page_size) for count in held]
    order = torch.randperm(2 * sum(pages) + 3, generator=rng).tolist()
    tables = torch.full((requests, max(pages) + 2), -1, dtype=torch.int32, device=DEVICE)
    # Keys and values lie between one another, as in transformers' cache.
    cache = torch.full((2 * len(order) * page_size, 2, key_heads, width), torch.nan, dtype=dtype, device=DEVICE)
    for request, (length, count) in enumerate(zip(lengths, pages, strict=True)):
        own = [order.pop() for _ in range(count)]
        tables[request, :count] = torch.tensor(own)
        for position in range(max(0, length - (window or length)), length - 1):
            ring = position % window if window else position
            cache[own[ring // page_size] * page_size + ring % page_size] = random(2, key_heads, width)
    return {
        "query": random(1, requests, heads, width).transpose(1, 2)[0],
        "key": random(key_heads, requests, width),
        "value": random(1, requests, key_heads, width).transpose(1, 2)[0],
        "key_cache": cache[:, 0],
        "value_cache": cache[:, 1],
        "tables": tables,
        "positions": torch.tensor([length - 1 for length in lengths] + [0] * padding, dtype=torch.int32, device=DEVICE),
        "page_size": page_size,
        "scale": width**-0.5,
        "window": window,
    }


def attend(backend, call, **options):
    return backend_module(backend).paged_attention(**call, **options)


def truth(call, **options):
    wide = {
        name: item.clone().double() if isinstance(item, torch.Tensor) and item.is_floating_point() else item
        for name, item in call.items()
    }
    return attend("naive", wide, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ERROR_BOUND, ids=str)
@pytest.mark.parametrize(
    ("shape", "lengths"),
    [*((shape, LENGTHS[1]) for shape in SHAPES), *((SHAPES[0], lengths) for lengths in LENGTHS)],
    ids=str,
)
def test_every_backend_attends_like_the_truth(shape, lengths, dtype, backend):
    call = make(*shape, lengths, dtype)
    expected = truth(call)
    y = attend(backend, call)
    assert y.shape == (len(lengths), shape[0], shape[2]) and y.dtype == dtype
    assert relative_error(y.cpu(), expected.cpu()) < ERROR_BOUND[dtype]


@pytest.mark.parametrize("splits", [1, 2, 3, 16])
@pytest.mark.parametrize("window", [None, 24, 100])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.skipif(bool(available_backends()["triton"]), reason="no triton")
def test_shares_windows_and_caps(splits, window, softcap):
    call = make(6, 2, 40, (1, 2, 64, 65, 130, 301), torch.float32, page_size=8, window=window)
    expected = truth(call, softcap=softcap)
    y = attend("triton", call, softcap=softcap, splits=splits)
    assert relative_error(y.cpu(), expected.cpu()) < ERROR_BOUND[torch.float32]
    if softcap:
        assert relative_error(truth(call).cpu(), expected.cpu()) > 0.01


def test_the_truth_is_plain_attention():
    """One request whose cache is written token by token, against PyTorch's own attention on all of it."""
    page_size, length, window = 4, 23, 9
    rng = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(2, length, 8, generator=rng, dtype=torch.float64) for _ in range(3))
    cache = torch.zeros(2, 40, 2, 8, dtype=torch.float64)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    for seen, mask in ((None, distance >= 0), (window, (distance >= 0) & (distance < window))):
        expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3)
        for position in range(length):
            new = (item[:, position : position + 1] for item in (query, key, value))
            y = attend(
                "naive",
                dict(zip(("query", "key", "value"), new, strict=True)),
                key_cache=cache[0],
                value_cache=cache[1],
                tables=torch.tensor([[5, 2, 7, 1, 9, 3]], dtype=torch.int32),
                positions=torch.tensor([position], dtype=torch.int32),
                page_size=page_size,
                scale=0.3,
                window=seen,
            )
            torch.testing.assert_close(y[0], expected[:, position])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 6])
def test_the_new_tokens_are_in_the_cache_afterwards_and_nothing_else_is(backend, window):
    call = make(4, 2, 24, (3, 1, 9, 16), torch.bfloat16, page_size=4, window=window, padding=2)
    before = (call["key_cache"].clone(), call["value_cache"].clone())
    attend(backend, call)
    for cache, old, new in zip(("key_cache", "value_cache"), before, ("key", "value"), strict=True):
        for request, length in enumerate((3, 1, 9, 16)):
            place = (length - 1) % window if window else length - 1
            old[call["tables"][request, place // 4] * 4 + place % 4] = call[new][:, request]
        torch.testing.assert_close(call[cache], old, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_may_lie_among_others(backend):
    call = make(4, 2, 24, (3, 30, 9), torch.float32)
    expected = truth(call)
    places = torch.tensor([4, 0, 2], dtype=torch.int32, device=DEVICE)
    for name in ("query", "key", "value"):
        spread = torch.full((call[name].shape[0], 6, 24), torch.nan, device=DEVICE)
        spread[:, places.long()] = call[name]
        call[name] = spread
    positions = torch.full((6,), 1000, dtype=torch.int32, device=DEVICE)
    positions[places.long()] = call["positions"]
    out = torch.full((6, 4, 24), 7.0, device=DEVICE)
    attend(backend, call | {"positions": positions}, tokens=places, out=out)
    assert relative_error(out[places.long()].cpu(), expected.cpu()) < ERROR_BOUND[torch.float32]
    assert (out[[1, 3, 5]] == 7).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_mates_do_not_matter(backend):
    call = make(4, 2, 24, (3, 30, 9), torch.bfloat16)
    alone = call | {name: call[name][:, 1:2] for name in ("query", "key", "value")}
    alone |= {"tables": call["tables"][1:2], "positions": call["positions"][1:2]}
    options = {} if backend == "naive" else {"splits": 2}
    together, one = (attend(backend, item, **options) for item in (call, alone))
    torch.testing.assert_close(together[1:2], one, rtol=0, atol=0)
