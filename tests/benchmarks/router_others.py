"""The probe on other people's prompts: writes docs/results/router_others.md.

    python tests bench router_others --packages FOLDER --scratch FOLDER [--quick]

`benchmarks.router_data` and `benchmarks.router_report_data` say what the packages are. Settings were chosen on the
other sources of the former; the latter is for figures alone. Hidden states are read once and kept in the scratch
folder.
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
from benchmarks import router_data
from benchmarks.machine import describe
from benchmarks.router_others_report import write_report
from benchmarks.router_report_data import load_report
from meswitch_cli.model.tokenizer import load_tokenizer
from meswitch_cli.router.backends.base import BaseHiddenStates
from meswitch_cli.router.backends.probe_fitting import best_layer, layers_to_try
from meswitch_cli.router.backends.texts import encode
from meswitch_cli.router.decide.gates import distance_threshold, fit_distances
from meswitch_cli.router.decide.head import choose_head
from meswitch_cli.router.decide.model import RouterModel
from meswitch_cli.router.store.features import FeatureStore
from meswitch_cli.router.train import gating, generalising
from meswitch_cli.router.train.data import Example, gather
from meswitch_cli.router.train.evaluation import measure_features
from meswitch_cli.router.train.fitting import badness, fit_model
from meswitch_cli.router.train.general import General
from meswitch_cli.router.train.split import split
from meswitch_cli.router.train.training import GENERAL_PART, labelled, scaled_store

TARGET_PRECISION = 0.95
MAX_TOKENS = 256
TRAIN, LARGE = 200, 250
CURVE = (5, 10, 20, 50, 100, 250)
#: Domains of other people's examinations beside the zoo's three; 80 prompts each to learn from, 40 to judge by.
MORE_DOMAINS = {
    "radio": "fcc_amateur_extra/samples",
    "law": "us_tort_law/samples",
    "medicine": "medmcqa/samples",
    "security": "cissp-study-questions/samples",
    "french": "french-exams-qa/samples",
}
MORE_TRAIN, MORE_TEST = 80, 40
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
    """Read them with the base's first half, or take what an earlier run left."""
    file = scratch / "hidden_states.pt"
    rows = {text: row for row, text in enumerate(texts)}
    if file.exists():
        kept = torch.load(file, weights_only=True)
        if kept["texts"] == list(texts):
            return HiddenStates(rows, kept["by_layer"])
    layers = layers_to_try(BaseHiddenStates(str(base), 1).num_hidden_layers)
    tokenizer = load_tokenizer(base)
    token_ids = [encode(tokenizer, text, MAX_TOKENS) for text in texts]
    done = 0

    def heard(count: int) -> None:
        nonlocal done
        done += count
        print(f"hidden states: {done}/{len(texts)}", file=sys.stderr, flush=True)

    found = BaseHiddenStates(str(base), max(layers)).pooled_at(token_ids, layers, heard)
    torch.save({"texts": list(texts), "by_layer": found}, file)
    return HiddenStates(rows, found)


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

    def model(self) -> RouterModel:
        return fit_model(self.labels, self.scaling, self.store, target_precision=TARGET_PRECISION, seed=0)

    def without_general(self) -> Data:
        """The same with no general prompts, as routers were trained before."""
        kept = ~self.store.general_rows()
        tensors = {name: tensor[kept] for name, tensor in self.store.tensors().items()}
        return replace(self, store=FeatureStore.from_tensors(tensors))


def best(train: Sequence[Example], states: HiddenStates) -> Data:
    """At the layer that training would choose: by what it knows itself."""
    made = {layer: Data.of(train, states, [layer]) for layer in states.by_layer}
    return made[best_layer({layer: badness(data.store, data.labels) for layer, data in made.items()})]


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
    head, _, _ = choose_head(
        store.features[rows], store.targets[rows], store.features[validation], store.targets[validation]
    )
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


def several_layers(train: Sequence[Example], states: HiddenStates) -> tuple[RouterModel, tuple[int, ...]]:
    """The shallowest, the middle and the deepest of the layers tried, side by side."""
    data = Data.of(train, states, sorted(states.by_layer)[::2])
    return data.model(), data.layers


def product(train: Sequence[Example], states: HiddenStates) -> tuple[RouterModel, tuple[int, ...]]:
    """What `train-router` makes."""
    data = best(train, states)
    return data.model(), data.layers


