"""Where the lines of the neighbours' gate are drawn: from prompts of fields that the gate does not know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from meswitch_cli.router.decide.neighbours import NeighbourGate, distances_of, fit_neighbours
from meswitch_cli.router.train.generalising import Known

#: The line is in the middle of those that separate nearly as well as the best does: by these points of the index.
SLACK = 0.01
#: Of prompts like those trained on, whatever else is lost.
LEAST_KEPT = 0.95
#: A line that keeps this share of every source is never moved outwards.
MOST_KEPT = 0.99
#: Of prompts of other fields that a gate may let through where held-in ones lie among them: a refused prompt costs its
#: expert's skill, a prompt let through costs the base's. On other people's prompts this line keeps five points more
#: than Youden's (docs/results/router_others.md).
NORMAL_PASSED, STRICT_PASSED = 0.1, 0.02


@dataclass(frozen=True)
class DrawnGate:
    """A gate with its lines, and the distances that they were drawn from.

    Attributes:
        adopted: `[n]` of the adopted prompts, each as if its part of the field were not known.
        foreign: the same of those of no expert's field.
        null: `[n]` of the data's own prompts of no domain, those of the calibration part.
    """

    gate: NeighbourGate
    adopted: torch.Tensor
    foreign: torch.Tensor
    null: torch.Tensor


def draw_gate(known: Known, seed: int) -> DrawnGate:
    """Fit the gate on what is known, and draw its lines from what it is made to forget.

    A general prompt's distance is taken without the prompts of its own field (of an adopted one: of its part of the
    field), so that it is as strange as a new field's prompt will be. The line is the one that keeps most of the held-in
    prompts for the fewest of others (Youden's index), every source of prompts counting the same. Where the two mingle
    it is moved outwards until a tenth of the others pass. It never refuses more than a twentieth of the data's own
    calibration part.
    """
    store, points = known.store, known.points
    gate = fit_neighbours(store.features[points], known.owners[points], seed)
    adopted = _strange(gate, known, known.adopted, store.fields)
    foreign = _strange(gate, known, known.foreign, store.groups)
    siblings = gate.distances(store.features[store.rows("calibration")])
    null = gate.distances(store.features[store.rows("calibration", null=True)])
    others = [values for values in (foreign, null) if len(values)]
    held_in = [values for values in (adopted, siblings) if len(values)]
    line = separating_line(held_in, others)
    strict = min(line, *(float(values.quantile(STRICT_PASSED)) for values in others))
    if held_in:
        furthest = max(float(values.quantile(MOST_KEPT)) for values in held_in)
        line = max(line, min(furthest, *(float(values.quantile(NORMAL_PASSED)) for values in others)))
    if len(siblings):
        line = max(line, float(siblings.quantile(LEAST_KEPT)))
    return DrawnGate(replace(gate, threshold=line, strict_threshold=strict), adopted, foreign, null)


def _strange(gate: NeighbourGate, known: Known, rows: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
    """Distances of general prompts without the known ones of the same kind."""
    similarities = gate.similarities(known.store.features[rows])
    same = kinds[rows][:, None] == kinds[known.points][None, :]
    return distances_of(similarities.masked_fill(same, -torch.inf), gate.owners)


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
