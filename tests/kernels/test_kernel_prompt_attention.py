"""Attention of prompts over pages and themselves, each backend against plain PyTorch in float64."""

import pytest
import torch

from meswitch_kernels.dispatch import available_backends, backend_module
from meswitch_kernels.testing import relative_error

ERROR_BOUND = {torch.float32: 3e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [
    "naive",
    pytest.param("triton", marks=pytest.mark.skipif(bool(available_backends()["triton"]), reason="no triton")),
]
PAGE = 8
#: Tokens before a prompt's own, and its own.
MIXED = ((0, 5), (17, 2), (0, 70), (40, 33), (3, 1))


def make(heads, key_heads, width, prompts, dtype, *, window=None, softcap=None, seed=0):
    """Arguments over scattered pages and prompts among tokens of others; all that nobody holds is NaN."""
    rng = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=rng).to(dtype).to(DEVICE)

    gap = 2
    total = sum(count + gap for _, count in prompts) + 1
    query, key, value = (
        torch.full((1, total, size, width), torch.nan, dtype=dtype, device=DEVICE).transpose(1, 2)[0]
        for size in (heads, key_heads, key_heads)
    )
    pages = [-(-min(past + count, window or past + count) // PAGE) for past, count in prompts]
    order = torch.randperm(2 * sum(pages) + 3, generator=rng).tolist()
    cache = torch.full((2 * len(order) * PAGE, 2, key_heads, width), torch.nan, dtype=dtype, device=DEVICE)
    tables = torch.full((len(prompts) + 2, max(pages) + 1), -1, dtype=torch.int32, device=DEVICE)
    rows, place = [], 1
    for index, ((past, count), held) in enumerate(zip(prompts, pages, strict=True)):
        own = [order.pop() for _ in range(held)]
        tables[index + 2, :held] = torch.tensor(own)
        for position in range(max(0, past - (window or past)), past):
            ring = position % window if window else position
            cache[own[ring // PAGE] * PAGE + ring % PAGE] = random(2, key_heads, width)
        for item, size in ((query, heads), (key, key_heads), (value, key_heads)):
            item[:, place : place + count] = random(size, count, width)
        rows.append((place, count, past, index + 2))
        place += count + gap
    return {
        "query": query,
        "key": key,
        "value": value,
        "key_cache": cache[:, 0],
        "value_cache": cache[:, 1],
        "tables": tables,
        "prompts": torch.tensor(rows, dtype=torch.int32, device=DEVICE),
        "counts": [count for _, count in prompts],
        "page_size": PAGE,
        "scale": width**-0.5,
        "window": window,
        "softcap": softcap,
    }


def attend(backend, call, dtype=None):
    """What is written for each token, 7 where nothing is, and the caches afterwards."""
    tensors = ("query", "key", "value", "key_cache", "value_cache")
    call = call | {name: call[name].clone().to(dtype or call[name].dtype) for name in tensors}
    heads, total, width = call["query"].shape
    out = torch.full((total, heads, width), 7.0, dtype=call["query"].dtype, device=DEVICE)
    backend_module(backend).prompt_attention(**call, out=out)
    return out, call["key_cache"], call["value_cache"]


def check(call, backend, dtype):
    (out, *caches), (expected, *theirs) = attend(backend, call), attend("naive", call, torch.float64)
    own = torch.zeros(len(out), dtype=torch.bool, device=DEVICE)
    for first, count, _, _ in call["prompts"].tolist():
        own[first : first + count] = True
    assert relative_error(out[own].cpu(), expected[own].cpu()) < ERROR_BOUND[dtype]
    assert (out[~own] == 7).all()
    for ours, wanted in zip(caches, theirs, strict=True):
        torch.testing.assert_close(ours.double(), wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((9, 3, 64), torch.bfloat16),
        ((4, 4, 24), torch.float32),
        ((8, 1, 96), torch.float16),
        ((8, 2, 128), torch.bfloat16),
        ((2, 2, 256), torch.float32),
    ],
    ids=str,
)
def test_every_backend_attends_like_the_truth(shape, dtype, backend):
    check(make(*shape, MIXED, dtype), backend, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("window", "softcap"), [(6, None), (24, 2.0), (100, None), (None, 2.0)])
def test_windows_and_caps(window, softcap, backend):
    """A prompt may be longer than the window, whose ring it overwrites, or begin in it, or lie beyond it."""
    prompts = (*MIXED, (100, 30), (5, 2))
    check(make(6, 2, 40, prompts, torch.float32, window=window, softcap=softcap), backend, torch.float32)


@pytest.mark.parametrize("window", [None, 7])
def test_the_truth_is_that_of_single_tokens(window):
    """A prompt at once, and the same tokens one after the other: equal rows, and an equal cache."""
    call = make(4, 2, 16, ((9, 13),), torch.float64, window=window)
    together, *caches = attend("naive", call)
    alone = call | {name: call[name].clone() for name in ("key_cache", "value_cache")}
    positions = torch.full((call["query"].shape[1],), -1, dtype=torch.int32, device=DEVICE)
    positions[1:14] = torch.arange(9, 22)
    for token in range(1, 14):
        y = backend_module("naive").paged_attention(
            *(alone[name] for name in ("query", "key", "value", "key_cache", "value_cache")),
            alone["tables"][2:3],
            positions,
            PAGE,
            alone["scale"],
            window=window,
            tokens=torch.tensor([token], dtype=torch.int32, device=DEVICE),
        )
        torch.testing.assert_close(together[token], y[token])
    for ours, theirs in zip(caches, (alone["key_cache"], alone["value_cache"]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_a_host_that_counts_otherwise_is_refused():
    call = make(2, 2, 16, ((0, 5),), torch.float32)
    with pytest.raises(ValueError, match="5 tokens is said to have 4"):
        attend("naive", call | {"counts": [4]})
