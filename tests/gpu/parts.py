"""The parts of the proof, in the order in which they run."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from gpu.process import Part

#: Bits of a weight of the experts that the engine serves. A quarter of a bit joins when an artifact can have it.
RATES = ("2", "1")
NAMES = (
    "probe", "compress", *(f"engine-{rate}" for rate in RATES), "kernels", "truth", "linear", "decoder",
    "many", "switch", "base", "lora", "dense", "serve",
)  # fmt: skip


def stages(scratch: Path, tiny: bool) -> list[list[Part]]:
    """Parts side by side where neither's time is a figure, else one after the other; the most telling first."""
    flags = ["--scratch", str(scratch), *(["--tiny"] if tiny else [])]

    def module(name: str, *words: str) -> list[str]:
        return [sys.executable, "-m", f"gpu.{name}", *words, *flags]

    def script(name: str, *words: str) -> list[str]:
        return [sys.executable, f"kernels/benchmarks/{name}.py", *words]

    small = ["--tiny"] if tiny else []
    probe = Part("probe", "Card and kernels", script("gpu_probe", *small), 80)
    compress = Part("compress", "Compression on the device", module("compress", *RATES), 100, least=40)
    engines = [
        Part(f"engine-{rate}", f"Engine, {rate} bit", module("engine", "--bits", rate), 150, least=30) for rate in RATES
    ]
    kernels = Part("kernels", "Kernel tests", kernel_tests(tiny), 120, least=30)
    truth = Part("truth", "Truth tests", truth_tests(tiny), 120, least=30)
    linear = Part("linear", "Linears", script("gpu_linear"), 80, least=20, card=True)
    decoder = Part("decoder", "Decoder", script("gpu_decoder"), 60, least=20, card=True)
    many = Part("many", "Many experts at once", module("engine", "--bits", "1", "--many"), 60)
    switch = Part("switch", "Switching", module("switch", "--bits", "2"), 60)
    against = [
        Part("base", "The base alone", module("against", "base"), 40),
        Part("lora", "LoRA", module("against", "lora"), 50),
        Part("dense", "One dense model per expert", module("against", "dense"), 60),
    ]
    serve = Part("serve", "Server", module("serve"), 60)
    if tiny:  # nothing is timed, so that pairs may share the cores, and a busy machine has time enough
        pairs = [[probe, compress], engines, [many, switch], [kernels, truth], against[:2], [against[2], serve]]
        return [[replace(part, limit=200, least=1) for part in pair] for pair in pairs]
    return [
        *([part] for part in (probe, compress, *engines)),
        [kernels, truth],
        *([part] for part in (linear, decoder, against[0], against[1], serve, switch, many, against[2])),
    ]


def kernel_tests(tiny: bool) -> list[str]:
    """The tests of every Triton kernel on values; compilation ahead of time is left to `make test`."""
    chosen = "(triton or gpu) and not compile" if not tiny else "packing"
    return _pytest("tests/kernels", "--confcutdir=tests/kernels", "-k", chosen, *_workers(tiny))


def truth_tests(tiny: bool) -> list[str]:
    """float32 token for token, bfloat16 up to near ties, and whatever the engine's tests keep for a GPU."""
    if tiny:
        return _pytest("tests/engine/test_truth.py", "-k", "near_ties")
    chosen = "near_ties or mixed_batches or random_arrivals or full_cache or families or cuda or gpu"
    return _pytest("tests/engine", "--ignore=tests/engine/vllm", "-m", "not zoo", "-k", chosen, *_workers(tiny, 6))


def _pytest(*words: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", *words, "-p", "no:cacheprovider"]


def _workers(tiny: bool, most: int = 14) -> list[str]:
    count = min(most, os.cpu_count() or 1)
    return ["-n", str(count)] if find_spec("xdist") and not tiny else []
