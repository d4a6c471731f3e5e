"""The gate and where its lines are drawn: from prompts of fields that the gate does not know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from meswitch_cli.router.decide.neighbours import NeighbourGate, distances_of, fit_neighbours
from meswitch_cli.router.decide.null_class import NullClassGate, joint_distances
from meswitch_cli.router.train.generalising import Known
from meswitch_cli.router.train.null_fitting import fit_null_class, unseen_log_odds

#: The line is in the middle of those that separate nearly as well as the best does: by these points of the index.
SLACK = 0.01
#: Of prompts like those trained on, whatever else is lost.
LEAST_KEPT = 0.95
#: Of prompts of other fields, those that a gate may let through at most. At 3 % the line lies where an expert's field
#: and others are as near, whatever the layer; of other people's prompts several times as many pass as of the general
#: ones (docs/results/router.md).
NORMAL_PASSED, STRICT_PASSED = 0.03, 0.01
_LEAST_DEVIATION = 1e-3


@dataclass(frozen=True)
class DrawnGate:
    """A gate with its lines, and the distances that they were drawn from.

    Attributes:
        adopted: `[n]` of the adopted prompts, each as if its part of the field were not known.
        foreign: the same of those of no expert's field.
        null: `[n]` of the data's own prompts of no domain, those of the calibration part.
    """

    gate: NullClassGate
    adopted: torch.Tensor
    foreign: torch.Tensor
    null: torch.Tensor


def draw_gate(known: Known, classes: int, seed: int) -> DrawnGate:
    """Fit the gate on what is known, and draw its lines from what it is made to forget.

    A general prompt's distance is taken without the prompts of its own field (of an adopted one: of its part of the
    field), so that it is as strange as a new field's prompt will be. The line is the one that keeps most of the held-in
    prompts for the fewest of others (Youden's index), every source of prompts counting the same, unless more than a few
    of the others pass it (`NORMAL_PASSED`). It never refuses more than a twentieth of the data's own calibration part.
    """
    store, points = known.store, known.points
    near = fit_neighbours(store.features[points], known.owners[points], seed)
    null_class = fit_null_class(known, points, classes)
    odds = unseen_log_odds(known, null_class, classes)
    distances = near.distances(store.features)
    for rows, kinds in ((known.adopted, store.fields), (known.foreign, store.groups)):
        distances[rows] = _unseen_distances(near, known, rows, kinds)
    # Where there are no general prompts nothing is unseen.
    general = known.adopted | known.foreign
    measured = general if general.any() else points
    deviations = torch.stack([values[measured].std() for values in (distances, odds)]).clamp_min(_LEAST_DEVIATION)
    gate = NullClassGate(near.directions, near.points, near.owners, null=null_class, deviations=deviations)
    joint = joint_distances(distances, odds, deviations)
    adopted, foreign = joint[known.adopted], joint[known.foreign]
    siblings = gate.distances(store.features[store.rows("calibration")])
    null = gate.distances(store.features[store.rows("calibration", null=True)])
    others = [values for values in (foreign, null) if len(values)]
    held_in = [values for values in (adopted, siblings) if len(values)]
    line = strict = separating_line(held_in, others)
    if others:
        every = torch.cat(others)
        line = min(line, float(every.quantile(NORMAL_PASSED)))
        strict = min(line, float(every.quantile(STRICT_PASSED)))
    if len(siblings):
        line = max(line, float(siblings.quantile(LEAST_KEPT)))
    return DrawnGate(replace(gate, threshold=line, strict_threshold=strict), adopted, foreign, null)


def _unseen_distances(near: NeighbourGate, known: Known, rows: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
    """The neighbours' distances of general prompts without the known ones of the same kind."""
    similarities = near.similarities(known.store.features[rows])
    same = kinds[rows][:, None] == kinds[known.points][None, :]
    return distances_of(similarities.masked_fill(same, -torch.inf), near.owners)


def separating_line(inside: Sequence[torch.Tensor], outside: Sequence[torch.Tensor]) -> float:
    """The line that keeps the largest share of the distances inside, and the least of those outside.

    Shares are means over the sources, whatever their sizes. Of the lines that do so nearly as well as the best
    (`SLACK`) it is the one in the middle.
    """
    candidates = torch.unique(torch.cat([*inside, *outside]))

    def share(sources: Sequence[torch.Tensor]) -> torch.Tensor:
        if not sources:
            return torch.zeros(len(candidates))
        ordered = [values.sort().values for values in sources]
        return torch.stack(
            [torch.searchsorted(values, candidates, right=True) / len(values) for values in ordered]
        ).mean(0)

    index = share(inside) - share(outside)
    good = (index >= index.max() - SLACK).nonzero().flatten()
    # A line stays as good as it is up to the next distance that there is.
    after = min(int(good[-1]) + 1, len(candidates) - 1)
    return float((candidates[good[0]] + candidates[after]) / 2)
