"""Fused linear operators for a base weight plus a mixture of low-bit expert deltas."""

from .bank import ExpertBank
from .delta import Capacity, ExpertDelta
from .dispatch import available_backends
from .gains import GainBank
from .groups import TokenGroups, group_tokens
from .ops import expert_embedding, expert_head, expert_linear

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
    "group_tokens",
]
