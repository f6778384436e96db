from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from aoft_deploy.artefacts.duration import RUNS, Duration, duration


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


@pytest.mark.parametrize("lanes", [1, 2, 5])
def test_as_many_threads_as_lanes_run_at_once_and_the_time_is_that_of_one_batch(
    lanes: int,
) -> None:
    engine, times = Meeting(lanes), iter([100.0, 180.0])
    found = duration(engine, (np.zeros(1),), lanes, clock=lambda: next(times))
    runs = 1 if lanes == 1 else RUNS * lanes
    assert engine.runs == runs
    assert found == Duration(80.0 / runs, None)


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
