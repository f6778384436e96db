"""How long an engine takes for a batch: the whole call, and the GPU's part of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from aoft_deploy.artefacts.engine import DeviceTimer, Engine

__all__ = ["Duration", "duration"]

RUNS = 8
"""Batches that each thread computes at most in one measurement with several threads."""

ENOUGH = 2.0
"""Seconds after which a thread starts no further batch, once it has computed two."""


class Duration(NamedTuple):
    """Seconds for one batch.

    Attributes:
        wall: From the call to the logits. With several threads, the time for all their batches,
            divided by the number of batches.
        device: The GPU's copies and kernels for one batch alone, by CUDA events; None for engines
            that do not measure them.
    """

    wall: float
    device: float | None


def duration(
    engine: Engine,
    inputs: tuple[Any, ...],
    lanes: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Duration:
    """Measure an engine.

    Args:
        engine: The engine.
        inputs: Arguments of ``Engine.run``.
        lanes: Number of threads that call the engine at once.
        clock: Returns the time in seconds.
    """
    wall = _alone(engine, inputs, clock) if lanes == 1 else _at_once(engine, inputs, lanes, clock)
    device = engine.device_seconds(*inputs) if isinstance(engine, DeviceTimer) else None
    return Duration(wall, device)


def _alone(engine: Engine, inputs: tuple[Any, ...], clock: Callable[[], float]) -> float:
    start = clock()
    engine.run(*inputs)
    return clock() - start


def _at_once(
    engine: Engine, inputs: tuple[Any, ...], lanes: int, clock: Callable[[], float]
) -> float:
    """Seconds of each batch, from the first one's start to the last one's end."""
    started = threading.Barrier(lanes)

    def lane(number: int) -> tuple[float, float, int]:
        started.wait()
        start = now = clock()
        for done in range(1, RUNS + 1):
            engine.run(*inputs)
            now = clock()
            if done > 1 and now - start > ENOUGH:
                break
        return start, now, done

    with ThreadPoolExecutor(lanes) as pool:
        done = list(pool.map(lane, range(lanes)))
    whole = max(end for _, end, _ in done) - min(start for start, _, _ in done)
    return whole / sum(runs for _, _, runs in done)
