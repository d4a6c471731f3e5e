"""The card's own ceilings, and `expert_linear` on it against float64.

    python kernels/benchmarks/gpu_probe.py [--tiny]

Prints one line of JSON a figure. Exit status 1 where a product is further from the truth than the tests allow.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context

import torch
from common import copy_bandwidth, matrix_rate, say, sum_bandwidth

from meswitch_kernels import available_backends, expert_linear
from meswitch_kernels.dispatch import default_backend
from meswitch_kernels.testing import ERROR_BOUND, random_call, relative_error

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def card() -> None:
    """What the card is and what it reaches: bytes a second of a copy, multiply-adds counted twice of a product."""
    properties = torch.cuda.get_device_properties(0)
    host = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True)
    device = torch.empty_like(host, device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    device.copy_(host, non_blocking=True)
    start.record()
    for _ in range(4):
        device.copy_(host, non_blocking=True)
    end.record()
    torch.cuda.synchronize()
    say(
        "card",
        name=properties.name,
        processors=properties.multi_processor_count,
        memory_gb=properties.total_memory / 1e9,
        cuda=torch.version.cuda,
        copy_gb_per_s=copy_bandwidth() / 1e9,
        read_gb_per_s=sum_bandwidth() / 1e9,
        matrix_tflops=matrix_rate() / 1e12,
        host_to_device_gb_per_s=4 * host.nbytes / start.elapsed_time(end) / 1e6,
    )


def smoke(device: str, dtype: torch.dtype, rank: int, tokens: int, shape: tuple[int, int]) -> bool:
    """Whether a batch of experts of 2 and 1 bits, and in bfloat16 of 4, is right.

    x has a mean too, since decode takes the codes' offset off with its sum.
    """
    bits = (2, 1, 4) if dtype == torch.bfloat16 else (2, 1)
    call = random_call(tokens, *shape, bits=bits, slots=3, dtype=dtype, device=device, rank=rank)
    shifted = call.with_tokens(call.x + 0.5, call.slot_of_token)
    worst = max(
        relative_error(expert_linear(c.x, c.weight, c.bias, c.bank, c.slot_of_token), c.truth())
        for c in (call, shifted)
    )
    right = worst <= ERROR_BOUND[dtype]
    say(
        "smoke",
        backend=default_backend(device),
        dtype=str(dtype).removeprefix("torch."),
        tokens=tokens,
        rank=rank,
        error=worst,
        bound=ERROR_BOUND[dtype],
        right=right,
    )
    return right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a small layer, and no card needed")
    parser.add_argument("--jobs", type=int, default=12, help="processes that compile")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    if not cuda and not options.tiny:
        print("gpu_probe needs a CUDA device", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    if cuda:
        card()
    say("backends", **{name: reason or "runs" for name, reason in available_backends().items()})
    device, shape = ("cuda" if cuda else "cpu"), ((96, 64) if options.tiny else (4096, 1024))
    calls = [(device, *call, shape) for call in product(DTYPES, (0, 16), (64, 16, 200, 1))]
    if not cuda:
        sound = [smoke(*call) for call in calls]
    else:  # processes side by side, since most of the time goes into compiling
        with ProcessPoolExecutor(min(len(calls), options.jobs), mp_context=get_context("spawn")) as pool:
            sound = list(pool.map(smoke, *zip(*calls, strict=True)))
    return 0 if all(sound) else 1


if __name__ == "__main__":
    sys.exit(main())
