"""Routers on other people's prompts: writes docs/results/router.md.

    python tests bench router --packages FOLDER --scratch FOLDER [--quick]

`benchmarks.router_data` and `benchmarks.router_report_data` say what the packages are. Settings were chosen on the
other sources of the former and on `benchmarks.router_development`; `router_report_data` is for figures alone. Hidden
states are read once and kept in the scratch folder.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import zoo
from benchmarks import router_data, router_gates, router_lm
from benchmarks.machine import describe
from benchmarks.router_development import load_development
from benchmarks.router_methods import (
    Data,
    Method,
    at_best_layer,
    before,
    best,
    figures,
    mahalanobis,
    neighbours_alone,
    product,
    without_adoption,
)
from benchmarks.router_report import write_report
from benchmarks.router_report_data import load_report
from benchmarks.router_states import HiddenStates, read
from meswitch_cli.router.decide.model import RouterModel
from meswitch_cli.router.train import generalising
from meswitch_cli.router.train.data import Example
from meswitch_cli.router.train.fitting import badness
from meswitch_cli.router.train.general import General
from meswitch_cli.router.train.rewording import measure_rewording, reword

TRAIN, LARGE = 200, 250
CURVE = (5, 10, 20, 50, 250)
#: Domains of other people's examinations beside the zoo's three; 80 prompts each to learn from, 40 to judge by.
MORE_DOMAINS = {
    "radio": "fcc_amateur_extra/samples",
    "law": "us_tort_law/samples",
    "medicine": "medmcqa/samples",
    "security": "cissp-study-questions/samples",
    "french": "french-exams-qa/samples",
}
MORE_TRAIN, MORE_TEST = 80, 40
#: Every tenth of the reported prompts is put in other words.
REWORDED_STEP = 10
#: Characters; other people's prompts by length.
BANDS = ((0, 80), (80, 200), (200, 500), (500, 1 << 30))


def timing(train: Sequence[Example], states: HiddenStates) -> dict[str, Any]:
    """Processor seconds of a fit without its hidden states, and milliseconds of a judgement without them."""
    started = time.process_time()
    data = at_best_layer(train, states)
    model = data.model()
    fit_seconds = time.process_time() - started
    one = states.of(train[:1], data.layers)
    took = []
    for _ in range(200):
        started = time.perf_counter()
        model.judge(one)
        took.append(1000 * (time.perf_counter() - started))
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in model.tensors().items()}
    return {"fit_seconds": fit_seconds, "judge_ms": statistics.median(took), "bytes": sizes}


@dataclass(frozen=True)
class Run:
    """Everything that a stage measures with."""

    train: list[Example]
    large: list[Example]
    siblings: list[Example]
    small_talk: list[Example]
    chosen_on: list[Example]
    development: list[Example]
    report: list[Example]
    more: dict[str, list[Example]]
    asked: list[Example]
    rewordings: dict[str, list[Example]]
    states: HiddenStates
    base: Path
    scratch: Path

    @classmethod
    def load(cls, packages: Path, scratch: Path, *, quick: bool) -> Run:
        prompts = router_data.load(packages, quick=quick, count=LARGE)
        large = [example for example in prompts.train if example.domain is not None]
        chosen_on = [*prompts.other_sources, *prompts.null]
        used = [*prompts.train, *prompts.test, *chosen_on]
        report = load_report(packages, {example.text for example in used})
        more = {
            name: router_data.spread(router_data.read_set(_evals(packages), source, name), MORE_TRAIN + MORE_TEST)
            for name, source in MORE_DOMAINS.items()
        }
        development = load_development(packages, {example.text for example in [*used, *report]})
        asked = report[::REWORDED_STEP]
        rewordings = {
            name: [replace(item, text=text) for item, text in zip(asked, texts, strict=True)]
            for name, texts in reword(item.text for item in asked).items()
        }
        groups = [used, report, development, *rewordings.values(), *more.values(), General.without([]).examples]
        texts = list(dict.fromkeys(example.text for group in groups for example in group))
        return cls(
            train=[example for name in zoo.EXPERTS for example in router_data.spread(_of(large, name), TRAIN)],
            large=large,
            siblings=prompts.test,
            small_talk=[example for example in prompts.train if example.domain is None],
            chosen_on=chosen_on,
            development=development,
            report=report,
            more=more,
            asked=asked,
            rewordings=rewordings,
            states=read(zoo.paths(quick).base, texts, scratch),
            base=zoo.paths(quick).base,
            scratch=scratch,
        )


def methods_stage(run: Run) -> dict[str, Any]:
    methods: dict[str, Method] = {"before": before, "mahalanobis": mahalanobis, "without adoption": without_adoption}
    methods |= {"neighbours": neighbours_alone, "product": product}
    found = {}
    for name, method in methods.items():
        file = run.scratch / f"method-{name.replace(' ', '-')}.json"
        if file.exists():
            found[name] = json.loads(file.read_text())
            continue
        # Routers of before had to be given null prompts; the others are trained on the experts' own alone.
        model, layers = method([*run.train, *run.small_talk] if name == "before" else run.train, run.states)
        sets = {"chosen_on": run.chosen_on, "development": run.development, "report": run.report}
        sets |= {"siblings": run.siblings}
        found[name] = {which: figures(model, run.states, layers, items) for which, items in sets.items()}
        found[name] |= {"layers": layers}
        file.write_text(json.dumps(found[name], indent=1))
        print(name, file=sys.stderr, flush=True)
    return found


def product_stage(run: Run) -> dict[str, Any]:
    """What is told of the product alone."""
    model, layers = product(run.train, run.states)
    bands = {
        f"{low} to {high}" if high < 1 << 30 else f"{low} and more": figures(
            model, run.states, layers, [item for item in run.report if low <= len(item.text) < high]
        )
        for low, high in BANDS
    }
    made = {layer: Data.of(run.train, run.states, [layer]) for layer in run.states.by_layer}
    return {
        "sets": _sets(run.report),
        "modes": {mode: _at_mode(model, run.states, layers, run.report, mode) for mode in ("strict", "normal", "off")},
        "bands": bands,
        "rewording": _rewording(model, run.states, layers, run.asked, run.rewordings),
        "by_set": _by_set(model, run.states, layers, run.report),
        "choice": {
            str(layer): {"badness": badness(data.store, data.labels), "fisher": data.separation()}
            for layer, data in made.items()
        },
    }


def gates_stage(run: Run) -> dict[str, Any]:
    return _gates(run.train, run.states, {"development": run.development, "chosen_on": run.chosen_on})


def curve_stage(run: Run) -> dict[str, Any]:
    found = {}
    for count in CURVE:
        few = [item for name in zoo.EXPERTS for item in router_data.spread(_of(run.large, name), count)]
        model, layers = product(few, run.states)
        found[str(count)] = figures(model, run.states, layers, run.report) | {"layers": layers}
        print(f"{count} prompts", file=sys.stderr, flush=True)
    return found


def more_domains_stage(run: Run) -> dict[str, Any]:
    few = [item for name in zoo.EXPERTS for item in router_data.spread(_of(run.train, name), MORE_TRAIN)]
    test = [item for name in zoo.EXPERTS for item in router_data.spread(_of(run.siblings, name), MORE_TEST)]
    model, layers = product([*few, *(item for items in run.more.values() for item in items[MORE_TEST:])], run.states)
    held_out = [*test, *(item for items in run.more.values() for item in items[:MORE_TEST])]
    return {
        "held_out": figures(model, run.states, layers, held_out),
        "others": figures(model, run.states, layers, [item for item in run.report if item.domain]),
    }


def lm_stage(run: Run) -> dict[str, Any]:
    """The paper's router, and the latency of it and of the probe."""
    asked, figures = router_lm.train_and_judge(
        run.base, run.train, {"report": run.report, "siblings": run.siblings}, run.scratch
    )
    model, layers = product(run.train, run.states)
    return figures | {"latency": router_lm.latency(run.base, run.siblings, model, layers[0], asked)}


