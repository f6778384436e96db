"""Engines timed in turn in one run, so that their ratios are fair."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.artefacts.description import ArtefactInfo
from aoft_deploy.artefacts.engine import Engine
from aoft_deploy.artefacts.isolation import Apart

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
        info = ArtefactInfo(engine.info)
        return cls(name, engine, info.flops, info.precision)


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


def inputs_for(engine: Engine, batch: int, size: tuple[int, int]) -> tuple[NDArray[Any], ...]:
    """Arguments of ``Engine.run``: random images, and the tasks of a fleet in turn.

    Raises:
        ArtefactError: The fleet does not name its tasks.
    """
    rng = np.random.default_rng(0)
    if engine.takes_pixels:
        images: NDArray[Any] = rng.integers(0, 256, (batch, *size, 3), np.uint8)
    else:
        images = rng.standard_normal((batch, 3, *size), np.float32)
    if not engine.takes_tasks:
        return (images,)
    tasks = len(ArtefactInfo(engine.info).tasks)
    return images, np.arange(batch, dtype=np.int64) % tasks


def interleaved(
    subjects: Sequence[Subject],
    batches: Sequence[int],
    size: tuple[int, int],
    rounds: int,
    progress: Callable[[int], None] = lambda done: None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Timing]:
    """Time all subjects in turn, so that other load on the machine affects them alike.

    Every other round runs in reverse order. A turn is two runs, of which the second counts: the
    first finds the caches of another engine. Engines in one process disturb each other too, so run
    each in a subprocess with ``Apart``.

    Args:
        subjects: The ratios are those to the first.
        batches: Sizes.
        size: Height and width of the images.
        rounds: Times that each is run.
        progress: Called with the number of finished rounds.
        clock: Seconds; an engine in a subprocess has its own.

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
