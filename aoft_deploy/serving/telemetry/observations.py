"""The metrics of a server, and their text for Prometheus."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict

from aoft_deploy.serving.repository.models import Models
from aoft_deploy.serving.telemetry.gpus import Gpu, Gpus, gpu_lines
from aoft_deploy.serving.telemetry.metrics import Counter, Histogram, exposition, gauge
from aoft_deploy.serving.telemetry.statistics import Statistics

__all__ = ["Observations"]

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MAX_MODELS = 1000
"""Maximum number of models with their own label; the others share ``_other``."""


class Observations:
    """Counters and histograms of a server.

    Attributes:
        statistics: Statistics of each model, as Triton reports them.
        in_flight: Number of requests that are not answered yet.
        gpus: Reads the figures of GPUs.
    """

    def __init__(self) -> None:
        self.statistics = Statistics()
        self.in_flight = 0
        self._labels: set[str] = set()
        self.gpus = Gpus()
        self.requests = Counter(
            "aoft_requests_total", "Requests by model and HTTP status.", ("model", "status")
        )
        self.stages = Histogram(
            "aoft_stage_seconds",
            "Time that answered requests spent, by stage.",
            ("artefact", "stage"),
            SECONDS,
        )
        self.sizes = Histogram("aoft_batch_size", "Samples of batches.", ("artefact",), SIZES)
        self.engine = Counter("aoft_engine_seconds_total", "Time in the engine.", ("artefact",))

    def label(self, model: str | None) -> str:
        """A model's label: its own name for the first thousand models."""
        if model is None:
            return "_unknown"
        if model in self._labels:
            return model
        if len(self._labels) >= MAX_MODELS:
            return "_other"
        self._labels.add(model)
        return model

    def batch(self, artefact: str, rows: int, seconds: float) -> None:
        """Count a batch of an engine."""
        self.sizes.observe(rows, artefact)
        self.engine.add(artefact, amount=seconds)

    def exposition(self, models: Models, ready: bool, gpus: Iterable[Gpu]) -> str:
        """The text for Prometheus.

        Args:
            models: The open models.
            ready: Whether requests are taken.
            gpus: Figures of the GPUs that run models.
        """
        parts = [part.lines() for part in (self.requests, self.stages, self.sizes, self.engine)]
        return exposition([*parts, *self._gauges(models, ready), *gpu_lines(gpus)])

    def _gauges(self, models: Models, ready: bool) -> Iterable[Iterable[str]]:
        artefacts = models.artefacts
        yield gauge("aoft_ready", "Whether requests are taken.", (), {(): ready})
        yield gauge("aoft_in_flight", "Requests not answered yet.", (), {(): self.in_flight})
        waiting = {(name,): float(a.batcher.waiting) for name, a in artefacts.items()}
        yield gauge("aoft_queue_depth", "Requests that wait for an engine.", ("artefact",), waiting)
        hung = {(name,): float(a.batcher.hung) for name, a in artefacts.items()}
        yield gauge("aoft_engine_stuck", "Batches that do not return.", ("artefact",), hung)
        workers = {(name,): float(a.batcher.workers) for name, a in artefacts.items()}
        yield gauge("aoft_engine_workers", "Batches that run at once.", ("artefact",), workers)
        counts = {
            (name, device, key): float(value)
            for name, a in artefacts.items()
            if a.fleet is not None
            for device, fleet in zip(a.devices, a.fleet.fleets, strict=True)
            for key, value in asdict(fleet.residency).items()
        }
        labels = ("artefact", "device", "key")
        yield gauge("aoft_resident", "Tasks of a fleet in memory: see key.", labels, counts)
