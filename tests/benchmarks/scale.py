"""Compressing a Mistral-7B-shaped pair: time, peak memory and size.

Writes the table of docs/results/scale.md and leaves what follows the first section heading there as it is.

    python tests bench scale --scratch FOLDER [--layers 32]

The weights are random, so nothing here speaks of quality. Needs about 36 GB in the scratch folder, which it cleans up.
`--write-only` makes the checkpoints beforehand, a shard at a time: what is there is not written again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from benchmarks.machine import describe

CONFIG = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
SHARD_BYTES = 2_000_000_000
POOL = 1 << 26
#: (bits, rank, calibration) of the rows.
RUNS = ((2, 0, "random"), (2, 0, "none"), (1, 0, "random"), (1, 16, "random"))
RESULTS = Path(__file__).parents[2] / "docs" / "results" / "scale.md"


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a Mistral of this depth."""
    hidden, inner, keys, vocabulary = 4096, 14336, 1024, 32000
    per_layer = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    result: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        result |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in per_layer.items()}
    return result | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


class Noise:
    """Weights of a base and of its fine-tune, from a pool that is read at ever other places.

    Random enough for figures that do not depend on the weights' values, and as fast as the disk.
    """

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        base = torch.randn(POOL, generator=generator) * 0.02
        self._pools = [_raw(base), _raw(base.add_(torch.randn(POOL, generator=generator), alpha=5e-4))]
        self._places = random.Random(seed)

    def write(self, count: int, streams: Sequence[BinaryIO]) -> None:
        """Write `count` weights, bf16, of the base to the first stream and of the expert to the second."""
        start = self._places.randrange(POOL)
        for pool, stream in zip(self._pools, streams, strict=True):
            done = 0
            while done < count:
                place = (start + done) % POOL
                part = min(count - done, POOL - place)
                stream.write(pool[2 * place : 2 * (place + part)])
                done += part


def write_pair(folder: Path, layers: int) -> None:
    """Write base and expert shard by shard; shards that are there already are left alone."""
    paths = [folder / "base", folder / "expert"]
    files = shards(layers)
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    for path in paths:
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for number, (file, tensors) in enumerate(files.items()):
        if all((path / file).exists() for path in paths):
            continue
        noise = Noise(number)
        partial = [path / f"{file}.partial" for path in paths]
        with partial[0].open("wb") as base_stream, partial[1].open("wb") as expert_stream:
            streams = [base_stream, expert_stream]
            for stream in streams:
                stream.write(_header(tensors))
            for shape in tensors.values():
                noise.write(math.prod(shape), streams)
        for path in partial:
            path.rename(path.with_suffix(""))


def shards(layers: int) -> dict[str, dict[str, tuple[int, ...]]]:
    """The tensors by the file they lie in."""
    parts: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes(layers).items():
        nbytes = 2 * math.prod(shape)
        if size + nbytes > SHARD_BYTES:
            parts.append({})
            size = 0
        parts[-1][name] = shape
        size += nbytes
    return {f"model-{number:05d}-of-{len(parts):05d}.safetensors": tensors for number, tensors in enumerate(parts, 1)}


def _header(tensors: dict[str, tuple[int, ...]]) -> bytes:
    header, offset = {}, 0
    for name, shape in tensors.items():
        nbytes = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _raw(weights: torch.Tensor) -> memoryview:
    return memoryview(weights.bfloat16().view(torch.uint8).numpy())


def forget(folders: list[Path]) -> None:
    """Drop the folders' files from the page cache, so that every phase reads from the disk."""
    for path in (file for folder in folders for file in folder.iterdir()):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_all(folders: list[Path]) -> float:
    """Seconds to read every weight file once, front to back."""
    forget(folders)
    buffer = bytearray(8 << 20)
    started = time.perf_counter()
    for path in (file for folder in folders for file in sorted(folder.glob("*.safetensors"))):
        with path.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.perf_counter() - started


