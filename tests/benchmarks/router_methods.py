"""Ways to make a router of prompts: the product's, what it was before, and the product without one of its parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks import router_gates
from benchmarks.router_states import HiddenStates
from meswitch_cli.router.backends.probe_fitting import best_layer, fisher_ratio
from meswitch_cli.router.decide.gates import distance_threshold, fit_distances
from meswitch_cli.router.decide.head import PENALTIES, cross_entropy, fit_head
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
        _BEST[key] = at_best_layer(train, states)
    return _BEST[key]


def at_best_layer(train: Sequence[Example], states: HiddenStates) -> Data:
    """As `best`, computed each time."""
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
