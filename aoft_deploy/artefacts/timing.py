"""Engines timed beside each other, and how much a machine can compute at most."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.artefacts.isolation import Apart
from aoft_deploy.artefacts.protocols import Engine
from aoft_deploy.errors import CheckpointError

__all__ = ["Subject", "Timing", "inputs_for", "interleaved", "trusted"]


@dataclass(frozen=True)
class Subject:
    """What is timed.

    Attributes:
        name: In tables.
        engine: What runs.
        flops: Arithmetic of an image; None where it is not known.
        precision: Of most of it: ``fp32``, ``bf16`` …
    """

    name: str
    engine: Engine
    flops: int | None
    precision: str

    @classmethod
    def of(cls, name: str, engine: Engine) -> Subject:
        """An engine with what its artefact says of itself."""
        count = engine.info.get("flops", "")
        known = int(count) if count.isdecimal() else None
        return cls(name, engine, known, engine.info.get("precision", "fp32"))


@dataclass(frozen=True)
class Timing:
    """How long a subject took for batches of a size.

    Attributes:
        subject: What ran.
        batch: Images in a batch.
        seconds: Of each round.
        ratios: Throughput as a multiple of the first subject's in the same round.
    """

    subject: Subject
    batch: int
    seconds: tuple[float, ...]
    ratios: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds for a batch."""
        return statistics.median(self.seconds)

    @property
    def ratio(self) -> float:
        """Median of ``ratios``."""
        return statistics.median(self.ratios)

    @property
    def throughput(self) -> float:
        """Images a second."""
        return self.batch / self.median

    def share(self, peaks: Mapping[str, float]) -> float | None:
        """Of a peak of ``gemm_peaks``, in the subject's precision; None where one is not known."""
        peak = peaks.get(self.subject.precision)
        if peak is None or self.subject.flops is None:
            return None
        return self.throughput * self.subject.flops / peak

    def to_dict(self, peaks: Mapping[str, float]) -> dict[str, Any]:
        """JSON values."""
        return {
            "name": self.subject.name,
            "batch": self.batch,
            "seconds": self.median,
            "images_per_second": self.throughput,
            "ratio": self.ratio,
            "ratio_lowest": min(self.ratios),
            "ratio_highest": max(self.ratios),
            "share_of_peak": self.share(peaks),
            "rounds": list(self.seconds),
        }


def inputs_for(engine: Engine, batch: int, size: int) -> tuple[NDArray[Any], ...]:
    """Arguments of ``Engine.run``: random images, and of a fleet its tasks in turn.

    Raises:
        CheckpointError: The fleet does not name its tasks.
    """
    rng = np.random.default_rng(0)
    if engine.takes_pixels:
        images: NDArray[Any] = rng.integers(0, 256, (batch, size, size, 3), np.uint8)
    else:
        images = rng.standard_normal((batch, 3, size, size), np.float32)
    if not engine.takes_tasks:
        return (images,)
    try:
        tasks = len(json.loads(engine.info["tasks"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError("The fleet does not name its tasks.") from error
    return images, np.arange(batch, dtype=np.int64) % tasks


def interleaved(
    subjects: Sequence[Subject],
    batches: Sequence[int],
    size: int,
    rounds: int,
    progress: Callable[[int], None] = lambda done: None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Timing]:
    """Time all subjects in turn, so that whatever else the machine does hits them alike.

    Every other round goes the other way round. A turn is two runs, of which the second counts: the
    first finds caches and page tables as another engine left them. Engines of one process disturb
    each other too (see ``apart``): have each ``Apart``.

    Args:
        subjects: The ratios are those to the first.
        batches: Sizes.
        size: Side of the square images, in pixels.
        rounds: Times that each is run.
        progress: Told the number of finished rounds.
        clock: Seconds; an engine that is ``Apart`` has its own.

    Returns:
        By batch size, then subject.
    """
    work = [(batch, place) for batch in batches for place in range(len(subjects))]
    inputs = {
        (batch, place): inputs_for(subjects[place].engine, batch, size) for batch, place in work
    }
    seconds: dict[tuple[int, int], list[float]] = {key: [] for key in work}
    for key in work:
        _seconds(subjects[key[1]].engine, inputs[key], clock)
    for turn in range(rounds):
        for key in work if turn % 2 == 0 else reversed(work):
            _seconds(subjects[key[1]].engine, inputs[key], clock)
            seconds[key].append(_seconds(subjects[key[1]].engine, inputs[key], clock))
        progress(turn + 1)
    return [
        Timing(
            subjects[place],
            batch,
            tuple(seconds[batch, place]),
            tuple(
                first / own
                for first, own in zip(seconds[batch, 0], seconds[batch, place], strict=True)
            ),
        )
        for batch, place in work
    ]


def _seconds(engine: Engine, inputs: tuple[NDArray[Any], ...], clock: Callable[[], float]) -> float:
    """Of one run."""
    if isinstance(engine, Apart):
        return engine.seconds(*inputs)
    start = clock()
    engine.run(*inputs)
    return clock() - start


def trusted(peaks: Mapping[str, float], timings: Sequence[Timing]) -> dict[str, float]:
    """Those of ``gemm_peaks`` that no engine exceeds.

    An engine's own kernels may be faster than PyTorch's. What was measured is no limit then, and
    a share of it says nothing about any engine of that precision.
    """
    shares = [(timing.subject.precision, timing.share(peaks) or 0.0) for timing in timings]
    exceeded = {precision for precision, share in shares if share > 1}
    return {name: peak for name, peak in peaks.items() if name not in exceeded}