@dataclass(frozen=True)
class Run:
    """One compression beside one reading: seconds, peak resident bytes, bytes of the artifact's shards."""

    bits: int
    rank: int
    calibration: str
    read_seconds: float
    seconds: float
    processor_seconds: float
    peak: int
    nbytes: int

    def row(self, model: int) -> str:
        """A line of the table; `model` is a checkpoint's bytes."""
        ratio = 3 * model / (model + 3 * self.nbytes)
        return (
            f"| {self.bits} | {self.rank} | {self.calibration} | {self.nbytes / 1e9:.3f} "
            f"| {model / self.nbytes:.2f} | {ratio:.3f} | "
            f"{self.read_seconds:.1f} | {self.seconds:.1f} | {self.processor_seconds:.0f} | "
            f"{self.seconds / self.read_seconds:.2f} | {self.peak / 1e9:.2f} |"
        )


def measure(base: Path, expert: Path, out: Path, bits: int, rank: int, calibration: str) -> Run:
    """Read both checkpoints, then run the command in a process of its own."""
    read_seconds = read_all([base, expert])
    forget([base, expert])
    arguments = ["compress", "--base", str(base), "--expert", str(expert), "--out", str(out)]
    arguments += ["--bits", str(bits), "--rank", str(rank), "--calibration", calibration]
    started = time.perf_counter()
    child = os.posix_spawn(sys.executable, [sys.executable, "-m", "meswitch_cli", *arguments], dict(os.environ))
    _, status, usage = os.wait4(child, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"meswitch compress failed with status {status}")
    nbytes = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    processor = usage.ru_utime + usage.ru_stime
    return Run(bits, rank, calibration, read_seconds, seconds, processor, usage.ru_maxrss * 1024, nbytes)


def write_report(runs: list[Run], model: int, layers: int) -> None:
    """Write the page anew; what follows its first section heading is written by hand and stays."""
    earlier = RESULTS.read_text() if RESULTS.exists() else ""
    _, heading, notes = earlier.partition("\n## ")
    RESULTS.write_text(
        f"# Compressing a Mistral-7B-shaped pair\n\n"
        f"Two random bf16 checkpoints of {model / 1e9:.2f} GB each ({layers} layers), 8 salient channels, embedding "
        "and head at 2 bits. Read: both checkpoints once, front to back, just before, in the same run. They are "
        "dropped from the page cache before each reading and before each compression, so both begin at the disk. "
        "Processor: seconds of all threads of the compression, the kernel's included. Three-model ratio: three full "
        "models over one base and three artifacts. `random` is the default: 32 random tokens, run through the expert, "
        "choose the salient channels.\n\n"
        f"`python tests bench scale --scratch FOLDER`, {describe()}, "
        f"{resource.getpagesize()}-byte pages.\n\n"
        "| bits | rank | calibration | artifact, GB | times smaller | three-model ratio | read, s | compress, s "
        "| processor, s | compress / read | peak memory, GB |\n|---|---|---|---|---|---|---|---|---|---|---|\n"
        + "\n".join(run.row(model) for run in runs)
        + "\n"
        + (heading + notes)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints for a later run")
    parser.add_argument("--write-only", action="store_true", help="write the checkpoints for a later run and stop")
    parser.add_argument("--no-report", action="store_true", help="print the figures alone")
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"])
    arguments = parser.parse_args()
    model = 2 * sum(math.prod(shape) for shape in shapes(arguments.layers).values())
    folder = arguments.scratch / "scale"
    folder.mkdir(parents=True, exist_ok=True)
    base, expert = folder / "base", folder / "expert"
    there = sum(path.stat().st_size for path in folder.glob("*/model-*"))
    if shutil.disk_usage(folder).free < 2.5 * model - there:
        raise SystemExit(f"{folder}: {(2.5 * model - there) / 1e9:.0f} GB must be free")
    write_pair(folder, arguments.layers)
    if arguments.write_only:
        return
    runs = []
    try:
        for bits, rank, calibration in RUNS:
            out = folder / f"artifact-{bits}-{rank}-{calibration}"
            runs.append(measure(base, expert, out, bits, rank, calibration))
            print(runs[-1], flush=True)
    finally:
        for path in folder.iterdir():
            if not (arguments.keep and path in (base, expert)):
                shutil.rmtree(path)
    if not arguments.no_report:
        write_report(runs, model, arguments.layers)


if __name__ == "__main__":
    main()
