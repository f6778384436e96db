"""Time engines in one interleaved run, so that their speeds can be compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.artefacts.description import ArtefactInfo
from aoft_deploy.artefacts.duration import Duration, duration
from aoft_deploy.artefacts.engine import Engine
from aoft_deploy.artefacts.isolation import SubprocessEngine

__all__ = ["Subject", "Timing", "inputs_for", "interleaved", "trusted_peaks"]


@dataclass(frozen=True)
class Subject:
    """An engine to be timed.

    Attributes:
        name: Name for tables.
        engine: The engine.
        flops: Floating-point operations for one image; None if unknown.
        precision: Precision of most of the arithmetic: ``fp32``, ``bf16`` …
        lanes: Number of threads that call the engine at once.
    """

    name: str
    engine: Engine
    flops: int | None
    precision: str
    lanes: int = 1

    @classmethod
    def of(cls, name: str, engine: Engine, lanes: int = 1) -> Subject:
        """An engine, with FLOPs and precision from its artefact's metadata."""
        info = ArtefactInfo(engine.info)
        return cls(name, engine, info.flops, info.precision, lanes)


@dataclass(frozen=True)
class Timing:
    """Measured durations of one subject at one batch size.

    Attributes:
        subject: The timed engine.
        batch: Number of images in a batch.
        seconds: Duration of one batch, for each round; see ``Duration.wall``.
        ratios: Throughput relative to the first subject, for each round.
        device_seconds: The GPU's part of a batch, for each round; empty for engines that do not
            measure it.
    """

    subject: Subject
    batch: int
    seconds: tuple[float, ...]
    ratios: tuple[float, ...]
    device_seconds: tuple[float, ...] = ()

    @property
    def median(self) -> float:
        """Median of ``seconds``."""
        return statistics.median(self.seconds)

    @property
    def device_median(self) -> float | None:
        """Median of ``device_seconds``, or None."""
        return statistics.median(self.device_seconds) if self.device_seconds else None

    @property
    def ratio(self) -> float:
        """Median of ``ratios``."""
        return statistics.median(self.ratios)

    @property
    def throughput(self) -> float:
        """Images per second."""
        return self.batch / self.median

    def share(self, peaks: Mapping[str, float]) -> float | None:
        """Share of the peak in the subject's precision; None if the peak or FLOPs are unknown.

        Args:
            peaks: The result of ``gemm_peaks``.
        """
        peak = peaks.get(self.subject.precision)
        if peak is None or self.subject.flops is None:
            return None
        return self.throughput * self.subject.flops / peak

    def to_dict(self, peaks: Mapping[str, float]) -> dict[str, Any]:
        """JSON values."""
        return {
            "name": self.subject.name,
            "batch": self.batch,
            "device": self.subject.engine.device,
            "lanes": self.subject.lanes,
            "seconds": self.median,
            "device_seconds": self.device_median,
            "images_per_second": self.throughput,
            "ratio": self.ratio,
            "ratio_lowest": min(self.ratios),
            "ratio_highest": max(self.ratios),
            "share_of_peak": self.share(peaks),
            "rounds": list(self.seconds),
        }


def inputs_for(engine: Engine, batch: int, size: tuple[int, int]) -> tuple[NDArray[Any], ...]:
    """Arguments for ``Engine.run``: random images and, for a fleet, its tasks in turn.

    Raises:
        ArtefactError: The fleet's metadata has no valid list of tasks.
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
    drop: Callable[[Sequence[Timing]], Collection[int]] = lambda timings: (),
) -> list[Timing]:
    """Time all subjects in turn, so that other load on the machine affects all of them equally.

    Every other round runs in reverse order. A turn consists of two runs, of which the second is
    timed: the first run finds the caches filled by another engine. Engines in one process affect
    each other as well, so each one should run in a subprocess (``SubprocessEngine``).

    Args:
        subjects: The engines. Ratios are relative to the first one.
        batches: Batch sizes.
        size: Height and width of the images.
        rounds: Number of timed runs of each subject at each batch size.
        progress: Called with the number of finished rounds.
        clock: Returns the time in seconds. Engines in a subprocess use their own clock.
        drop: Called after each round with the timings so far, in the order of the result. The
            subjects whose numbers it returns are not timed any more; the first one always is.

    Returns:
        The timings, ordered by batch size, then by subject.
    """
    work = [(batch, index) for batch in batches for index in range(len(subjects))]
    inputs = {
        (batch, index): inputs_for(subjects[index].engine, batch, size) for batch, index in work
    }
    found: dict[tuple[int, int], list[Duration]] = {key: [] for key in work}
    for key in work:
        _duration(subjects[key[1]], inputs[key], clock)
    dropped = set[int]()
    for turn in range(rounds):
        for key in work if turn % 2 == 0 else reversed(work):
            if key[1] not in dropped:
                _duration(subjects[key[1]], inputs[key], clock)
                found[key].append(_duration(subjects[key[1]], inputs[key], clock))
        progress(turn + 1)
        dropped |= {*drop(_timings(subjects, found))} - {0}
        if len(dropped) == len(subjects) - 1 > 0:
            break
    return _timings(subjects, found)


def _timings(
    subjects: Sequence[Subject], found: Mapping[tuple[int, int], Sequence[Duration]]
) -> list[Timing]:
    """The timings by batch size and number of the subject; all began in the first round."""
    return [
        Timing(
            subjects[index],
            batch,
            tuple(own.wall for own in durations),
            tuple(
                first.wall / own.wall
                for first, own in zip(found[batch, 0], durations, strict=False)
            ),
            tuple(own.device for own in durations if own.device is not None),
        )
        for (batch, index), durations in found.items()
    ]


def trusted_peaks(peaks: Mapping[str, float], timings: Sequence[Timing]) -> dict[str, float]:
    """The peaks of ``gemm_peaks`` that no engine exceeds.

    An engine's kernels can be faster than PyTorch's. The measured peak of that precision is then
    not an upper bound, and shares of it are meaningless.
    """
    shares = [(timing.subject.precision, timing.share(peaks) or 0.0) for timing in timings]
    exceeded = {precision for precision, share in shares if share > 1}
    return {name: peak for name, peak in peaks.items() if name not in exceeded}


def _duration(
    subject: Subject, inputs: tuple[NDArray[Any], ...], clock: Callable[[], float]
) -> Duration:
    if isinstance(subject.engine, SubprocessEngine):
        return subject.engine.duration(inputs, subject.lanes)
    return duration(subject.engine, inputs, subject.lanes, clock)
