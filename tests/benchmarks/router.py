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

import torch
from torch.nn.functional import normalize

import zoo
from benchmarks import router_data, router_gates, router_lm
from benchmarks.machine import describe
from benchmarks.router_development import load_development
from benchmarks.router_report import write_report
from benchmarks.router_report_data import load_report
from meswitch_cli.model.tokenizer import load_tokenizer
from meswitch_cli.router.backends.base import BaseHiddenStates
from meswitch_cli.router.backends.probe_fitting import best_layer, fisher_ratio, layers_to_try
from meswitch_cli.router.backends.texts import encode
from meswitch_cli.router.decide.gates import distance_threshold, fit_distances
from meswitch_cli.router.decide.head import PENALTIES, cross_entropy, fit_head
from meswitch_cli.router.decide.model import RouterModel
from meswitch_cli.router.store.features import FeatureStore
from meswitch_cli.router.train import gating, generalising
from meswitch_cli.router.train.data import Example, gather
from meswitch_cli.router.train.evaluation import measure_features
from meswitch_cli.router.train.fitting import badness, fit_model
from meswitch_cli.router.train.general import General
from meswitch_cli.router.train.rewording import measure_rewording, reword
from meswitch_cli.router.train.split import split
from meswitch_cli.router.train.training import GENERAL_PART, labelled, scaled_store

TARGET_PRECISION = 0.95
MAX_TOKENS = 256
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


@dataclass(frozen=True)
class HiddenStates:
    """Hidden states of every text by layer, `[n, hidden]`, mean over tokens."""

    rows: Mapping[str, int]
    by_layer: Mapping[int, torch.Tensor]

    def of(self, examples: Sequence[Example], layers: Sequence[int]) -> torch.Tensor:
        """Of length 1 in each layer, several layers side by side."""
        index = [self.rows[example.text] for example in examples]
        return torch.cat([normalize(self.by_layer[layer][index], dim=1) for layer in layers], dim=1)


def read(base: Path, texts: Sequence[str], scratch: Path) -> HiddenStates:
    """Read them with the base's first half, but for those that an earlier run left."""
    file = scratch / "hidden_states.pt"
    kept: dict[str, Any] = torch.load(file, weights_only=True) if file.exists() else {"texts": [], "by_layer": {}}
    known = set(kept["texts"])
    texts = [text for text in texts if text not in known]
    layers = layers_to_try(BaseHiddenStates(str(base), 1).num_hidden_layers)
    if texts:
        kept = _joined(kept, texts, _read(base, texts, layers))
        torch.save(kept, file)
    return HiddenStates({text: row for row, text in enumerate(kept["texts"])}, kept["by_layer"])


def _joined(kept: Mapping[str, Any], texts: Sequence[str], found: Mapping[int, torch.Tensor]) -> dict[str, Any]:
    by_layer = {layer: torch.cat([kept["by_layer"].get(layer, found[layer][:0]), found[layer]]) for layer in found}
    return {"texts": [*kept["texts"], *texts], "by_layer": by_layer}


def _read(base: Path, texts: Sequence[str], layers: Sequence[int]) -> dict[int, torch.Tensor]:
    tokenizer = load_tokenizer(base)
    token_ids = [encode(tokenizer, text, MAX_TOKENS) for text in texts]
    done = 0

    def heard(count: int) -> None:
        nonlocal done
        done += count
        print(f"hidden states: {done}/{len(texts)}", file=sys.stderr, flush=True)

    return BaseHiddenStates(str(base), max(layers)).pooled_at(token_ids, layers, heard)


@dataclass(frozen=True)
class Data:
    """Training prompts dealt and scaled at some layers, as `train_router` does it."""

    labels: tuple[str, ...]
    store: FeatureStore
    scaling: Any
    layers: tuple[int, ...]

    @classmethod
    def of(cls, train: Sequence[Example], states: HiddenStates, layers: Sequence[int], seed: int = 0) -> Data:
        gathered = gather(train)
        parts = split(gathered.examples, seed)
        general = General.without(gathered.examples)
        members: dict[str, Sequence[Example]] = {**parts, GENERAL_PART: general.examples}
        texts = {name: labelled(found, gathered.labels) for name, found in members.items()}
        features = {name: states.of(found, layers) for name, found in members.items()}
        scaling, store = scaled_store(parts, texts, general, features, standardise=True)
        return cls(gathered.labels, store, scaling, tuple(layers))

    def separation(self) -> float:
        rows = self.store.rows("train")
        return fisher_ratio(self.store.features[rows], self.store.labels[rows])

    def model(self) -> RouterModel:
        return fit_model(self.labels, self.scaling, self.store, target_precision=TARGET_PRECISION, seed=0)

    def without_general(self) -> Data:
        """The same with no general prompts, as routers were trained before."""
        kept = ~self.store.general_rows()
        tensors = {name: tensor[kept] for name, tensor in self.store.tensors().items()}
        return replace(self, store=FeatureStore.from_tensors(tensors))


