"""The Prometheus metrics of the server. Each application has one object, with its own registry."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

__all__ = ["Metrics"]

_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_BATCH = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Requests by route and status, images, the queue, and the engine's batches."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Histogram(
            "redif_request_seconds",
            "Seconds from the first byte of a request to the last byte of its response.",
            ["route", "status"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.images = Counter("redif_images", "Images that were sent.", ["model"], registry=self.registry)
        self.pending = Gauge("redif_pending_images", "Images accepted and not yet answered.", registry=self.registry)
        self.rejected = Counter(
            "redif_rejected", "Requests refused because the queue was full.", registry=self.registry
        )
        self.cancelled = Counter(
            "redif_cancelled", "Requests whose client closed the connection.", registry=self.registry
        )
        self.nonfinite = Counter(
            "redif_nonfinite",
            "Requests that failed because an image held NaN or infinite values.",
            ["model"],
            registry=self.registry,
        )
        self.flagged = Counter(
            "redif_flagged",
            "Requests that failed because the safety filter flagged an image.",
            ["model"],
            registry=self.registry,
        )
        self.batches = Histogram(
            "redif_batch_images", "Images per engine call.", ["model"], buckets=_BATCH, registry=self.registry
        )
        self.engine = Histogram(
            "redif_batch_seconds", "Seconds per engine call.", ["model"], buckets=_SECONDS, registry=self.registry
        )

    def batch(self, model: str, images: int, seconds: float) -> None:
        """Count one engine call."""
        self.batches.labels(model).observe(images)
        self.engine.labels(model).observe(seconds)

    def text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry)
