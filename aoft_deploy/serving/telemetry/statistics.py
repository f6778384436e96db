"""Statistics of each model in the form of Triton's statistics extension."""

from __future__ import annotations

import time
from typing import Any

from aoft_deploy.serving.protocol.messages import VERSION

__all__ = ["ModelStatistics", "Statistics"]

DURATIONS = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")
MAX_MODELS = 10_000
"""Maximum number of models; the oldest entries are dropped first."""


class ModelStatistics:
    """Counts and nanoseconds of one model."""

    __slots__ = ("batches", "executions", "inferences", "last", "stages")

    def __init__(self) -> None:
        self.inferences = self.executions = self.last = 0
        self.stages = {name: [0, 0] for name in DURATIONS}
        self.batches: dict[int, list[int]] = {}  # by size: count, and nanoseconds of three stages

    def succeeded(
        self, rows: int, batch: int, first: bool, stages: tuple[int, int, int, int]
    ) -> None:
        """Count a request that was answered.

        Args:
            rows: Number of its samples.
            batch: Number of samples in its whole batch.
            first: Whether it was the first request of this model in the batch.
            stages: Nanoseconds of queue, input, inference and output.
        """
        self.inferences += rows
        self.last = int(time.time() * 1000)
        for name, ns in zip(DURATIONS[2:], stages, strict=True):
            self._add(name, ns)
        self._add("success", sum(stages))
        if first:
            self.executions += 1
            found = self.batches.setdefault(batch, [0, 0, 0, 0])
            found[0] += 1
            for i in (1, 2, 3):
                found[i] += stages[i]

    def failed(self, ns: int) -> None:
        """Count a request that failed."""
        self._add("fail", ns)

    def _add(self, name: str, ns: int) -> None:
        entry = self.stages[name]
        entry[0] += 1
        entry[1] += ns

    def report(self, model: str) -> dict[str, Any]:
        """The report in Triton's form."""
        none = {"count": 0, "ns": 0}
        return {
            "name": model,
            "version": VERSION,
            "last_inference": self.last,
            "inference_count": self.inferences,
            "execution_count": self.executions,
            "inference_stats": {
                **{name: {"count": n, "ns": ns} for name, (n, ns) in self.stages.items()},
                "cache_hit": none,
                "cache_miss": none,
            },
            "batch_stats": [
                {
                    "batch_size": size,
                    **{
                        name: {"count": found[0], "ns": found[i]}
                        for i, name in enumerate(DURATIONS[3:], 1)
                    },
                }
                for size, found in sorted(self.batches.items())
            ],
        }


class Statistics(dict[str, ModelStatistics]):
    """Statistics by model; an entry is created when it is first used."""

    def __missing__(self, model: str) -> ModelStatistics:
        if len(self) >= MAX_MODELS:
            del self[next(iter(self))]
        self[model] = ModelStatistics()
        return self[model]
