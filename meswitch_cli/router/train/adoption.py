"""Which of the general prompts are of an expert's field: they teach its router how other people put such questions."""

from __future__ import annotations

import torch

#: Cosine from which a field is an expert's. The zoo's three find their fields at 0.46 to 0.58, the next field lies at
#: 0.23 (docs/results/router.md).
LEAST_SIMILARITY = 0.3
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
    for group in torch.unique(groups):
        members = groups == group
        near = torch.cosine_similarity(general[members].mean(0, keepdim=True), centres)
        ordered = near.sort(descending=True)
        if float(ordered.values[0]) >= LEAST_SIMILARITY:
            lead = float(ordered.values[0] - ordered.values[1])
            owners[members] = int(ordered.indices[0]) if lead >= LEAST_LEAD else UNCLEAR
    return owners


def _design(lengths: torch.Tensor) -> torch.Tensor:
    """One, and the logarithm of the length: beyond 2,000 characters a router reads parts of a prompt anyway."""
    return torch.stack([torch.ones(len(lengths)), lengths.float().clamp(1, 2000).log()], dim=1)
