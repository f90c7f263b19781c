"""`/metrics`, in Prometheus's text form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from runtime.batching.service import Service
from runtime.engine import Engine

KIND = "text/plain; version=0.0.4; charset=utf-8"
PATHS = (
    "/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize", "/detokenize", "/health",
    "/metrics", "/experts", "/experts/stream", "/",
)  # fmt: skip
FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)  # seconds
EACH = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
RECENT = 0.1  # the weight of the last text in the mean


class Metrics:
    """The figures of one server. Any thread may count."""

    def __init__(self, engine: Engine, service: Service) -> None:
        registry = self.registry = CollectorRegistry(auto_describe=False)
        self.responses = Counter(
            "mixtral_responses", "Responses by path and status", ("path", "status"), registry=registry
        )
        self.first = Histogram(
            "mixtral_first_token_seconds", "From a request to the first token of each text",
            buckets=FIRST, registry=registry,
        )  # fmt: skip
        self.each = Histogram(
            "mixtral_token_seconds", "From one token of a text to the next", buckets=EACH, registry=registry
        )
        self.cut_off = Counter(
            "mixtral_cut_off", "Texts that were given up before their end", registry=registry
        )
        self.mean_seconds = 1.0  # that a text took lately
        registry.register(Counters(engine, service))

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def count_response(self, path: str, status: int) -> None:
        """Count a response. All paths that are not served count as one."""
        self.responses.labels(path if path in PATHS else "other", str(status)).inc()

    def count_token(self, seconds: float, first: bool) -> None:
        (self.first if first else self.each).observe(seconds)

    def count_text(self, seconds: float) -> None:
        """A text is complete, and took so long."""
        self.mean_seconds += RECENT * (seconds - self.mean_seconds)


@dataclass(frozen=True)
class Counters:
    """What the engine and the service count by themselves, read when somebody asks."""

    engine: Engine
    service: Service

    def collect(self) -> Iterator[Metric]:
        stats, counts, plans = self.engine.stats(), self.service.counts(), self.engine.rank_plans
        yield gauge("requests_running", "Texts that are being written", counts.running)
        yield gauge("requests_queued", "Texts that wait for a place", counts.queued)
        yield counter("prompt_tokens", "Prompt tokens that were computed", stats.prompt_tokens)
        yield counter("reused_tokens", "Prompt tokens that a KV cache held", stats.reused_tokens)
        yield counter("new_tokens", "Tokens that were sampled", stats.new_tokens)
        yield counter("expert_hits", "Needed experts that were in a slot", stats.hits)
        yield counter("expert_misses", "Needed experts that were not", stats.misses)
        yield gauge("hit_ratio", "The share of needed experts that were in a slot", stats.hit_ratio)
        yield counter("stall_seconds", "Time in which computing waited for copies", stats.stall_seconds)
        moved = CounterMetricFamily(
            "mixtral_moved_bytes", "Bytes of experts that moved, by from where and to where", labels=("way",)
        )
        moved.add_metric(("host_to_device",), stats.copied_bytes)
        moved.add_metric(("device_to_host",), stats.written_back_bytes)
        moved.add_metric(("file_to_host",), stats.read_bytes)
        yield moved
        yield counter("wasted_bytes", "Copied bytes of experts that nobody needed", stats.wasted_bytes)
        memory = GaugeMetricFamily(
            "mixtral_memory_bytes", "What the plan of each rank has in each tier", labels=("tier", "rank")
        )
        for rank, plan in enumerate(plans.plans if plans else [self.engine.plan]):
            memory.add_metric(("device", str(rank)), plan.device_bytes)
            memory.add_metric(("host", str(rank)), plan.host_bytes)
            memory.add_metric(("file", str(rank)), plan.mapped_bytes + plan.file_experts * plan.blob_bytes)
        yield memory


def gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"mixtral_{name}", text, value)


def counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(f"mixtral_{name}", text, value)
