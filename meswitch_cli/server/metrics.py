"""Prometheus metrics. Labels take few values: expert names that are served, and a fixed set of reasons and paths."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from meswitch_cli.engine.contract import Engine
from meswitch_cli.server.record import RequestRecord

#: Who answered, and how that was chosen. Every metric of requests has exactly these, fallbacks and failures included.
LABELS = ("expert", "reason")

#: Paths that have a label value of their own; the rest is "other".
PATHS = frozenset(
    {"/v1/chat/completions", "/v1/completions", "/v1/route", "/v1/models", "/tokenize", "/detokenize"}
    | {"/v1/experts/load", "/v1/experts/unload", "/v1/experts/pin"}
)

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5)


class Metrics:
    """The metrics of one server, in a registry of their own."""

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(engine))

        def histogram(name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"meswitch_{name}_seconds", what, LABELS, buckets=buckets, registry=self.registry)

        def counter(name: str, what: str, labels: tuple[str, ...] = LABELS) -> Counter:
            return Counter(f"meswitch_{name}", what, labels, registry=self.registry)

        self.first_token = histogram("time_to_first_token", "From a request's arrival to its first token.", _SECONDS)
        self.inter_token = histogram("inter_token", "Between two tokens of a choice.", _TOKEN_SECONDS)
        self.request = histogram("request", "From a generating request's arrival to its end.", _SECONDS)
        self.queue = histogram("queue", "From a choice's submission to its place in a batch.", _SECONDS)
        self.router = histogram("router", "What choosing the expert took.", _TOKEN_SECONDS)
        self.requests = counter(
            "requests", "Requests by path, answer and how it was chosen.", ("path", "status", *LABELS)
        )
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of requests that were taken.")
        self.completion_tokens = counter("completion_tokens", "Tokens generated for requests.")
        self.router_failures = counter("router_failures", "Times the router failed or chose what is not served.", ())

    def observe_request(self, record: RequestRecord) -> None:
        """Count a request that has ended."""
        path = record.path if record.path in PATHS else "other"
        self.requests.labels(path, str(record.status), *record.labels).inc()
        if record.generates:
            self.request.labels(*record.labels).observe(record.seconds)
            self.prompt_tokens.labels(*record.labels).inc(record.prompt_tokens)
            self.completion_tokens.labels(*record.labels).inc(record.completion_tokens)

    def text(self) -> bytes:
        """In the text format of Prometheus."""
        return generate_latest(self.registry)


class EngineCollector(Collector):
    """What the engine counts, read when somebody asks."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def describe(self) -> Iterable[Metric]:
        """Names are not known beforehand, and the engine is not to be asked before it has started."""
        return ()

    def collect(self) -> Iterable[Metric]:
        numbers = self._engine.statistics()
        for name, what in (
            ("slot_hits", "Requests whose expert was on the device already."),
            ("slot_loads", "Experts brought onto the device."),
            ("slot_evictions", "Experts put off the device for another."),
            ("slot_load_seconds", "Time that loads took."),
            ("slot_load_bytes", "Bytes that loads copied."),
        ):
            yield CounterMetricFamily(f"meswitch_{name}", what, value=getattr(numbers, name))
        for name, what in (
            ("running", "Requests that generate."),
            ("waiting", "Requests that wait."),
            ("slots", "Places for experts on the device."),
            ("slots_used", "Places taken."),
            ("cache_blocks", "Blocks of the key-value cache."),
            ("cache_blocks_used", "Blocks taken."),
        ):
            yield GaugeMetricFamily(f"meswitch_{name}", what, value=getattr(numbers, name))
        resident = GaugeMetricFamily("meswitch_expert_on_device", "Whether it is on the device.", labels=("expert",))
        for expert in self._engine.experts():
            resident.add_metric((expert.name,), float(expert.slot is not None))
        yield resident
