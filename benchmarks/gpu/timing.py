"""Time variants in turn, by the clock and by CUDA events."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch

from benchmarks.gpu.run import Run

__all__ = ["Subject", "Timing", "Variant", "interleaved", "note_speeds"]

Key = TypeVar("Key", bound=Hashable)


class Subject(NamedTuple):
    """What a row of the speeds is about.

    Attributes:
        runtime: ``ONNX Runtime``, ``PyTorch`` …
        model: ``plain``, ``merged``, or the tasks of a mixed batch.
        precision: ``fp32`` …
        images: Where the images lie and the logits go: ``NumPy``, ``NumPy uint8`` or ``GPU``.
    """

    runtime: str
    model: str
    precision: str
    images: str = "NumPy"


@dataclass(frozen=True)
class Variant:
    """Something to time.

    Attributes:
        run: Computes one batch.
        device_seconds: Seconds of the GPU for one batch, by the engine's own events; None if it
            has none.
        events: Whether ``run`` works on PyTorch's stream, whose events give the GPU's time.
    """

    run: Callable[[], object]
    device_seconds: Callable[[], float] | None = None
    events: bool = True


@dataclass(frozen=True)
class Timing:
    """Medians of a variant.

    Attributes:
        ms: Milliseconds from call to answer.
        device_ms: Milliseconds of the GPU; None if unknown.
    """

    ms: float
    device_ms: float | None


def interleaved(run: Run, variants: Mapping[Key, Variant], rounds: int = 15) -> dict[Key, Timing]:
    """Time all variants in turn, every other round in reverse order, after a warm-up of each."""
    rounds = 1 if run.dry else rounds
    for variant in variants.values():
        for _ in range(1 if run.dry else 3):
            variant.run()
    wall: dict[Key, list[float]] = {key: [] for key in variants}
    device: dict[Key, list[float]] = {key: [] for key in variants}
    for turn in range(rounds):
        order = list(variants.items())
        for key, variant in reversed(order) if turn % 2 else order:
            seconds, on_device = _once(variant, on_gpu=not run.dry)
            wall[key].append(1e3 * seconds)
            if on_device is not None:
                device[key].append(1e3 * on_device)
    return {
        key: Timing(
            statistics.median(wall[key]), statistics.median(device[key]) if device[key] else None
        )
        for key in variants
    }


def _once(variant: Variant, on_gpu: bool) -> tuple[float, float | None]:
    """Seconds of one batch by the clock, and by events on a GPU."""
    if variant.device_seconds is not None or not (on_gpu and variant.events):
        start = time.perf_counter()
        variant.run()
        seconds = time.perf_counter() - start
        return seconds, variant.device_seconds() if variant.device_seconds else None
    event: Any = torch.cuda.Event
    begin, end = event(enable_timing=True), event(enable_timing=True)
    torch.cuda.synchronize()
    start = time.perf_counter()
    begin.record()
    variant.run()
    end.record()
    torch.cuda.synchronize()
    return time.perf_counter() - start, begin.elapsed_time(end) / 1e3


def note_speeds(run: Run, batch: int, variants: Mapping[Subject, Variant]) -> None:
    """Time variants in turn, and write a row for each.

    Images per second count the GPU's time if the images are on the GPU, else the time from call to
    answer.
    """
    for subject, timing in interleaved(run, variants).items():
        ms = timing.device_ms if subject.images == "GPU" and timing.device_ms else timing.ms
        run.note(
            ", ".join(subject),
            kind="speed",
            **subject._asdict(),
            batch=batch,
            ms=timing.ms,
            device_ms=timing.device_ms,
            images_per_second=1e3 * batch / ms,
        )
