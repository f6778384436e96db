"""Time variants in turn, by the clock and by CUDA events."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from benchmarks.gpu.run import Run

__all__ = ["Timing", "Variant", "interleaved"]


@dataclass(frozen=True)
class Variant:
    """Something to time.

    Attributes:
        run: Computes one batch.
        device_seconds: Seconds of the GPU for one batch, by the engine's own events; None times
            ``run`` on PyTorch's stream.
        events: Whether the GPU's time is known at all.
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


def interleaved(run: Run, variants: Mapping[str, Variant], rounds: int = 15) -> dict[str, Timing]:
    """Time all variants in turn, every other round in reverse order, after one warm-up each."""
    rounds = 1 if run.dry else rounds
    for variant in variants.values():
        for _ in range(1 if run.dry else 3):
            variant.run()
    wall: dict[str, list[float]] = {name: [] for name in variants}
    device: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(rounds):
        order = list(variants.items())
        for name, variant in reversed(order) if turn % 2 else order:
            seconds, on_device = _once(variant, not run.dry)
            wall[name].append(1e3 * seconds)
            if on_device is not None:
                device[name].append(1e3 * on_device)
    return {
        name: Timing(
            statistics.median(wall[name]),
            statistics.median(device[name]) if device[name] else None,
        )
        for name in variants
    }


def _once(variant: Variant, on_gpu: bool) -> tuple[float, float | None]:
    """Seconds of one batch by the clock, and by events on a GPU."""
    if variant.device_seconds is not None:
        start = time.perf_counter()
        variant.run()
        return time.perf_counter() - start, variant.device_seconds()
    if not (on_gpu and variant.events):
        start = time.perf_counter()
        variant.run()
        return time.perf_counter() - start, None
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start = time.perf_counter()
    begin.record()
    variant.run()
    end.record()
    torch.cuda.synchronize()
    return time.perf_counter() - start, begin.elapsed_time(end) / 1e3
