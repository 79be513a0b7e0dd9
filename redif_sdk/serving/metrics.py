"""What the server counts, for Prometheus. One object an application, with a registry of its own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

__all__ = ["Metrics"]

_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_BATCH = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Requests by route and status, pictures, the queue, and the engine's batches."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Histogram(
            "redif_request_seconds",
            "From the first byte of a request to the last of its answer.",
            ["route", "status"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.pictures = Counter("redif_pictures", "Pictures that were sent.", ["model"], registry=self.registry)
        self.pending = Gauge("redif_pending_pictures", "Pictures accepted and not answered.", registry=self.registry)
        self.rejected = Counter("redif_rejected", "Requests refused by a full queue.", registry=self.registry)
        self.cancelled = Counter("redif_cancelled", "Requests whose client went away.", registry=self.registry)
        self.batches = Histogram(
            "redif_batch_pictures", "Pictures a call of the engine.", ["model"], buckets=_BATCH, registry=self.registry
        )
        self.engine = Histogram(
            "redif_batch_seconds", "A call of the engine.", ["model"], buckets=_SECONDS, registry=self.registry
        )

    def batch(self, model: str, pictures: int, seconds: float) -> None:
        """Count a call of an engine."""
        self.batches.labels(model).observe(pictures)
        self.engine.labels(model).observe(seconds)

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)
