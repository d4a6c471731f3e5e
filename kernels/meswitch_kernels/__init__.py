"""Fused linear operators for a base weight plus a mixture of low-bit expert deltas."""

from .bank import ExpertBank
from .delta import Capacity, ExpertDelta
from .dispatch import available_backends
from .gains import GainBank
from .groups import TokenGroups, group_tokens, groups_from_sorted
from .ops import expert_embedding, expert_head, expert_linear, expert_norm_gain

__all__ = [
    "Capacity",
    "ExpertBank",
    "ExpertDelta",
    "GainBank",
    "TokenGroups",
    "available_backends",
    "expert_embedding",
    "expert_head",
    "expert_linear",
    "expert_norm_gain",
    "group_tokens",
    "groups_from_sorted",
]
