"""What HTTP costs: tokens a second of the same requests over the server and straight into the engine, on the zoo.

python tests bench server EXPERT=ARTIFACT ... [--out docs/results/server.md]

Both go to one engine in one process, taking turns; over HTTP, `meswitch bench` streams from a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import zoo
from benchmarks.machine import describe
from meswitch_cli.client.workload import Workload, make_workload
from meswitch_cli.engine.contract import Chunk, GenerationRequest, Sampling
from meswitch_cli.engine.settings import EngineSettings
from meswitch_cli.engine.transformers_engine import TransformersEngine
from meswitch_cli.server.background import in_background
from meswitch_cli.server.experts import named_experts
from meswitch_cli.server.service import Service
from meswitch_cli.server.settings import ServerSettings

REQUESTS, TOKENS = 16, 48


def in_process(engine: TransformersEngine, workload: Workload) -> float:
    """Tokens a second of the workload, every request submitted at once."""
    left = threading.Semaphore(0)
    count = 0

    def on_chunk(chunk: Chunk) -> None:
        nonlocal count
        count += len(chunk.tokens)
        if chunk.finish_reason is not None:
            left.release()

    started = time.perf_counter()
    for index, request in enumerate(workload.requests):
        messages = [{"role": "user", "content": request.prompt}]
        tokenizer = engine.tokenizer(request.model)
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        sampling = Sampling(temperature=0, max_tokens=TOKENS, ignore_eos=True)
        engine.submit(GenerationRequest(f"direct-{started}-{index}", request.model, tuple(prompt), sampling), on_chunk)
    for _ in workload.requests:
        left.acquire()
    return count / (time.perf_counter() - started)


def over_http(address: str, models: list[str], seed: int) -> dict[str, Any]:
    """The figures of `meswitch bench`, whose workload of one seed is that of `make_workload`."""
    options = [
        "--requests",
        REQUESTS,
        "--concurrency",
        REQUESTS,
        "--max-tokens",
        TOKENS,
        "--ignore-eos",
        "--seed",
        seed,
    ]
    options += [part for model in models for part in ("--model", model)]
    command = [sys.executable, "-m", "meswitch_cli", "bench", "--url", address, "--json", *map(str, options)]
    figures: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("experts", nargs="+")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    experts, _ = named_experts(arguments.experts)
    models = ["base", *experts]
    engine = TransformersEngine(EngineSettings(base=str(zoo.paths(quick=True).base), experts=experts, strict=True))
    engine.start()
    rows = []
    with in_background(Service(engine, ServerSettings(drain_seconds=0))) as address:
        for seed in range(arguments.rounds + 1):
            workload = make_workload(
                models, requests=REQUESTS, concurrency=REQUESTS, max_tokens=TOKENS, ignore_eos=True, seed=seed
            )
            both = {
                "in process": lambda w=workload: in_process(engine, w),
                "HTTP": lambda s=seed: over_http(address, models, s),
            }
            # Who goes first has an empty prefix cache, so they take turns at that too; the first round only warms up.
            told = {name: both[name]() for name in sorted(both, reverse=seed % 2 == 1)}
            if seed:
                rows.append((told["in process"], told["HTTP"]))
            print(seed, told["in process"], told["HTTP"]["tokens_per_second"], file=sys.stderr)
    text = report(rows, len(experts))
    if arguments.out:
        arguments.out.write_text(text)
    print(text)


def report(rows: list[tuple[float, dict[str, Any]]], experts: int) -> str:
    """The page of results."""
    ratios = [http["tokens_per_second"] / direct for direct, http in rows]
    lines = [
        "# What the server costs",
        "",
        f"SmolLM2-135M-Instruct and {experts} experts at 2 bits; {REQUESTS} requests at once over all of them, "
        f"{TOKENS} tokens each, greedy. One engine in one process, the same requests straight into it and over HTTP, "
        "in turns; over HTTP each token is an event of a stream, and the client is another process.",
        "",
        "| round | in process, tokens/s | over HTTP, tokens/s | share | TTFT p50, ms | ITL p50, ms |",
        "|---|---|---|---|---|---|",
    ]
    for index, ((direct, http), ratio) in enumerate(zip(rows, ratios, strict=True), 1):
        times = f"{http['ttft_ms']['p50']:.0f} | {http['itl_ms']['p50']:.0f}"
        lines.append(f"| {index} | {direct:.1f} | {http['tokens_per_second']:.1f} | {ratio:.2f} | {times} |")
    lines += [
        "",
        f"Median share: **{statistics.median(ratios):.2f}** (goal: at least 0.9).",
        "",
        "A share above 1 is no gain: it is how much the machine's other work came and went between the two runs of a "
        "round, and shares below 1 are no surer than that.",
        "",
        f"`python tests bench server NAME=ARTIFACT ...`; {describe()}.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
