"""Gates compared on development prompts: what tells an expert's prompts from those of other fields, by AUROC alone.

No line is drawn here and no reported prompt is read. Every gate is fitted on the same known prompts at the same layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as functional

from meswitch_cli.router.decide.gates import fit_distances
from meswitch_cli.router.decide.head import Head, fit_head
from meswitch_cli.router.decide.neighbours import NOBODY, NeighbourGate, distances_of, fit_neighbours
from meswitch_cli.router.decide.null_class import null_log_odds
from meswitch_cli.router.train.gating import draw_gate
from meswitch_cli.router.train.generalising import Known
from meswitch_cli.router.train.measures import auroc, false_positive_rate
from meswitch_cli.router.train.null_fitting import fit_null_class, unseen_log_odds

#: Shares of the experts' prompts that are kept where the false positives are counted.
KEPT = (0.95, 0.9)
Scores = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Fitted:
    """What a gate is made of: the known prompts, and the classes' number."""

    known: Known
    classes: int

    @property
    def features(self) -> torch.Tensor:
        return self.known.store.features[self.known.points]

    @property
    def owners(self) -> torch.Tensor:
        return self.known.owners[self.known.points]

    def plain_neighbours(self) -> NeighbourGate:
        """As `fit_neighbours`, with every direction as it is."""
        made = fit_neighbours(self.features, self.owners, seed=0)
        directions = functional.normalize(made.directions, dim=0)
        return NeighbourGate(directions, functional.normalize(self.features @ directions, dim=1), self.owners)

    def own_heads(self) -> Head:
        """The experts' fields alone, each of the same weight."""
        own = self.owners != NOBODY
        targets = functional.one_hot(self.owners[own], self.classes).float()
        return fit_head(self.features[own], targets / targets.sum(0) * len(targets), 1e-1)


def gates(known: Known, classes: int) -> dict[str, Scores]:
    """By name, what gives features `[n, d]` their distance `[n]`."""
    made = Fitted(known, classes)
    plain, near = made.plain_neighbours(), fit_neighbours(made.features, made.owners, seed=0)
    null, own = fit_null_class(known, known.points, classes), made.own_heads()
    is_own = made.owners != NOBODY
    mahalanobis = fit_distances(made.features[is_own], made.owners[is_own], classes, seed=0)
    opinions: dict[str, Scores] = {
        "near": near.distances,
        "null": lambda features: null_log_odds(null(features)),
        "softmax": lambda features: -own(features).softmax(1).amax(1),
        "energy": lambda features: -own(features).logsumexp(1),
        "mahalanobis": lambda features: mahalanobis.distances(features).log(),
    }
    whole = draw_gate(known, classes, seed=0).gate
    return {
        "Mahalanobis distance to the experts' centres": mahalanobis.distances,
        "energy of the experts' scores": opinions["energy"],
        "highest probability": opinions["softmax"],
        "two nearest, an expert's alone": lambda features: -_sides(plain, features)[0],
        "two nearest, an expert's beside another field's (format version 2)": plain.distances,
        "the same, each beside its neighbour's own density": lambda features: _by_density(plain, features),
        "two nearest, directions divided by the root of their strength": near.distances,
        "null class": opinions["null"],
        "those two, weights fitted on fields left out": _weighted(known, near, null, classes),
        "**those two, the same weight**": whole.distances,
    }


def compare(
    known: Known, classes: int, sets: Mapping[str, tuple[torch.Tensor, Sequence[str | None]]]
) -> dict[str, Any]:
    """Figures by gate and set; a set is scaled features and the truth of each prompt."""
    found: dict[str, Any] = {}
    for name, distances in gates(known, classes).items():
        for which, (features, truth) in sets.items():
            inside = torch.tensor([label is not None for label in truth])
            values = distances(features).double()
            held_in, null = values[inside].numpy(), values[~inside].numpy()
            found.setdefault(name, {})[which] = {
                "auroc": auroc(held_in, null),
                "passed": [false_positive_rate(held_in, null, kept) for kept in KEPT],
            }
    return found


def _sides(gate: NeighbourGate, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Similarity to the two nearest of the experts' prompts, and of others."""
    similarities = gate.similarities(features)
    sides = (
        similarities[:, mask].topk(2, dim=1).values.mean(1) for mask in (gate.owners != NOBODY, gate.owners == NOBODY)
    )
    own, other = sides
    return own, other


def _by_density(gate: NeighbourGate, features: torch.Tensor) -> torch.Tensor:
    """How much nearer the nearest of each side is than that one's own neighbours of its side are to it."""
    similarities = gate.similarities(features)
    among = (gate.points @ gate.points.T).fill_diagonal_(-2)
    found = []
    for mask in (gate.owners != NOBODY, gate.owners == NOBODY):
        density = among[mask][:, mask].topk(2, dim=1).values.mean(1)
        nearest = similarities[:, mask].topk(2, dim=1)
        found.append(nearest.values.mean(1) - density[nearest.indices].mean(1))
    return found[1] - found[0]


def unseen_distances(gate: NeighbourGate, known: Known) -> torch.Tensor:
    """Distances of every known prompt, `[n]`, of a general one without the others of its field."""
    store = known.store
    distances = gate.distances(store.features)
    for rows, kinds in ((known.adopted, store.fields), (known.foreign, store.groups)):
        same = kinds[rows][:, None] == kinds[known.points][None, :]
        similarities = gate.similarities(store.features[rows]).masked_fill(same, -torch.inf)
        distances[rows] = distances_of(similarities, gate.owners)
    return distances


def _weighted(known: Known, near: NeighbourGate, null: Head, classes: int) -> Scores:
    """Both opinions weighed by a logistic regression on the general prompts, each judged without its own field."""
    odds, distances = unseen_log_odds(known, null, classes), unseen_distances(near, known)
    general = known.adopted | known.foreign
    opinions = torch.stack([distances, odds], dim=1)[general]
    mean, deviation = opinions.mean(0), opinions.std(0)
    targets = functional.one_hot(known.foreign[general].long(), 2).float()
    head = fit_head((opinions - mean) / deviation, targets / targets.sum(0) * len(targets) / 2, 1e-3)

    def scores(features: torch.Tensor) -> torch.Tensor:
        both = torch.stack([near.distances(features), null_log_odds(null(features))], dim=1)
        judged = head((both - mean) / deviation)
        return judged[:, 1] - judged[:, 0]

    return scores
