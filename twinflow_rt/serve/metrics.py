"""What a server counts, in Prometheus' text format."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from .engine import Batch, Engine

SECONDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 40, 80)
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


class Metrics:
    """The counters of one engine, which reports its batches here."""

    def __init__(self, engine: Engine) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "twinflow_requests", "Responses by path and status (499: the client left).", ("path", "status"),
            registry=registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "twinflow_request_seconds", "Time to answer a generation request.", registry=registry, buckets=SECONDS
        )
        self.images = Counter("twinflow_images", "Images generated.", registry=registry)
        self.failures = Counter("twinflow_failed_batches", "Runs that failed or were cancelled.", registry=registry)
        self.sizes = Histogram("twinflow_batch_images", "Images per run.", registry=registry, buckets=SIZES)
        self.batches = Histogram("twinflow_batch_seconds", "Time of a run.", registry=registry, buckets=SECONDS)
        self.waits = Histogram(
            "twinflow_queue_seconds", "Time the oldest image of a run had waited.", registry=registry, buckets=SECONDS
        )
        self.stages = Counter("twinflow_stage_seconds", "Time spent in each stage.", ("stage",), registry=registry)
        waiting = Gauge("twinflow_waiting_images", "Images in the queue.", registry=registry)
        running = Gauge("twinflow_running_images", "Images being generated.", registry=registry)
        waiting.set_function(lambda: engine.waiting)
        running.set_function(lambda: engine.running)
        ProcessCollector(registry=registry)
        engine.observe = self.observe

    def observe(self, batch: Batch) -> None:
        if not batch.timings:
            self.failures.inc()
            return
        self.images.inc(batch.size)
        self.sizes.observe(batch.size)
        self.batches.observe(batch.seconds)
        self.waits.observe(batch.wait)
        for stage, seconds in batch.timings.items():
            if stage != "total":
                self.stages.labels(stage).inc(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)
