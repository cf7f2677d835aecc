"""What the server counts of itself, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from coldpress.serving.service import Service

__all__ = ["Meters"]

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
_COUNTED = {
    "hits": "requests that began with a snapshot",
    "misses": "requests that began with none",
    "tokens_saved": "tokens of prompts that snapshots had",
    "built": "snapshots that the model has read",
    "loaded": "snapshots read from files",
    "damaged": "files of snapshots that were damaged",
    "unwritten": "files of snapshots that could not be written",
}


class Meters:
    """Counters of requests and tokens; what the service knows itself is asked when they are read."""

    def __init__(self, service: Service):
        self.service, self.registry = service, CollectorRegistry()
        registry = self.registry
        self.requests = Counter("coldpress_requests", "requests answered", ["path", "status"], registry=registry)
        self.prompt_tokens = Counter("coldpress_prompt_tokens", "tokens of prompts", registry=registry)
        self.cached_tokens = Counter("coldpress_cached_tokens", "those that a snapshot had", registry=registry)
        self.completion_tokens = Counter("coldpress_completion_tokens", "tokens made", registry=registry)
        self.first_token_s = Histogram(
            "coldpress_first_token_seconds", "from request to first token", buckets=_SECONDS, registry=registry
        )
        registry.register(self)

    def collect(self) -> Iterator[Any]:
        """What the desk and the snapshots say now; prometheus_client asks this."""
        desk, counts = self.service.desk, self.service.snapshots.counts()
        yield GaugeMetricFamily("coldpress_running", "requests that are answered now", desk.n_running)
        yield GaugeMetricFamily("coldpress_waiting", "requests in the queue", desk.n_waiting)
        yield GaugeMetricFamily("coldpress_snapshots", "declared snapshots", counts["snapshots"])
        held = GaugeMetricFamily("coldpress_snapshot_bytes", "bytes of snapshots", labels=["tier"])
        for tier in ("memory", "disk"):
            held.add_metric([tier], counts[f"{tier}_bytes"])
        yield held
        for name, said in _COUNTED.items():
            yield CounterMetricFamily(f"coldpress_snapshot_{name}", said, counts[name])

    def text(self) -> bytes:
        """All of it, in Prometheus's text format."""
        found: bytes = generate_latest(self.registry)
        return found
