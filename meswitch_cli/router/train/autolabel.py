"""Labels for (prompt, response) pairs that nobody labelled: the expert that finds the response likeliest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from meswitch_cli.router.train.data import Example, with_soft_label

#: A lead of this many nats a token over the second expert makes a label certain.
MARGIN = 0.05


@dataclass(frozen=True)
class AutoLabels:
    """The examples with their labels, how many each expert got for certain, and how many stay uncertain."""

    examples: tuple[Example, ...]
    certain: Mapping[str, int]
    uncertain: int


def label_by_loss(
    examples: Sequence[Example], losses: Mapping[str, torch.Tensor], margin: float = MARGIN
) -> AutoLabels:
    """Label examples by the experts' mean loss per response token.

    The probability of an expert is softmax(-loss / margin). Where the best leads by at least `margin` nats a token,
    the example gets its name; others train the head softly and nothing is measured on them.

    Args:
        losses: by expert, `[n]` nats a token.
    """
    names = sorted(losses)
    stacked = torch.stack([losses[name] for name in names], dim=1)
    soft = torch.softmax(-stacked / margin, dim=1)
    ordered = stacked.sort(dim=1)
    lead = ordered.values[:, 1] - ordered.values[:, 0]
    labelled = []
    for row, example in enumerate(examples):
        probabilities = {name: float(value) for name, value in zip(names, soft[row], strict=True)}
        domain = names[int(ordered.indices[row, 0])] if float(lead[row]) >= margin else None
        labelled.append(with_soft_label(example, probabilities, domain))
    certain = Counter(item.domain for item in labelled if item.domain is not None)
    return AutoLabels(tuple(labelled), {name: certain[name] for name in names}, len(labelled) - certain.total())
