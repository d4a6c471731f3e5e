"""The parts of the proof, in the order in which they run."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from gpu.process import Part

#: Bits of a weight of the experts that the engine serves. Below one the code is another, and made for itself.
RATES, SHORT = ("2", "1"), "0.25"
NAMES = (
    "probe", "compress", f"compress-{SHORT}", *(f"engine-{rate}" for rate in (*RATES, SHORT)), "kernels", "truth",
    "linear", "decoder", "many", "switch", "base", "lora", "dense", "serve",
)  # fmt: skip


def stages(scratch: Path, tiny: bool) -> list[list[Part]]:
    """The parts that run side by side, stage after stage; the most telling first."""
    flags = ["--scratch", str(scratch), *(["--tiny"] if tiny else [])]

    def module(name: str, *words: str) -> list[str]:
        return [sys.executable, "-m", f"gpu.{name}", *words, *flags]

    def script(name: str, *words: str) -> list[str]:
        return [sys.executable, f"kernels/benchmarks/{name}.py", *words]

    small = ["--tiny"] if tiny else []
    parts = {
        part.name: part
        for part in (
            Part("probe", "Card and kernels", script("gpu_probe", *small), 120, least=60),
            Part("compress", "Compression on the device", module("compress", *RATES), 120, least=60),
            Part(f"compress-{SHORT}", f"Compression to {SHORT} bit", module("compress", SHORT), 120, least=30),
            *(
                Part(f"engine-{rate}", f"Engine, {rate} bit", module("engine", "--bits", rate), 240, least=least)
                for rate, least in zip((*RATES, SHORT), (80, 80, 60), strict=True)
            ),
            Part("kernels", "Kernel tests", kernel_tests(tiny), 130, least=60),
            Part("truth", "Truth tests", truth_tests(tiny), 130, least=60),
            Part("linear", "Linears", script("gpu_linear"), 80, least=20, card=True),
            Part("decoder", "Decoder", script("gpu_decoder"), 60, least=30, card=True),
            Part("many", "Many experts at once", module("engine", "--bits", "1", "--many"), 120, least=60),
            Part("base", "The base alone", module("against", "base"), 120, least=60),
            Part("lora", "LoRA", module("against", "lora"), 120, least=60),
            Part("switch", "Switching", module("switch", "--bits", "2"), 120, least=60),
            Part("serve", "Server", module("serve"), 120, least=60),
            Part("dense", "One dense model per expert", module("against", "dense"), 120, least=60),
        )
    }
    if tiny:  # nothing is timed, so that pairs may share the cores, and a busy machine has time enough
        pairs = (
            "probe compress", f"kernels compress-{SHORT}", "engine-2 engine-1", f"engine-{SHORT} truth", "many switch",
            "base lora", "dense serve",
        )  # fmt: skip
        return [[replace(parts[name], limit=1200, least=1) for name in pair.split()] for pair in pairs]
    # Engines of a stage start side by side, for that is compiling and checking for the most part, and measure one after
    # the other. Compression takes four times as long beside a probe that compiles.
    order = (
        f"compress compress-{SHORT}", "engine-2 engine-1", "decoder", "probe", f"engine-{SHORT}", "base lora many",
        "switch serve dense", "linear", "kernels truth",
    )  # fmt: skip
    return [[parts[name] for name in stage.split()] for stage in order]


def kernel_tests(tiny: bool) -> list[str]:
    """All that is not of another backend, as far as time allows; compilation ahead of time is left to `make test`."""
    chosen = "not (compile or cpu or naive)" if not tiny else "packing"
    return _pytest("tests/kernels", "--confcutdir=tests/kernels", "-k", chosen, *_workers(tiny, 10))


def truth_tests(tiny: bool) -> list[str]:
    """float32 token for token, bfloat16 up to near ties, and whatever the engine's tests keep for a GPU."""
    if tiny:
        return _pytest("tests/engine/test_truth.py", "-k", "near_ties")
    chosen = "near_ties or mixed_batches or random_arrivals or full_cache or families or cuda or gpu"
    return _pytest("tests/engine", "--ignore=tests/engine/vllm", "-m", "not zoo", "-k", chosen, *_workers(tiny, 6))


def _pytest(*words: str) -> list[str]:
    plugins = ["-p", "gpu.timebox", "-p", "no:cacheprovider", "-p", "no:benchmark"]
    return [sys.executable, "-m", "pytest", "-q", *words, *plugins]


def _workers(tiny: bool, most: int) -> list[str]:
    count = min(most, os.cpu_count() or 1)
    return ["-n", str(count)] if find_spec("xdist") and not tiny else []
