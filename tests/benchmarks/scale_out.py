"""Mixed traffic of four experts in one vLLM, against four LoRAs in one, and against a process for each model.

python tests bench scale_out --base BASE --expert maths=ARTIFACT --expert code=ARTIFACT ... --out build/scale_out.json

`vllm bench serve` sends the requests and takes the times. Servers are started anew in each round, and take turns in it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from engine.vllm.plain_server import BASE, PlainServer

from benchmarks.machine import describe
from meswitch_cli.artifact.artifact import Artifact
from meswitch_cli.artifact.restore import restore
from meswitch_cli.checkpoint.checkpoint import Checkpoint
from zoo.adapter import make_adapter

#: What vLLM's executable runs for `vllm bench serve`.
CLIENT = (
    "import argparse; from vllm.benchmarks import serve; parser = argparse.ArgumentParser(); "
    "serve.add_cli_args(parser); serve.main(parser.parse_args())"
)
LORA_RANK = 16
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Load:
    """What is sent, of all models together."""

    requests: int
    input_tokens: int
    output_tokens: int
    concurrency: int


@dataclass(frozen=True)
class Served:
    """A variant: the servers of it, each with a base or model, adapters, and options of vLLM's."""

    servers: Sequence[tuple[Path, Mapping[str, Path], tuple[str, ...]]]


def variants(base: Path, experts: Mapping[str, Path], folder: Path, kind: Sequence[str]) -> dict[str, Served]:
    """Those of `kind`, with what they need made in a folder."""
    slots = ("--max-loras", str(len(experts)))
    alone = ("--additional-config", json.dumps({"meswitch": {"loras": False}}))

    def loras() -> Served:
        made = {
            name: make_adapter(base, folder / f"{name}-lora", seed=seed, rank=LORA_RANK, targets=LORA_TARGETS)
            for seed, name in enumerate(experts)
        }
        return Served([(base, made, (*slots, "--max-lora-rank", str(LORA_RANK)))])

    def models() -> Served:
        checkpoint = Checkpoint.open(str(base))
        restored = [restore(Artifact.open(path), checkpoint, folder / name) for name, path in experts.items()]
        return Served([(path, {}, ()) for path in restored])

    made: dict[str, Callable[[], Served]] = {
        "experts": lambda: Served([(base, experts, (*slots, *alone))]),
        "experts, LoRAs possible": lambda: Served([(base, experts, slots)]),
        "LoRAs": loras,
        "a process each": models,
    }
    return {name: made[name]() for name in kind}


def measure(served: Served, load: Load, folder: Path, *options: str) -> dict[str, float]:
    """Start a variant's servers, send all of them their part of the load at once, and end them."""
    with ExitStack() as stack:
        running = []
        for number, (model, adapters, further) in enumerate(served.servers):
            own = folder / str(number)
            own.mkdir()
            context = stack.enter_context(PlainServer(model, adapters, own, *further, *options))
            running.append((context, model, adapters, own))
        memory = sum(_memory(context.process.pid) for context, *_ in running)
        share = len(running)
        part = Load(load.requests // share, load.input_tokens, load.output_tokens, max(1, load.concurrency // share))
        with ThreadPoolExecutor(share) as pool:
            told = list(pool.map(lambda item: _bench(item[0].port, item[1], item[2], part, item[3]), running))
    return {
        # Processes share the machine, so the load is over when the last of them is.
        "tokens_per_second": sum(item["total_output_tokens"] for item in told) / max(item["duration"] for item in told),
        "ttft_ms": statistics.mean(item["median_ttft_ms"] for item in told),
        "tpot_ms": statistics.mean(item["median_tpot_ms"] for item in told),
        "completed": sum(item["completed"] for item in told),
        "memory_gb": memory / 1e9,
    }


def _bench(port: int, model: Path, adapters: Mapping[str, Path], load: Load, folder: Path) -> dict[str, Any]:
    options = {
        "backend": "openai",
        "base-url": f"http://127.0.0.1:{port}",
        "endpoint": "/v1/completions",
        "model": BASE,
        "tokenizer": model,
        "dataset-name": "random",
        "random-input-len": load.input_tokens,
        "random-output-len": load.output_tokens,
        "num-prompts": load.requests,
        "max-concurrency": load.concurrency,
        "num-warmups": max(2, len(adapters)),
        "seed": 1,
        "temperature": 0,
        "result-dir": folder,
        "result-filename": "result.json",
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    words += ["--ignore-eos", "--save-result", "--disable-tqdm"]
    if adapters:
        words += ["--lora-modules", *adapters, "--lora-assignment", "round-robin"]
    subprocess.run([sys.executable, "-c", CLIENT, *words], check=True, stdout=subprocess.DEVNULL)
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def _memory(pid: int) -> int:
    """Bytes of a server's processes that are theirs alone, their parts of what they share included."""
    process = psutil.Process(pid)
    return sum(item.memory_full_info().pss for item in (process, *process.children(recursive=True)))


def table(results: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Medians over the rounds, as Markdown."""
    lines = ["| | tokens/s | first token, ms | each further one, ms | memory, GB |", "|---|---|---|---|---|"]
    for name, rounds in results.items():
        cells = [
            f"{statistics.median(item[figure] for item in rounds):.{digits}f}"
            for figure, digits in (("tokens_per_second", 1), ("ttft_ms", 0), ("tpot_ms", 0), ("memory_gb", 1))
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--expert", action="append", required=True, help="NAME=ARTIFACT; four of them")
    parser.add_argument("--variant", action="append", help="one of the variants; repeatable; all unless given")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--input", type=int, default=64)
    parser.add_argument("--output", type=int, default=32)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--eager", action="store_true", help="compile nowhere: vLLM compiles no LoRAs on a CPU")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("build/scale_out.json"))
    options = parser.parse_args()
    experts = {name: Path(path).resolve() for name, _, path in (item.partition("=") for item in options.expert)}
    kinds = options.variant or ["experts", "experts, LoRAs possible", "LoRAs", "a process each"]
    eager = ("--enforce-eager",) if options.eager else ()
    load = Load(options.requests, options.input, options.output, options.concurrency)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in kinds}
    with tempfile.TemporaryDirectory() as made:
        served = variants(options.base.resolve(), experts, Path(made), kinds)
        for number in range(options.rounds):
            for name, variant in served.items():
                with tempfile.TemporaryDirectory() as folder:
                    results[name].append(measure(variant, load, Path(folder), *eager))
                print(number, name, results[name][-1], file=sys.stderr, flush=True)
                options.out.parent.mkdir(parents=True, exist_ok=True)
                report = {"machine": describe(), "load": asdict(load), "eager": options.eager, "rounds": results}
                options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
