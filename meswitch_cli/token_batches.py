"""Token ids of unlike lengths in batches that waste little on padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch

#: Tokens of one forward pass, padding included.
BATCH_TOKENS = 2048


def batches_by_length(
    lengths: Sequence[int], budget: int = BATCH_TOKENS, *, longest_first: bool = False
) -> list[list[int]]:
    """Indices in batches of like lengths whose padded size stays within `budget`; a longer item is alone."""
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    if longest_first:  # what does not fit into memory shows at once
        order.reverse()
    batches: list[list[int]] = []
    for index in order:
        if batches and max(lengths[index], lengths[batches[-1][0]]) * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def padded(token_ids: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """`[n, longest]` ids with zeros on the right, and the mask of what is not padding."""
    longest = max(len(ids) for ids in token_ids)
    inputs = torch.zeros(len(token_ids), longest, dtype=torch.long)
    mask = torch.zeros(len(token_ids), longest, dtype=torch.bool)
    for row, ids in enumerate(token_ids):
        inputs[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = True
    return inputs, mask
