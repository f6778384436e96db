from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from aoft_deploy.artefacts.duration import ENOUGH, RUNS, duration


class Meeting:
    """An engine whose runs end only when as many threads are in them as it has lanes."""

    device, takes_pixels, takes_tasks = "cuda:0", False, False

    def __init__(self, lanes: int) -> None:
        self.info: Mapping[str, str] = {}
        self.runs, self._together = 0, threading.Barrier(lanes, self._count)

    def _count(self) -> None:
        self.runs += self._together.parties

    def run(
        self, images: NDArray[Any], task: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        self._together.wait(timeout=30)
        return np.zeros((1, 1), np.float32)


class Timed(Meeting):
    """An engine that measures the GPU's part."""

    def device_seconds(self, images: NDArray[Any], task: NDArray[np.int64] | None = None) -> float:
        return 0.25


class Clock:
    """Gives each thread its own times: 100, 100 + step, 100 + 2 step …"""

    def __init__(self, step: float) -> None:
        self._step, self._own = step, threading.local()

    def __call__(self) -> float:
        now: float = getattr(self._own, "now", 100.0)
        self._own.now = now + self._step
        return now


@pytest.mark.parametrize(
    ("lanes", "step", "runs"),
    [(1, 3, 1), (2, ENOUGH / 20, RUNS), (5, ENOUGH / 20, RUNS), (2, 3, 2), (3, ENOUGH / 2.5, 3)],
)
def test_as_many_threads_as_lanes_run_at_once_and_the_time_is_that_of_one_batch(
    lanes: int, step: float, runs: int
) -> None:
    engine = Meeting(lanes)
    found = duration(engine, (np.zeros(1),), lanes, clock=Clock(step))
    assert engine.runs == lanes * runs
    assert found.wall == pytest.approx(step / lanes) and found.device is None


def test_an_engine_that_measures_its_gpu_is_asked() -> None:
    assert duration(Timed(1), (np.zeros(1),)).device == 0.25


def test_an_error_in_one_of_the_threads_is_raised() -> None:
    class Failing(Meeting):
        def run(
            self, images: NDArray[Any], task: NDArray[np.int64] | None = None
        ) -> NDArray[np.float32]:
            raise ValueError("no images")

    with pytest.raises(ValueError, match="no images"):
        duration(Failing(1), (np.zeros(1),), 3)
