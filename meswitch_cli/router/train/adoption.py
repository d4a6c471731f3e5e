"""Which of the general prompts are of an expert's field: they teach its router how other people put such questions."""

from __future__ import annotations

import torch

#: Cosine from which a field is an expert's. The zoo's three find their fields at 0.37 to 0.60, the next field lies at
#: 0.25 or less (docs/results/router.md).
LEAST_SIMILARITY = 0.3
#: And how many times the usual field's, which says what a cosine is worth among these features: the zoo's find theirs
#: at 3.6 to 7.7 times; experts of a network with random weights find none.
LEAST_OF_USUAL = 3
#: By so much it must be nearer to one expert than to the next; a field in between teaches nobody anything.
LEAST_LEAD = 0.15
NOBODY, UNCLEAR = -1, -2


def adopt(
    general: torch.Tensor,
    general_lengths: torch.Tensor,
    groups: torch.Tensor,
    own: torch.Tensor,
    own_lengths: torch.Tensor,
    labels: torch.Tensor,
    classes: int,
) -> torch.Tensor:
    """The owner of every general prompt: an expert's index, `NOBODY`, or `UNCLEAR` for a field between experts.

    A field is the expert's whose own prompts' mean points its way, once the general prompts' mean and the linear effect
    of a prompt's length are taken out: without the latter any field of long prompts is near an expert of long prompts.

    Args:
        general, own: scaled features `[n, d]`; lengths: `[n]` characters.
        groups: `[n]` of every general prompt, the number of its field.
        labels: `[n]` of every own prompt.
    """
    design = _design(general_lengths)
    effect = torch.linalg.lstsq(design, general).solution
    general = general - design @ effect
    own = own - _design(own_lengths) @ effect
    centres = torch.stack([own[labels == label].mean(0) for label in range(classes)])
    owners = torch.full((len(general),), NOBODY)
    fields = torch.unique(groups)
    means = torch.stack([general[groups == field].mean(0) for field in fields])
    near = torch.cosine_similarity(means[:, None, :], centres[None, :, :], dim=2)
    least = (LEAST_OF_USUAL * near.abs().median(0).values).clamp_min(LEAST_SIMILARITY)
    for field, cosines in zip(fields, near, strict=True):
        ordered = cosines.sort(descending=True)
        best = int(ordered.indices[0])
        if cosines[best] >= least[best]:
            lead = float(ordered.values[0] - ordered.values[1])
            owners[groups == field] = best if lead >= LEAST_LEAD else UNCLEAR
    return owners


def _design(lengths: torch.Tensor) -> torch.Tensor:
    """One, and the logarithm of the length: beyond 2,000 characters a router reads parts of a prompt anyway."""
    return torch.stack([torch.ones(len(lengths)), lengths.float().clamp(1, 2000).log()], dim=1)
