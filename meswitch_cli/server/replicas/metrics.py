"""Prometheus metrics of replicas: read, and put together."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families

#: 1 for the experts on a device.
ON_DEVICE = "meswitch_expert_on_device"


def resident_experts(text: str) -> frozenset[str]:
    """The experts that a replica's metrics say are on its device."""
    return frozenset(
        sample.labels["expert"]
        for family in text_string_to_metric_families(text)
        if family.name == ON_DEVICE
        for sample in family.samples
        if sample.value
    )


class _Joined:
    """A collector of metrics that are known."""

    def __init__(self, families: Mapping[str, Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return list(self._families.values())


def joined_metrics(texts: Mapping[int, str]) -> str:
    """The metrics of replicas by number, each sample with a label `replica`."""
    families: dict[str, Metric] = {}
    for number, text in texts.items():
        for family in text_string_to_metric_families(text):
            into = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                into.add_sample(sample.name, {**sample.labels, "replica": str(number)}, sample.value)
    registry = CollectorRegistry()
    registry.register(_Joined(families))
    return generate_latest(registry).decode()