STAGES: dict[str, Callable[[Run], dict[str, Any]]] = {
    "methods": methods_stage,
    "product": product_stage,
    "gates": gates_stage,
    "curve": curve_stage,
    "more_domains": more_domains_stage,
    "timing": lambda run: timing(run.train, run.states),
    "lm": lm_stage,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True, help="hidden states and figures are left here")
    parser.add_argument("--quick", action="store_true", help="the quick zoo: its base and items are the full one's")
    parser.add_argument("--stages", default=",".join(STAGES), help="measure these; those whose figures lie there stay")
    arguments = parser.parse_args()
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    files = {stage: arguments.scratch / f"{stage}.json" for stage in STAGES}
    missing = [stage for stage in arguments.stages.split(",") if not files[stage].exists()]
    run = Run.load(arguments.packages, arguments.scratch, quick=arguments.quick) if missing else None
    for stage in missing:
        assert run is not None
        files[stage].write_text(json.dumps({"figures": STAGES[stage](run), "machine": describe()}, indent=1))
        print(f"stage {stage}", file=sys.stderr, flush=True)
    measured = {stage: json.loads(file.read_text()) for stage, file in files.items() if file.exists()}
    if {"methods", "product"} <= set(measured):
        machines = list(dict.fromkeys(item["machine"] for item in measured.values()))
        write_report({stage: item["figures"] for stage, item in measured.items()}, machines)


