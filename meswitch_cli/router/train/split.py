"""Examples dealt into parts that share no prompt and no group."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence

from meswitch_cli.errors import RouterError
from meswitch_cli.router.store.features import PARTS
from meswitch_cli.router.train.data import Example

#: Of `PARTS`, in their order.
_SHARES = (0.55, 0.15, 0.15, 0.15)
#: Of a domain with few prompts nearly all are for the head: general prompts of its field set the rest.
_FEW, _FEW_SHARES = 20, (0.8, 0.0, 0.0, 0.2)
#: Prompts of no domain train the gate, set its line, and are figures; no head is chosen by them.
_NULL_SHARES = (0.4, 0.0, 0.3, 0.3)


def split(examples: Sequence[Example], seed: int) -> dict[str, list[Example]]:
    """Deal each domain into the parts by share, groups whole, by a hash that the seed salts.

    Examples whose label is uncertain go to train: nothing is measured on them.

    Raises:
        RouterError: a domain's groups are too few or too large for every part to get one.
    """
    parts: dict[str, list[Example]] = {part: [] for part in PARTS}
    by_domain: dict[str | None, list[Example]] = defaultdict(list)
    for example in examples:
        if example.domain is None and example.soft is not None:
            parts["train"].append(example)
        else:
            by_domain[example.domain].append(example)
    for domain in sorted(by_domain, key=str):
        members = by_domain[domain]
        shares = _NULL_SHARES if domain is None else _SHARES if len(members) >= _FEW else _FEW_SHARES
        dealt = _deal(members, shares, seed)
        empty = [part for part, share in zip(PARTS, shares, strict=True) if share and not dealt[part]]
        if domain is not None and empty:
            raise RouterError(
                f"domain {domain!r}: its groups cannot be dealt into {', '.join(PARTS)}: nothing is left for "
                f"{empty[0]}; give more groups"
            )
        for part in PARTS:
            parts[part] += dealt[part]
    return parts


def _deal(examples: Sequence[Example], shares: Sequence[float], seed: int) -> dict[str, list[Example]]:
    groups: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        groups[f"group {example.group}" if example.group is not None else f"text {example.digest}"].append(example)
    ordered = sorted(groups, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())
    dealt: dict[str, list[Example]] = {part: [] for part in PARTS}
    for name in ordered:
        # The part that is furthest below its share; groups may be of any size.
        part = max(
            (part for part, share in zip(PARTS, shares, strict=True) if share),
            key=lambda part: shares[PARTS.index(part)] - len(dealt[part]) / len(examples),
        )
        dealt[part] += groups[name]
    return dealt


def part_hash(examples: Sequence[Example]) -> str:
    """SHA-256 of a part's prompts and domains, whatever their order."""
    lines = sorted(f"{example.digest}\t{example.domain}" for example in examples)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
