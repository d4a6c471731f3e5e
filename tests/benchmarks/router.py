"""Four routers on the zoo's domains: writes docs/results/router.md.

    python tests bench router --packages FOLDER --encoder FOLDER --scratch FOLDER [--stages a,b]

`benchmarks.router_data` says what the packages are; the encoder is any sentence encoder's folder. Every stage leaves
its figures in the scratch folder, so that a run can be stopped and gone on with.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

import zoo
from benchmarks import router_data
from benchmarks.machine import describe
from benchmarks.router_report import write_report
from meswitch_cli.model.tokenizer import load_tokenizer
from meswitch_cli.router.backends.texts import native_dtype, quiet_transformers
from meswitch_cli.router.store import RouterArtifact, open_router, write_router
from meswitch_cli.router.train.data import Example, gather
from meswitch_cli.router.train.editing import add_expert
from meswitch_cli.router.train.evaluation import evaluate
from meswitch_cli.router.train.losses import downstream, expert_losses
from meswitch_cli.router.train.settings import TrainingSettings
from meswitch_cli.router.train.training import train_router

BACKENDS = ("tfidf", "probe", "encoder", "lm")
TARGET_PRECISION = 0.95
LATENCY_TOKENS, LATENCY_REPEATS = 100, 20
DOWNSTREAM_ITEMS = 10


def train_stage(backend: str, prompts: router_data.Prompts, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train on the training prompts, and measure on the held-out ones, on other sources and on other fields."""
    base = str(zoo.paths().base)
    settings = TrainingSettings(
        backend=backend,  # type: ignore[arg-type]
        target_precision=TARGET_PRECISION,
        max_tokens=64 if backend == "lm" else 256,
        lm_steps=arguments.lm_steps,
    )
    # A language model as large as the base takes minutes for what the others take seconds for.
    every, some = (6, 3) if backend == "lm" else (1, 1)
    started = time.perf_counter()
    trained = train_router(
        gather(prompts.train[::some]),
        settings,
        base=base if backend in ("probe", "lm") else None,
        model=arguments.encoder if backend == "encoder" else None,
        on_progress=_progress,
    )
    seconds = time.perf_counter() - started
    folder = arguments.scratch / f"router-{backend}"
    router = trained.router
    test, null = prompts.test[::every], prompts.null[::every]
    artifact = write_router(
        folder, trained.manifest, router.model, trained.backend, trained.store, force=folder.exists()
    )
    return {
        "seconds": seconds,
        "bytes": artifact.nbytes,
        "settings": trained.manifest.settings,
        "notes": trained.report["notes"],
        "thresholds": trained.report["thresholds"],
        "test": evaluate(router, [*test, *null], TARGET_PRECISION),
        "other_sources": evaluate(router, prompts.other_sources[::every], TARGET_PRECISION),
    }


def untrained_letters(prompts: router_data.Prompts) -> dict[str, Any]:
    """How often the base itself, not fine-tuned, answers the question with the right letter."""
    from meswitch_cli.router.backends.lm import LetterModel

    labels = tuple(sorted(zoo.EXPERTS))
    model = LetterModel(zoo.paths().base, labels, max_tokens=64)
    some = prompts.test[::9]
    best = model.letters_head()(model.features([item.text for item in some])).argmax(1)
    right = sum(labels[int(index)] == item.domain for index, item in zip(best, some, strict=True))
    return {"right": right, "prompts": len(some)}


def latency(prompts: router_data.Prompts, arguments: argparse.Namespace) -> dict[str, Any]:
    """Whole decisions on prompts of about 100 tokens beside the base's own prefill of them, taking turns."""
    from transformers import AutoModelForCausalLM

    base = zoo.paths().base
    tokenizer = load_tokenizer(base)
    with quiet_transformers():
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=native_dtype()).eval()
    text = " ".join(item.text for item in prompts.test[:40])
    ids = tokenizer.encode(text)
    windows = [ids[start : start + LATENCY_TOKENS] for start in range(0, 5 * LATENCY_TOKENS, LATENCY_TOKENS)]
    texts = [tokenizer.decode(window) for window in windows]

    routers = {}
    made = [backend for backend in BACKENDS if (arguments.scratch / f"router-{backend}").exists()]
    for backend in made:
        routers[backend] = open_router(arguments.scratch / f"router-{backend}", str(base))
    took: dict[str, list[float]] = {name: [] for name in ("prefill", *made)}
    for repeat in range(LATENCY_REPEATS + 2):
        inputs = torch.tensor([windows[repeat % len(windows)]])
        started = time.perf_counter()
        with torch.inference_mode():
            model(input_ids=inputs, use_cache=True, logits_to_keep=1)
        took["prefill"].append(time.perf_counter() - started)
        for backend, router in routers.items():
            started = time.perf_counter()
            router.route(texts[repeat % len(texts)])
            took[backend].append(time.perf_counter() - started)
    shares = {
        backend: statistics.median(
            mine / base for mine, base in zip(took[backend][2:], took["prefill"][2:], strict=True)
        )
        for backend in made
    }
    return {
        "tokens": LATENCY_TOKENS,
        "dtype": str(native_dtype()),
        "share_of_prefill": shares,
        "median_ms": {name: 1000 * statistics.median(values[2:]) for name, values in took.items()},
        "least_ms": {name: 1000 * min(values[2:]) for name, values in took.items()},
    }


