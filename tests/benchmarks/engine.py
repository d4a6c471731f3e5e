"""Throughput and memory of the embedded engine on a CPU: writes docs/results/engine.md.

    python tests bench engine throughput --artifacts DIR --new-tokens 32 [--repeats 3]
    python tests bench engine rest --artifacts DIR [--repeats 3]

One base and three experts in one engine are set against the same requests on four full models, one after another in
the same engine, in one run, interleaved; the memory of each side in a process of its own. The artifacts are compressed
into DIR once, and the figures of each part are kept beside them, so that no part holds the machine for long.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import zoo
from benchmarks.engine_report import write_report
from benchmarks.machine import describe
from meswitch_cli.compression.job import compress, prepare
from meswitch_cli.compression.settings import CompressionSettings
from meswitch_cli.engine import EngineSettings, TransformersEngine, generate
from meswitch_cli.engine.contract import BASE, GenerationRequest, Sampling

TESTS = Path(__file__).parents[1]
RESULTS = Path(__file__).parents[2] / "docs" / "results" / "engine.md"
DTYPE = "bfloat16"
REQUESTS = 16
CACHE_TOKENS = 8192
SYSTEM_TOKENS = 384


def artifacts(family: zoo.Zoo, folder: Path) -> dict[str, Path]:
    """The three experts at 2 bits, compressed into `folder` unless they are there."""
    made = {}
    for name in zoo.EXPERTS:
        made[name] = folder / name
        if not (made[name] / "meswitch.json").exists():
            compress(prepare(str(family.base), str(family.experts[name]), made[name], CompressionSettings(), None))
    return made


def start(base: Path, experts: dict[str, Path], cache_tokens: int, **settings: object) -> TransformersEngine:
    options = {"dtype": DTYPE, "max_model_len": 512, "cache_tokens": cache_tokens, "prefix_sharing": False} | settings
    engine = TransformersEngine(EngineSettings(base=str(base), experts=experts, **options))
    engine.start()
    return engine


def prompts(family: zoo.Zoo) -> dict[str, list[tuple[int, ...]]]:
    """Questions of each expert's own domain, and of all domains for the base."""
    tokenizer = AutoTokenizer.from_pretrained(family.base)

    def encode(text: str) -> tuple[int, ...]:
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
        )
        return tuple(tokenizer.encode(chat, add_special_tokens=False)[-256:])

    own = {name: [encode(item["prompt"]) for item in zoo.items(name, "report")[:REQUESTS]] for name in zoo.EXPERTS}
    own[BASE] = [prompt for group in zip(*own.values(), strict=True) for prompt in group][:REQUESTS]
    return own


