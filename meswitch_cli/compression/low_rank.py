"""What is stored of an adapter's parameters: products as they are, and nothing of what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch

from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.compression.pairs import TensorPair
from meswitch_cli.delta.factors import Factors, store_factors
from meswitch_cli.delta.stored import StoredDelta
from meswitch_cli.errors import CheckpointError
from meswitch_cli.model.adapted import AdaptedCheckpoint

#: What is stored of a parameter and its errors; of one that is the base's nothing.
Found = tuple[StoredDelta, dict[str, Any]]


def products_of(expert: Checkpoint, factor_bits: int) -> Callable[[TensorPair], Found | None] | None:
    """A function that tells what is stored of a pair, None where that takes more than a product; of what is no adapter
    there is none."""
    if not isinstance(expert, AdaptedCheckpoint):
        return None

    def product(pair: TensorPair) -> Found | None:
        item = expert.parameters[pair.planned.expert.parameter.name]
        if not item.changed:
            return StoredDelta(), {}
        if not item.rank or item.scales_rows or pair.planned.kind == "dense":
            return None
        rows = pair.planned.shared_rows
        if item.saved is not None and not torch.equal(item.saved_value()[:rows], pair.base[:rows].float()):
            return None
        factors = item.factors()
        shared = Factors(factors.left[:, :rows].contiguous(), factors.right, factors.scale)
        try:
            stored = store_factors(shared, factor_bits)
        except FloatingPointError as error:
            raise CheckpointError(f"{expert.adapter.file}: {pair.planned.name}: a factor holds {error}") from error
        delta, errors = (stored[0], asdict(stored[1])) if stored else (StoredDelta(), {})
        added = pair.expert[rows:]
        return (replace(delta, added_rows=added.clone()) if len(added) else delta), errors

    return product