def fourth_expert(prompts: router_data.Prompts, arguments: argparse.Namespace) -> dict[str, Any]:
    """Add an expert to the probe; the others' accuracy on their held-out prompts before and after."""
    artifact = RouterArtifact.open(arguments.scratch / "router-probe")
    backend = open_router(artifact, str(zoo.paths().base)).backend
    name = router_data.FOURTH[0]
    held_out, given = prompts.fourth[:100], prompts.fourth[100:]
    test = [*prompts.test[::3], *held_out]
    edit = add_expert(artifact, backend, name, given)
    features = backend.features([item.text for item in test])
    truth = [item.domain for item in test]

    def right(model: Any, label: str) -> float:
        judged = model.judge(features)
        own = [item.label == label for item, domain in zip(judged, truth, strict=True) if domain == label]
        return sum(own) / len(own)

    return {
        "name": name,
        "prompts": len(given),
        "held_out": len(held_out),
        "feature_seconds": edit.feature_seconds,
        "refit_seconds": edit.refit_seconds,
        "before": {label: right(artifact.model, label) for label in zoo.EXPERTS},
        "after": {label: right(edit.model, label) for label in (*zoo.EXPERTS, name)},
    }


def downstream_stage(prompts: router_data.Prompts, arguments: argparse.Namespace) -> dict[str, Any]:
    """Loss of the chosen expert on held-out responses, for each way of choosing."""
    family = zoo.paths()
    router = open_router(arguments.scratch / "router-probe", str(family.base))
    items: list[Example] = []
    for name in zoo.EXPERTS:
        items += [item for item in prompts.test if item.domain == name][:DOWNSTREAM_ITEMS]
    losses = expert_losses({**family.experts, "base": family.base}, items, None)
    base_losses = losses.pop("base")
    routed = [router.route(item.text).expert for item in items]
    return downstream(losses, base_losses, [str(item.domain) for item in items], routed)


def _progress(what: str, done: int, total: int) -> None:
    if done == total or done % 100 < 8:
        print(f"{what}: {done}/{total}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", type=Path, required=True, help="folder with evals and chatterbot_corpus")
    parser.add_argument("--encoder", type=Path, required=True, help="a sentence encoder's folder")
    parser.add_argument("--scratch", type=Path, required=True, help="routers and figures are left here")
    parser.add_argument("--lm-steps", type=int, default=60)
    parser.add_argument("--stages", default=",".join((*BACKENDS, "untrained", "latency", "fourth", "downstream")))
    arguments = parser.parse_args()
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    file = arguments.scratch / "figures.json"
    figures: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    prompts = router_data.load(arguments.packages)
    figures["prompts"] = {part.name: _counts(getattr(prompts, part.name)) for part in dataclasses.fields(prompts)}
    for stage in arguments.stages.split(","):
        if stage in figures:
            continue
        print(f"stage {stage}", file=sys.stderr, flush=True)
        if stage in BACKENDS:
            figures[stage] = train_stage(stage, prompts, arguments)
        elif stage == "untrained":
            figures[stage] = untrained_letters(prompts)
        else:
            work = {"latency": latency, "fourth": fourth_expert, "downstream": downstream_stage}[stage]
            figures[stage] = work(prompts, arguments)
        figures[stage]["machine"] = describe()
        # Read again: another process may have measured another stage meanwhile.
        figures = (json.loads(file.read_text()) if file.exists() else {}) | figures
        file.write_text(json.dumps(figures, indent=1))
    write_report(figures)


def _counts(examples: list[Example]) -> dict[str, int]:
    names = [str(example.domain) for example in examples]
    return {name: names.count(name) for name in sorted(set(names))}


if __name__ == "__main__":
    main()