def at_layer(layer: int) -> Method:
    def made(train: Sequence[Example], states: HiddenStates) -> tuple[RouterModel, tuple[int, ...]]:
        return Data.of(train, states, [layer]).model(), (layer,)

    return made


def timing(train: Sequence[Example], states: HiddenStates) -> dict[str, Any]:
    """Seconds of a fit without its hidden states, and milliseconds of a judgement without them."""
    started = time.perf_counter()
    data = best(train, states)
    model = data.model()
    fit_seconds = time.perf_counter() - started
    one = states.of(train[:1], data.layers)
    took = []
    for _ in range(200):
        started = time.perf_counter()
        model.judge(one)
        took.append(1000 * (time.perf_counter() - started))
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in model.tensors().items()}
    return {"fit_seconds": fit_seconds, "judge_ms": statistics.median(took), "bytes": sizes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True, help="hidden states and figures are left here")
    parser.add_argument("--quick", action="store_true", help="the quick zoo: its base and items are the full one's")
    arguments = parser.parse_args()
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    prompts = router_data.load(arguments.packages, quick=arguments.quick, count=LARGE)
    large = [example for example in prompts.train if example.domain is not None]
    train = [example for name in zoo.EXPERTS for example in router_data.spread(_of(large, name), TRAIN)]
    small_talk = [example for example in prompts.train if example.domain is None]
    chosen_on = [*prompts.other_sources, *prompts.null]
    used = [*prompts.train, *prompts.test, *chosen_on]
    report = load_report(arguments.packages, {example.text for example in used})
    more = {
        name: router_data.spread(router_data.read_set(_evals(arguments.packages), source, name), MORE_TRAIN + MORE_TEST)
        for name, source in MORE_DOMAINS.items()
    }
    every = [*used, *report, *(item for found in more.values() for item in found), *General.without([]).examples]
    base = zoo.paths(arguments.quick).base
    states = read(base, list(dict.fromkeys(example.text for example in every)), arguments.scratch)

    found: dict[str, Any] = {"machine": describe(), "sets": _sets(report), "layers": sorted(states.by_layer)}
    methods: dict[str, Method] = {"before": before, "mahalanobis": mahalanobis, "without adoption": without_adoption}
    methods |= {"several layers": several_layers}
    methods |= {f"layer {layer}": at_layer(layer) for layer in sorted(states.by_layer)} | {"product": product}
    for name, method in methods.items():
        # Routers of before had to be given null prompts; the others are trained on the experts' own alone.
        model, layers = method([*train, *small_talk] if name == "before" else train, states)
        found.setdefault("methods", {})[name] = {
            "layers": layers,
            "chosen_on": figures(model, states, layers, chosen_on),
            "report": figures(model, states, layers, report),
            "siblings": figures(model, states, layers, prompts.test),
        }
        print(name, file=sys.stderr, flush=True)
    model, layers = product(train, states)
    for mode in ("strict", "normal", "off"):
        found.setdefault("modes", {})[mode] = _at_mode(model, states, layers, report, mode)
    found["bands"] = {
        f"{low} to {high}" if high < 1 << 30 else f"{low} and more": figures(
            model, states, layers, [item for item in report if low <= len(item.text) < high]
        )
        for low, high in BANDS
    }
    found["by_set"] = _by_set(model, states, layers, report)
    for count in CURVE:
        few = [item for name in zoo.EXPERTS for item in router_data.spread(_of(large, name), count)]
        model, layers = product(few, states)
        found.setdefault("curve", {})[count] = figures(model, states, layers, report) | {"layers": layers}
        print(f"{count} prompts", file=sys.stderr, flush=True)
    zoo_few = [item for name in zoo.EXPERTS for item in router_data.spread(_of(train, name), MORE_TRAIN)]
    zoo_test = [item for name in zoo.EXPERTS for item in router_data.spread(_of(prompts.test, name), MORE_TEST)]
    model, layers = product([*zoo_few, *(item for items in more.values() for item in items[MORE_TEST:])], states)
    held_out = [*zoo_test, *(item for items in more.values() for item in items[:MORE_TEST])]
    found["more_domains"] = figures(model, states, layers, held_out)
    found["more_domains_others"] = figures(model, states, layers, [item for item in report if item.domain])
    found["timing"] = timing(train, states)
    (arguments.scratch / "others.json").write_text(json.dumps(found, indent=1))
    write_report(found)


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