_BEST: dict[tuple[str, ...], Data] = {}


def best(train: Sequence[Example], states: HiddenStates) -> Data:
    """At the layer that training would choose: by what it knows itself."""
    key = tuple(example.text for example in train)
    if key not in _BEST:
        _BEST[key] = _best(train, states)
    return _BEST[key]


def _best(train: Sequence[Example], states: HiddenStates) -> Data:
    made = {layer: Data.of(train, states, [layer]) for layer in states.by_layer}
    errors = {layer: badness(data.store, data.labels) for layer, data in made.items()}
    return made[best_layer(errors, {layer: data.separation() for layer, data in made.items()})]


def figures(
    model: RouterModel, states: HiddenStates, layers: Sequence[int], examples: Sequence[Example]
) -> dict[str, Any]:
    truth = [example.domain for example in examples]
    return measure_features(model, states.of(examples, layers), truth, TARGET_PRECISION)


Method = Callable[[Sequence[Example], HiddenStates], tuple[RouterModel, tuple[int, ...]]]


def before(train: Sequence[Example], states: HiddenStates) -> tuple[RouterModel, tuple[int, ...]]:
    """A head of the experts' own prompts, Mahalanobis distance, its line between two of their quantiles."""
    data = Data.of(train, states, [sorted(states.by_layer)[1]]).without_general()
    store = data.store
    rows, validation, calibration = (store.rows(part) for part in ("train", "validation", "calibration"))
    tried = [fit_head(store.features[rows], store.targets[rows], penalty) for penalty in PENALTIES]
    losses = [float(cross_entropy(made(store.features[validation]), store.targets[validation])) for made in tried]
    head = tried[losses.index(min(losses))]
    gate = fit_distances(store.features[rows], store.labels[rows], len(data.labels), 0)
    null = gate.distances(store.features[store.rows("calibration", null=True)])
    line = distance_threshold(gate.distances(store.features[calibration]), null)
    return RouterModel(data.labels, data.scaling, head, replace(gate, threshold=line), 1.0, 0.5), data.layers


def mahalanobis(train: Sequence[Example], states: HiddenStates) -> tuple[RouterModel, tuple[int, ...]]:
    """The product's head; Mahalanobis distance with the line where general prompts and adopted ones part."""
    data = best(train, states)
    known, model = generalising.Known.of(data.store, len(data.labels)), data.model()
    own = known.adopted | data.store.rows("train")
    gate = fit_distances(data.store.features[own], known.owners[own], len(data.labels), 0)
    inside, outside = (gate.distances(data.store.features[rows]) for rows in (known.adopted, known.foreign))
    return replace(model, gate=replace(gate, threshold=gating.separating_line([inside], [outside]))), data.layers


def without_adoption(train: Sequence[Example], states: HiddenStates) -> tuple[RouterModel, tuple[int, ...]]:
    """Fields that are an expert's are left out of the general prompts, and teach nothing."""
    data = best(train, states)
    known = generalising.Known.of(data.store, len(data.labels))
    kept = ~(data.store.general_rows() & (known.owners != generalising.NOBODY))
    tensors = {name: tensor[kept] for name, tensor in data.store.tensors().items()}
    return replace(data, store=FeatureStore.from_tensors(tensors)).model(), data.layers


def neighbours_alone(train: Sequence[Example], states: HiddenStates) -> tuple[RouterModel, tuple[int, ...]]:
    """The product's head; the gate of format version 2, its line where a tenth of other fields' prompts pass."""
    data = best(train, states)
    known, model = generalising.Known.of(data.store, len(data.labels)), data.model()
    gate = router_gates.Fitted(known, len(data.labels)).plain_neighbours()
    distances = router_gates.unseen_distances(gate, known)
    inside, outside = distances[known.adopted], distances[known.foreign]
    line = max(gating.separating_line([inside], [outside]), float(outside.quantile(0.1)))
    return replace(model, gate=replace(gate, threshold=line)), data.layers


def product(train: Sequence[Example], states: HiddenStates) -> tuple[RouterModel, tuple[int, ...]]:
    """What `train-router` makes."""
    data = best(train, states)
    return data.model(), data.layers


def timing(train: Sequence[Example], states: HiddenStates) -> dict[str, Any]:
    """Processor seconds of a fit without its hidden states, and milliseconds of a judgement without them."""
    started = time.process_time()
    data = _best(train, states)
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