def requests(
    names: Sequence[str], texts: dict[str, list[tuple[int, ...]]], count: int, new: int
) -> list[GenerationRequest]:
    sampling = Sampling(temperature=0, max_tokens=new, ignore_eos=True)
    return [
        GenerationRequest(
            f"request-{i}", names[i % len(names)], texts[names[i % len(names)]][i // len(names)], sampling
        )
        for i in range(count)
    ]


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def resident_bytes() -> int:
    line = next(item for item in Path("/proc/self/status").read_text().splitlines() if item.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def measure_memory(side: str, folder: Path, new: int) -> None:
    """In a process of its own: start one side, generate, and print its resident bytes before and after."""
    family, before = zoo.paths(), resident_bytes()
    texts = prompts(family)
    if side == "mixed":
        engines = [(start(family.base, artifacts(family, folder), CACHE_TOKENS), [BASE, *zoo.EXPERTS])]
    else:
        models = {BASE: family.base, **{name: family.experts[name] for name in zoo.EXPERTS}}
        engines = [(start(path, {}, CACHE_TOKENS // 4), [name]) for name, path in models.items()]
    for engine, names in engines:
        batch = requests(names, texts, REQUESTS // len(engines), new)
        generate(engine, [_for(request, BASE) for request in batch] if side != "mixed" else batch)
    print(json.dumps({"before": before, "after": resident_bytes()}))
    for engine, _ in engines:
        engine.stop()


def _for(request: GenerationRequest, name: str) -> GenerationRequest:
    return GenerationRequest(request.id, name, request.prompt_tokens, request.sampling)


def memory_of(side: str, folder: Path) -> dict[str, int]:
    command = [sys.executable, str(TESTS), "bench", "engine", "memory", "--side", side, "--artifacts", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, int] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def copy_bandwidth() -> float:
    """Bytes a second at which this machine copies memory, the best of five."""
    source = torch.ones(256 << 20, dtype=torch.uint8)
    target = torch.empty_like(source)
    return source.nbytes / min(seconds(lambda: target.copy_(source)) for _ in range(5))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=["throughput", "rest", "report", "memory"])
    parser.add_argument("--artifacts", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--side", choices=["mixed", "separate"], default="mixed")
    arguments = parser.parse_args()
    folder, new, repeats = arguments.artifacts, arguments.new_tokens, arguments.repeats
    if arguments.part == "memory":
        measure_memory(arguments.side, folder, 2)
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "figures.json"
    figures = json.loads(file.read_text()) if file.exists() else {}
    if arguments.part == "throughput":
        figures[f"throughput {new}"] = throughput(folder, repeats, new)
    elif arguments.part == "rest":
        figures["rest"] = rest(folder, repeats)
    file.write_text(json.dumps(figures, indent=1))
    write_report(figures, RESULTS)


def throughput(folder: Path, repeats: int, new: int) -> dict[str, Any]:
    """Seconds of each measure, in interleaved runs, for `new` tokens a request."""
    family = zoo.paths()
    texts, experts = prompts(family), artifacts(family, folder)
    mixed = start(family.base, experts, CACHE_TOKENS)
    full = {name: start(family.experts[name], {}, CACHE_TOKENS // 4) for name in zoo.EXPERTS}
    plain = start(family.base, {}, CACHE_TOKENS // 4)
    everyone = [BASE, *zoo.EXPERTS]
    first = zoo.EXPERTS[0]

    def on_mixed(names: Sequence[str], count: int) -> float:
        batch = requests(names, texts, count, new)
        return seconds(lambda: generate(mixed, batch))

    def on_separate() -> float:
        batch = requests(everyone, texts, REQUESTS, new)

        def one_after_another() -> None:
            for name in everyone:
                engine = plain if name == BASE else full[name]
                generate(engine, [_for(request, BASE) for request in batch if request.expert == name])

        return seconds(one_after_another)

    measures: dict[str, Callable[[], float]] = {
        "mixed": lambda: on_mixed(everyone, REQUESTS),
        "separate": on_separate,
        "base, 1": lambda: on_mixed([BASE], 1),
        "expert, 1": lambda: on_mixed([first], 1),
        f"base, {REQUESTS}": lambda: on_mixed([BASE], REQUESTS),
        f"expert, {REQUESTS}": lambda: on_mixed([first], REQUESTS),
    }
    on_mixed(everyone, 4)
    taken: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(repeats):
        for name, measure in measures.items():
            taken[name].append(measure())
    for engine in (*full.values(), plain, mixed):
        engine.stop()
    lengths = [len(request.prompt_tokens) for request in requests(everyone, texts, REQUESTS, new)]
    return {"machine": describe(), "seconds": taken, "prompt": sum(lengths) / len(lengths), "requests": REQUESTS}


def rest(folder: Path, repeats: int) -> dict[str, Any]:
    """Memory of either side, sharing of a system prompt, and loads into slots."""
    family = zoo.paths()
    texts, experts = prompts(family), artifacts(family, folder)
    mixed = start(family.base, experts, CACHE_TOKENS)
    prefix = prefix_sharing(family, mixed, experts, texts, repeats)
    loads = mixed.statistics()
    mixed.stop()
    return {
        "machine": describe(),
        "prefix": prefix,
        "system tokens": SYSTEM_TOKENS,
        "load bytes": loads.slot_load_bytes,
        "load bandwidth": loads.slot_load_bytes / loads.slot_load_seconds,
        "copy bandwidth": copy_bandwidth(),
        "memory": {side: memory_of(side, folder) for side in ("mixed", "separate")},
    }


def prefix_sharing(
    family: zoo.Zoo,
    without: TransformersEngine,
    experts: dict[str, Path],
    texts: dict[str, list[tuple[int, ...]]],
    repeats: int,
) -> dict[str, float]:
    """Seconds for twelve requests, three of each model after a first, whose long beginning is one system prompt."""
    system = tuple(token for text in texts[BASE] for token in text)[:SYSTEM_TOKENS]
    sampling = Sampling(temperature=0, max_tokens=2, ignore_eos=True)
    shared = start(family.base, experts, CACHE_TOKENS, prefix_sharing=True)
    taken: dict[str, list[float]] = {"sharing": [], "not sharing": []}
    for repeat in range(repeats):
        for label, engine in (("sharing", shared), ("not sharing", without)):
            batch = [
                GenerationRequest(f"{name}-{i}", name, (*system, 100 + repeat, *texts[name][i][-24:]), sampling)
                for name in [BASE, *zoo.EXPERTS]
                for i in range(3)
            ]
            if repeat == 0:
                generate(engine, batch)
            taken[label].append(seconds(lambda engine=engine, batch=batch: generate(engine, batch)))
    shared.stop()
    return {label: statistics.median(values) for label, values in taken.items()}


if __name__ == "__main__":
    main()
