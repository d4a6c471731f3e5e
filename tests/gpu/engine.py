"""Part: the embedded engine with a batch of the base, of one expert, of several and of all."""

from __future__ import annotations

import faulthandler
import sys
import time

import torch

from gpu.figures import say
from gpu.load import Steps, measured, run
from gpu.model import Model, parser
from gpu.profiling import profiled
from meswitch_cli.engine import TransformersEngine
from meswitch_cli.engine.contract import BASE

#: All that the profiler may take.
PROFILE_SECONDS = 60


def started(model: Model, what: str, experts: dict, **others: object) -> TransformersEngine:
    """An engine that takes requests; says how long that took, beside other parts that start, and how it generates."""
    with model.starting():
        began = time.perf_counter()
        engine = TransformersEngine(model.settings(experts, **others))
        engine.start()
        seconds = time.perf_counter() - began
    config = engine._thread.continuous_batching_config
    say(
        "start",
        what=what,
        seconds=seconds,
        attention=engine._base.model.config._attn_implementation,
        graphs=str(getattr(config, "cuda_graph_booleans", None)),
        kernels=engine._base.head.multiply.__module__,
        banks_gb=engine._loader.banks.nbytes / 1e9,
        allocated_gb=torch.cuda.memory_allocated() / 1e9 if model.device == "cuda" else None,
    )
    return engine


def decode(
    engine: TransformersEngine,
    model: Model,
    steps: Steps,
    what: str,
    group: list[str],
    requests: int,
    bits: str | None = None,
) -> None:
    """One row: a run that warms up what this batch needs, then the one that counts."""
    sizes = model.sizes
    run(engine, group, requests, sizes.prompt, 3)
    load = run(engine, group, requests, sizes.prompt, sizes.new)
    experts = min(len(set(group) - {BASE}), requests)
    batch = {"bits": bits, "layers": model.sizes.layers, "experts": experts, "requests": requests}
    say("decode", what=what, **batch, **measured(load, steps))
    if load.errors:
        raise SystemExit(f"{what}: {'; '.join(sorted(load.errors))}")


def prefill(engine: TransformersEngine, model: Model, steps: Steps, what: str, group: list[str]) -> None:
    """One row: four long prompts at once, and hardly a token generated."""
    for _ in range(2):
        load = run(engine, group, 4, model.sizes.long, 2)
    row = measured(load, steps)
    names = ("prompt_tokens_per_second", "first_token_ms_p50", "errors")
    experts = min(4, len(set(group) - {BASE}))
    batch = {"layers": model.sizes.layers, "experts": experts, "prompts": 4, "tokens": model.sizes.long}
    say("prefill", what=what, **batch, **{name: row[name] for name in names})


def main() -> None:
    arguments = parser()
    arguments.add_argument("--bits", required=True)
    arguments.add_argument("--many", action="store_true", help="more experts, and only the batches that have all")
    options = arguments.parse_args()
    model, steps = Model(options.scratch, options.tiny), Steps()
    sizes = model.sizes
    experts = model.experts(options.bits, sizes.many if options.many else sizes.experts)
    what, names = f"{options.bits} bit", list(experts)
    engine = started(model, f"{what}, {len(experts)} slots", experts)
    few, some, full = sizes.requests[0], min(sizes.requests[-1], sizes.experts), sizes.requests[-1]
    one, four = names[:1], names[:4]
    batches = [(names, len(names))] if options.many else [
        (names, some), ([BASE], few), (one, few), ([BASE], some), (one, some), (four, some), (four, len(four)),
        (names, full), ([BASE], full),
    ]  # fmt: skip
    try:
        with model.measuring():
            for group, requests in batches:
                who = "base" if group == [BASE] else "experts"
                decode(engine, model, steps, f"{what}: {who}", group, requests, options.bits)
            for group in () if options.many else ([BASE], one, four):
                prefill(engine, model, steps, f"{what}: {'base' if group == [BASE] else 'experts'}", group)
            if model.device == "cuda":
                say("memory", what=what, most_allocated_gb=torch.cuda.max_memory_allocated() / 1e9,
                    most_reserved_gb=torch.cuda.max_memory_reserved() / 1e9)  # fmt: skip
            if not options.many:
                profiles(engine, model, steps, options.bits, names[:some])
    finally:
        engine.stop()


def profiles(engine: TransformersEngine, model: Model, steps: Steps, bits: str, names: list[str]) -> None:
    """What a step launches, of experts and of the base; where the profiler hangs, the part says where and ends."""
    faulthandler.dump_traceback_later(PROFILE_SECONDS, exit=True)
    layers, requests = model.sizes.layers, len(names)
    for who, group in (("experts", names), ("base", [BASE] * requests)):
        batch = {"bits": bits, "layers": layers, "experts": len(set(group) - {BASE}), "requests": requests}
        say("profile", what=f"{bits} bit: {who}", **batch, **profiled(engine, group, steps, model.sizes.steady, layers))
    faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    sys.exit(main())
