"""Candidates dealt into train, choice and report so that no template is shared."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

from .item import Item

CHOICE_ITEMS = 60
REPORT_ITEMS = 90
PARTS = ("train", "choice", "report")
_CHOICE_SHARE, _REPORT_SHARE = 0.12, 0.18


def deal_templates(templates: Sequence[str], seed: int) -> dict[str, str]:
    """The part of each template, dealt within its group (what stands before the first colon) by a hash."""
    groups = defaultdict(set)
    for template in templates:
        groups[template.split(":", 1)[0]].add(template)
    part_of = {}
    for members in groups.values():
        ordered = sorted(members, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())
        choice_end = max(1, round(_CHOICE_SHARE * len(ordered)))
        report_end = choice_end + max(1, round(_REPORT_SHARE * len(ordered)))
        for index, template in enumerate(ordered):
            part_of[template] = "choice" if index < choice_end else "report" if index < report_end else "train"
    return part_of


def split(
    candidates: Sequence[Item],
    mixture: Mapping[str, int],
    seed: int,
    fits: Callable[[Item], bool] = lambda item: True,
    choice_items: int = CHOICE_ITEMS,
    report_items: int = REPORT_ITEMS,
) -> dict[str, list[Item]]:
    """Parts by name: `choice` and `report` of fixed sizes, `train` with every item of the other templates.

    `mixture` gives each kind's share (`{"write": 2, "predict": 1}`); `fits` drops what is too long. Raises
    ValueError when the candidates cannot fill the held-out parts.
    """
    part_of = deal_templates([item.template for item in candidates], seed)
    pools: dict[str, list[Item]] = {part: [] for part in PARTS}
    seen = set()
    for item in candidates:
        if item.prompt not in seen and fits(item):
            seen.add(item.prompt)
            pools[part_of[item.template]].append(item)
    parts = {part: list(_interleave(pools[part], mixture)) for part in PARTS}
    for part, size in (("choice", choice_items), ("report", report_items)):
        if len(parts[part]) < size:
            raise ValueError(f"{part}: {len(parts[part])} items where {size} are needed; generate more candidates")
        parts[part] = parts[part][:size]
    return parts


def _interleave(items: Sequence[Item], mixture: Mapping[str, int]) -> Iterator[Item]:
    """Kinds in the mixture's shares until one runs dry; within a kind, its templates in turn."""
    queues = {kind: _round_robin([item for item in items if item.kind == kind]) for kind in mixture}
    while True:
        for kind, share in mixture.items():
            for _ in range(share):
                item = next(queues[kind], None)
                if item is None:
                    return
                yield item


def _round_robin(items: Sequence[Item]) -> Iterator[Item]:
    by_template = defaultdict(list)
    for item in items:
        by_template[item.template].append(item)
    depth = 0
    while any(depth < len(members) for members in by_template.values()):
        for members in by_template.values():
            if depth < len(members):
                yield members[depth]
        depth += 1
