"""What the benchmarks share: timing, the machine's own ceilings, layer shapes, tables."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meswitch_kernels import Capacity, ExpertBank, ExpertDelta, tuning
from meswitch_kernels.messages import FIRST_NUMBER, code_width, row_words

SHAPES = {
    "SmolLM2-135M": {"q, o": (576, 576), "k, v": (192, 576), "gate, up": (1536, 576), "down": (576, 1536)},
    "Mistral-7B": {"q, o": (4096, 4096), "k, v": (1024, 4096), "gate, up": (14336, 4096), "down": (4096, 14336)},
}
"""(out, in) of a model's linears."""

MISTRAL_LAYERS, HEAD = 32, (32000, 4096)
"""Of Mistral-7B: layers, and (out, in) of its head."""


TUNING = Path(tuning.__file__).with_name("tuning.json")
"""What the package knows of cards."""


def median_times(calls: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Median seconds of each call on the CPU; the calls take turns, so that a slow moment meets them all."""
    for call in calls:
        for _ in range(3):
            call()
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, seen in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            seen.append(time.perf_counter() - start)
    return [statistics.median(seen) for seen in times]


def read_bandwidth(floats: int = 32 << 20) -> float:
    """Bytes per second at which this machine's CPU reads memory, with PyTorch's threads: the best of ten sums."""
    data = torch.ones(floats)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        data.sum()
        times.append(time.perf_counter() - start)
    return data.nbytes / min(times)


def rotating(make: Callable[[int], Callable[[], object]], copies: int) -> Callable[[], object]:
    """A call that goes round `copies` sets of operands, so that none is still in the cache when its turn comes."""
    calls = [make(i) for i in range(copies)]
    turn = 0

    def call() -> object:
        nonlocal turn
        turn = (turn + 1) % copies
        return calls[turn]()

    return call


def machine() -> str:
    """The processor, its cores and the versions that a figure depends on."""
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].split(":")[1].strip() if lines else model
    return f"{model}, {torch.get_num_threads()} threads; torch {torch.__version__}"


def commit() -> str:
    """The commit of this checkout, or "unknown"."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def parse_bits(text: str) -> float:
    """Bits of a weight, as an option's text has them."""
    bits = float(text)
    return int(bits) if bits >= 1 else bits


def code_number(bits: float) -> int:
    """The number of the codes of so many bits: scalar ones, or below 1 the messages of trellis codes."""
    return int(bits) if bits >= 1 else FIRST_NUMBER + round(1 / bits)


def capacity_for(bits: float, **rest: Any) -> Capacity:
    """What a bank has for experts of so many bits."""
    number = code_number(bits)
    if number > FIRST_NUMBER:
        return Capacity(messages=(number,), **rest)
    return Capacity(bits=number, **rest)


def scaled_at(bits: float) -> bool:
    """Whether `meswitch compress`, unless told otherwise, gives experts of so many bits channel scales."""
    return bits == 1


def load_experts(
    bank: ExpertBank, slots: int, in_features: int, out_features: int, bits: float, scaled: bool = False
) -> None:
    """Fill a bank with random codes, small steps and a low-rank part of its full rank, made on its own device.

    With `scaled` the input channels have scales, which the bank must have room for.
    """
    number = code_number(bits)
    words = row_words(in_features, number)
    for slot in range(slots):
        codes = torch.randint(-(1 << 31), 1 << 31, (out_features, words), device=bank.device, dtype=torch.int64)
        steps = torch.full((out_features, 1), 0.1 * in_features**-0.5, device=bank.device)
        k = bank.capacity.salient
        index = torch.arange(k, dtype=torch.int32) * (in_features // k)
        value = torch.randn(out_features, k, device=bank.device).mul(in_features**-0.5)
        scale = torch.rand(in_features).add(0.5).to(torch.float16)
        left = right = None
        if rank := bank.capacity.rank:
            left = torch.randn(out_features, rank, device=bank.device).mul(rank**-0.5)
            right = torch.randn(rank, in_features, device=bank.device).mul(0.1 * in_features**-0.5)
        delta = ExpertDelta(
            bits=code_width(number),
            message=number - FIRST_NUMBER if number > FIRST_NUMBER else 0,
            codes=codes.to(torch.int32),
            steps=steps,
            salient_index=index,
            channel_scale=scale if scaled else None,
            salient_value=value.to(torch.bfloat16),
            left=left,
            right=right,
        )
        bank.load(slot, delta)


def delta_bytes(in_features: int, out_features: int, bits: float, k: int = 8, rank: int = 0) -> int:
    """Bytes of one expert's delta that a product must read: codes, steps, salient values, scales, low-rank part."""
    words = row_words(in_features, code_number(bits))
    return out_features * (4 * words + 4 + 2 * k + 4) + 2 * in_features + 2 * rank * (in_features + out_features)


def say(figure: str, **values: object) -> None:
    """Print one row of the table named `figure` as JSON, at once: a run that is stopped has told what it knew."""
    print(json.dumps({"figure": figure, **values}) + "\n", end="", flush=True)  # one write, whoever else writes


def write_tuning(path: Path, card: str, **entries: Any) -> None:
    """Put entries of a card into a tuning file, begun from the package's; what it has of this and other cards stays."""
    content = json.loads((path if path.exists() else TUNING).read_text())
    for name, value in entries.items():
        held = content.setdefault(name, {})
        held[card] = {**held.get(card, {}), **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(content, indent=1) + "\n")


def copy_bandwidth() -> float:
    """Bytes per second, read plus written, of a large copy on the device."""
    data = torch.randn(256 << 20, device="cuda", dtype=torch.float16)
    target = torch.empty_like(data)
    return 2 * data.nbytes / graph_seconds(lambda: target.copy_(data), replays=5)


def sum_bandwidth() -> float:
    """Bytes per second that a large sum reads on the device: as a decode step, it hardly writes."""
    data = torch.ones(512 << 20, device="cuda", dtype=torch.float32)
    return data.nbytes / graph_seconds(lambda: data.sum(), replays=5)


def matrix_rate() -> float:
    """Multiply-adds, counted twice, per second of a large bfloat16 product through cuBLAS."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / graph_seconds(lambda: a @ b, replays=5)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def graph_seconds(call: Callable[[], Tensor], replays: int = 20, repeats: int = 5) -> float:
    """Median seconds of one call on the GPU, replayed from a CUDA graph so that launches do not count."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(replays):
            call()
    times = []
    for _ in range(repeats + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / replays)
    return statistics.median(times[1:])
