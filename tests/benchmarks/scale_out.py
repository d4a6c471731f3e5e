"""Mixed traffic of four experts in one vLLM, against four LoRAs in one, and against a process for each model.

python tests bench scale_out --base BASE --expert maths=ARTIFACT --expert code=ARTIFACT ... --page docs/results/vllm.md

`vllm bench serve` sends the requests and takes the times. The servers of the two variants of a comparison are started
together and live through its rounds, in which the variants take turns; those that are not asked compute nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
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

LORA_RANK = 16
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
#: Of each server's cache of keys and values.
CACHE_BYTES = 256 << 20
WARM_UPS = 4
COMPARISONS: Mapping[str, tuple[str, str]] = {
    "compiled": ("experts", "a process for each model"),
    # vLLM compiles no LoRAs on a CPU.
    "eager": ("experts, eager", "LoRAs, eager"),
}
INTRO = Path(__file__).with_name("scale_out_intro.md")


@dataclass(frozen=True)
class Load:
    """What is sent, of all models together."""

    requests: int
    input_tokens: int
    output_tokens: int
    concurrency: int


@dataclass(frozen=True)
class Variant:
    """Servers that share the machine's cores: of each its base or model, and its adapters; and options of vLLM's."""

    servers: Sequence[tuple[Path, Mapping[str, Path]]]
    options: tuple[str, ...] = ()


def variants(base: Path, experts: Mapping[str, Path], folder: Path, kinds: Sequence[str]) -> dict[str, Variant]:
    """Those of `kinds`, with what they need made in a folder."""
    slots = ("--max-loras", str(len(experts)))
    alone = ("--additional-config", json.dumps({"meswitch": {"loras": False}}))

    def loras() -> Variant:
        made = {
            name: make_adapter(base, folder / f"{name}-lora", seed=seed, rank=LORA_RANK, targets=LORA_TARGETS)
            for seed, name in enumerate(experts)
        }
        return Variant([(base, made)], (*slots, "--max-lora-rank", str(LORA_RANK)))

    def models() -> Variant:
        checkpoint = Checkpoint.open(str(base))
        return Variant(
            [(restore(Artifact.open(path), checkpoint, folder / name), {}) for name, path in experts.items()]
        )

    made: dict[str, Callable[[], Variant]] = {
        "experts": lambda: Variant([(base, experts)], (*slots, *alone)),
        "a process for each model": models,
        "experts, eager": lambda: Variant([(base, experts)], (*slots, *alone, "--enforce-eager")),
        "LoRAs, eager": loras,
    }
    return {name: made[name]() for name in kinds}


class Running:
    """A variant's servers. The first begins to start here; what vLLM compiles for it, the others find."""

    def __init__(self, variant: Variant, folder: Path, cache: Path, threads: int) -> None:
        self._variant, self._folder = variant, folder
        share = len(variant.servers)
        self._options = (*variant.options, "--kv-cache-memory-bytes", str(CACHE_BYTES // share))
        self._environment = {
            "OMP_NUM_THREADS": str(max(1, threads // share)),
            "VLLM_CACHE_ROOT": str(cache),
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        }
        self._servers: list[tuple[PlainServer, Path, Mapping[str, Path]]] = []
        self._start(*variant.servers[0])

    def wait(self) -> None:
        """Until all have started."""
        self._servers[0][0].__enter__()
        for model, adapters in self._variant.servers[1:]:
            self._start(model, adapters)
        for server, *_ in self._servers[1:]:
            server.__enter__()

    def stop(self) -> None:
        for server, *_ in self._servers:
            server.__exit__()

    def _start(self, model: Path, adapters: Mapping[str, Path]) -> None:
        own = self._folder / str(len(self._servers))
        own.mkdir(parents=True)
        server = PlainServer(model, adapters, own, *self._options, environment=self._environment)
        self._servers.append((server, model, adapters))

    def answer(self, load: Load, seed: int) -> dict[str, float]:
        """Send all servers their part of a load at once."""
        told = asyncio.run(self._answer(load, seed))
        return {
            # Processes share the machine, so the load is over when the last of them is.
            "tokens_per_second": sum(item["total_output_tokens"] for item in told)
            / max(item["duration"] for item in told),
            "ttft_ms": float(statistics.mean(item["median_ttft_ms"] for item in told)),
            "tpot_ms": float(statistics.mean(item["median_tpot_ms"] for item in told)),
            "completed": sum(item["completed"] for item in told),
        }

    async def _answer(self, load: Load, seed: int) -> list[dict[str, Any]]:
        from vllm.benchmarks import serve

        share = len(self._servers)
        part = Load(load.requests // share, load.input_tokens, load.output_tokens, max(1, load.concurrency // share))
        work = [
            serve.main_async(_arguments(server.port, model, adapters, part, max(1, WARM_UPS // share), seed))
            for server, model, adapters in self._servers
        ]
        with contextlib.redirect_stdout(io.StringIO()):
            return list(await asyncio.gather(*work))

    def memory(self) -> dict[str, float]:
        """Of all its processes: what each has in memory added up, and without what it may share with others, GB."""
        told = []
        for server, *_ in self._servers:
            process = psutil.Process(server.process.pid)
            told += [item.memory_full_info() for item in (process, *process.children(recursive=True))]
        return {"rss_gb": sum(item.rss for item in told) / 1e9, "own_gb": sum(item.uss for item in told) / 1e9}


def _arguments(
    port: int, model: Path, adapters: Mapping[str, Path], load: Load, warm_ups: int, seed: int
) -> argparse.Namespace:
    """Of `vllm bench serve`."""
    from vllm.benchmarks import serve

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
        "num-warmups": warm_ups,
        "seed": seed,
        "temperature": 0,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    words += ["--ignore-eos", "--disable-tqdm"]
    if adapters:
        words += ["--lora-modules", *adapters, "--lora-assignment", "round-robin"]
    parser = argparse.ArgumentParser()
    serve.add_cli_args(parser)
    return parser.parse_args(words)


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Medians over the rounds, the least and the most in brackets, as Markdown."""
    lines = [
        "| | tokens/s | first token, ms | each further one, ms | memory, GB | not shared, GB |",
        "|---|---|---|---|---|---|",
    ]
    for name, figures in found.items():
        cells = []
        for figure, digits in (("tokens_per_second", 1), ("ttft_ms", 0), ("tpot_ms", 0)):
            values = [item[figure] for item in figures["rounds"]]
            least, most = (f"{value:.{digits}f}" for value in (min(values), max(values)))
            cells.append(f"{statistics.median(values):.{digits}f} [{least}, {most}]")
        cells += [f"{figures['memory'][figure]:.1f}" for figure in ("rss_gb", "own_gb")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def page(options: argparse.Namespace, machine: str, found: Mapping[str, Mapping[str, Any]]) -> str:
    """The results' page."""
    names = [item.partition("=")[0] for item in options.expert]
    command = " ".join(["python tests bench scale_out --base BASE", *(f"--expert {name}=ARTIFACT" for name in names)])
    told = (
        f"The models take turns in {options.requests} requests of {options.input} tokens for {options.output} more "
        f"each, {options.concurrency} at once; {options.threads} threads for each variant, {options.rounds} rounds: "
        "the median, the least and the most."
    )
    command += f" --requests {options.requests} --output {options.output} --rounds {options.rounds}"
    left = [name for name, variants in COMPARISONS.items() if not found.keys() >= set(variants)]
    command += "".join(f" --comparison {name}" for name in COMPARISONS if left and name not in left)
    missing = f" Not measured yet: {', '.join(left)}." if left else ""
    return f"{INTRO.read_text(encoding='utf-8')}\n{told}{missing}\n\n{table(found)}\n\n`{command}`; {machine}.\n"


def compare(
    served: Mapping[str, Variant], load: Load, threads: int, rounds: int, folder: Path, cache: Path
) -> dict[str, dict[str, Any]]:
    """Figures of each variant's rounds, and the memory that its servers then have."""
    started = time.monotonic()
    with ExitStack() as stack:
        running = {}
        for number, (name, variant) in enumerate(served.items()):
            running[name] = Running(variant, folder / f"servers-{number}", cache, threads)
            stack.callback(running[name].stop)
        for item in running.values():
            item.wait()
        _say(f"started {', '.join(running)} in {time.monotonic() - started:.0f} s")
        found: dict[str, dict[str, Any]] = {name: {"rounds": []} for name in running}
        for number in range(rounds):
            # Each is first in its turn.
            for name in reversed(running) if number % 2 else running:
                found[name]["rounds"].append(running[name].answer(load, seed=1 + number))
                _say(f"round {number}, {name}: {found[name]['rounds'][-1]}")
        for name, item in running.items():
            found[name]["memory"] = item.memory()
    return found


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--expert", action="append", required=True, help="NAME=ARTIFACT; four of them")
    parser.add_argument("--comparison", action="append", choices=COMPARISONS, help="repeatable; both unless given")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--input", type=int, default=64)
    parser.add_argument("--output", type=int, default=32)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2, help="of each variant, shared between its servers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=Path("build/vllm-cache"), help="where compiled code is kept")
    parser.add_argument("--out", type=Path, default=Path("build/scale_out.json"))
    parser.add_argument("--page", type=Path, help="Markdown that is written with the figures")
    options = parser.parse_args()
    experts = {name: Path(path).resolve() for name, _, path in (item.partition("=") for item in options.expert)}
    load = Load(options.requests, options.input, options.output, options.concurrency)
    report: dict[str, Any] = {"machine": describe(), "load": asdict(load), "threads": options.threads}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    cache = options.cache.resolve()
    found: dict[str, dict[str, Any]] = {}
    for name in options.comparison or COMPARISONS:
        with tempfile.TemporaryDirectory() as folder:
            served = variants(options.base.resolve(), experts, Path(folder), COMPARISONS[name])
            found |= compare(served, load, options.threads, options.rounds, Path(folder), cache)
        options.out.write_text(json.dumps(report | {"variants": found}, indent=1) + "\n")
    print(table(found))
    if options.page:
        options.page.write_text(page(options, report["machine"], found), encoding="utf-8")


if __name__ == "__main__":
    main()
