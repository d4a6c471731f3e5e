"""Compressing a Mistral-7B-shaped pair: time, peak memory and size.

Writes docs/results/scale.md.


    PYTHONPATH=tests python -m benchmarks.scale --scratch FOLDER [--layers 32]

The weights are random, so nothing here speaks of quality. Needs about 35 GB in the scratch folder, which it cleans up.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

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
SHARD_BYTES = 5_000_000_000
POOL = 1 << 26
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
    """Normal numbers from a pool that is read at ever other places: random enough, and as fast as the disk."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._pool = torch.randn(POOL, generator=generator)
        self._generator = generator

    def take(self, count: int) -> torch.Tensor:
        start = int(torch.randint(0, POOL, (1,), generator=self._generator))
        repeats = -(-(start + count) // POOL)
        return self._pool.repeat(repeats)[start : start + count] if repeats > 1 else self._pool[start : start + count]


def write_pair(folder: Path, layers: int) -> None:
    """Write base and expert shard by shard, tensor by tensor."""
    base, expert = folder / "base", folder / "expert"
    for path in (base, expert):
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes(layers).items():
        nbytes = 2 * math.prod(shape)
        if size + nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += nbytes
    noise, weight_map = Noise(0), {}
    for index, tensors in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(tensors, file)
        with (base / file).open("wb") as base_stream, (expert / file).open("wb") as expert_stream:
            header = _header(tensors)
            base_stream.write(header)
            expert_stream.write(header)
            for shape in tensors.values():
                weights = noise.take(math.prod(shape)) * 0.02
                base_stream.write(_raw(weights))
                expert_stream.write(_raw(weights + noise.take(math.prod(shape)) * 5e-4))
    for path in (base, expert):
        index_value = {"metadata": {}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index_value))


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
    """One compression: seconds, peak resident bytes, bytes of the artifact's shards."""

    bits: int
    seconds: float
    peak: int
    nbytes: int


def compress(base: Path, expert: Path, out: Path, bits: int) -> Run:
    """Run the command in a process of its own."""
    forget([base, expert])
    arguments = ["compress", "--base", str(base), "--expert", str(expert), "--out", str(out), "--bits", str(bits)]
    started = time.perf_counter()
    child = os.posix_spawn(sys.executable, [sys.executable, "-m", "meswitch_cli", *arguments], dict(os.environ))
    _, status, usage = os.wait4(child, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"meswitch compress failed with status {status}")
    nbytes = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    return Run(bits, seconds, usage.ru_maxrss * 1024, nbytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints for a later run")
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"])
    arguments = parser.parse_args()
    model = 2 * sum(math.prod(shape) for shape in shapes(arguments.layers).values())
    folder = arguments.scratch / "scale"
    folder.mkdir(parents=True, exist_ok=True)
    base, expert = folder / "base", folder / "expert"
    try:
        if not expert.exists():
            if shutil.disk_usage(folder).free < 2.5 * model:
                raise SystemExit(f"{folder}: {2.5 * model / 1e9:.0f} GB must be free")
            write_pair(folder, arguments.layers)
        rows = []
        for bits in (2, 1):
            seconds = read_all([base, expert])
            run = compress(base, expert, folder / f"artifact-{bits}", bits)
            print(f"{bits} bits: read {seconds:.1f} s, {run}", flush=True)
            ratio = 3 * model / (model + 3 * run.nbytes)
            rows.append(
                f"| {bits} | {run.nbytes / 1e9:.3f} | {model / run.nbytes:.2f} | {ratio:.3f} | {seconds:.1f} | "
                f"{run.seconds:.1f} | {run.seconds / seconds:.2f} | {run.peak / 1e9:.2f} |"
            )
    finally:
        for path in folder.iterdir():
            if not (arguments.keep and path in (base, expert)):
                shutil.rmtree(path)
    RESULTS.write_text(
        f"# Compressing a Mistral-7B-shaped pair\n\n"
        f"Two random bf16 checkpoints of {model / 1e9:.2f} GB each ({arguments.layers} layers), 8 salient "
        f"channels, embedding and head at 2 bits. Read: both checkpoints once, front to back, from disk, just before. "
        f"Three-model ratio: three full models over one base and three artifacts.\n\n"
        f"`PYTHONPATH=tests python -m benchmarks.scale --scratch FOLDER`, {describe()}, "
        f"{resource.getpagesize()}-byte pages.\n\n"
        "| bits | artifact, GB | times smaller | three-model ratio | read, s | compress, s | compress / read "
        "| peak memory, GB |\n|---|---|---|---|---|---|---|---|\n" + "\n".join(rows) + "\n"
    )


if __name__ == "__main__":
    main()