def _gates(train: Sequence[Example], states: HiddenStates, sets: Mapping[str, Sequence[Example]]) -> dict[str, Any]:
    data = best(train, states)
    known = generalising.Known.of(data.store, len(data.labels))
    made = {
        name: (data.scaling(states.of(examples, data.layers)), [example.domain for example in examples])
        for name, examples in sets.items()
    }
    return router_gates.compare(known, len(data.labels), made)


def _rewording(
    model: RouterModel,
    states: HiddenStates,
    layers: Sequence[int],
    examples: Sequence[Example],
    reworded: Mapping[str, Sequence[Example]],
) -> dict[str, Any]:
    features = {name: states.of(items, layers) for name, items in reworded.items()}
    texts = [example.text for example in examples]
    return measure_rewording(model, texts, states.of(examples, layers), features)


def _evals(packages: Path) -> Path:
    return packages / "evals" / "registry" / "data"


def _of(examples: Sequence[Example], domain: str) -> list[Example]:
    return [example for example in examples if example.domain == domain]


def _sets(examples: Sequence[Example]) -> dict[str, int]:
    return {str(name): sum(item.domain == name for item in examples) for name in (*zoo.EXPERTS, None)}


def _at_mode(
    model: RouterModel, states: HiddenStates, layers: Sequence[int], examples: Sequence[Example], mode: Any
) -> dict[str, Any]:
    judged = model.judge(states.of(examples, layers), mode)
    inside = [(item, example) for item, example in zip(judged, examples, strict=True) if example.domain]
    routed = [(item, example) for item, example in inside if item.verdict == "routed"]
    null = [item for item, example in zip(judged, examples, strict=True) if example.domain is None]
    return {
        "routed": len(routed) / len(inside),
        "right": sum(item.label == example.domain for item, example in routed) / len(routed),
        "refused": sum(item.verdict != "routed" for item in null) / len(null),
    }


def _by_set(
    model: RouterModel, states: HiddenStates, layers: Sequence[int], examples: Sequence[Example]
) -> dict[str, dict[str, Any]]:
    judged = model.judge(states.of(examples, layers))
    found: dict[str, dict[str, Any]] = {}
    for item, example in zip(judged, examples, strict=True):
        row = found.setdefault(example.where, {"domain": example.domain, "prompts": 0, "right": 0, "routed": 0})
        row["prompts"] += 1
        row["right"] += item.label == example.domain
        row["routed"] += item.verdict == "routed"
    return found


if __name__ == "__main__":
    main()
