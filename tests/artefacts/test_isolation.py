from __future__ import annotations

import operator
import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from aoft_deploy.artefacts.engine import Engine
from aoft_deploy.artefacts.isolation import SubprocessEngine
from aoft_deploy.artefacts.timing import Subject, interleaved
from aoft_deploy.errors import AoftError, UnknownNameError


class Summing:
    """An engine that returns the sum of each image, and stores its process id in ``info``."""

    device, takes_pixels = "cpu", False

    def __init__(self, factor: float, tasks: bool = False) -> None:
        print("output of a library while it loads")
        self.factor, self.takes_tasks = factor, tasks
        self.info: Mapping[str, str] = {"process": str(os.getpid()), "tasks": '["a", "b"]'}

    def run(
        self, images: NDArray[Any], task: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        print("output of a library while it runs")
        if not len(images):
            raise ValueError("no images")
        if len(images) == 13:
            os._exit(7)
        offset = 0 if task is None else task[:, None]
        sums = images.reshape(len(images), -1).sum(1, keepdims=True)
        return np.asarray(self.factor * sums + offset, np.float32)


def unknown() -> Engine:
    raise UnknownNameError("engine", "onyx", ["onnx"])


def test_an_engine_in_a_subprocess_gives_the_same_answers() -> None:
    images = np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2)
    task = np.array([0, 5])
    with SubprocessEngine(partial(Summing, 2.0, tasks=True)) as engine:
        assert engine.info["process"] != str(os.getpid())
        assert (engine.device, engine.takes_pixels, engine.takes_tasks) == ("cpu", False, True)
        np.testing.assert_array_equal(
            engine.run(images, task), Summing(2.0, tasks=True).run(images, task)
        )
        wall, device = engine.duration((images,))
        assert 0 < wall < 60
        assert device is None


def test_an_exception_in_the_subprocess_is_raised_here_and_the_engine_still_runs() -> None:
    with SubprocessEngine(partial(Summing, 1.0)) as engine:
        with pytest.raises(ValueError, match="no images"):
            engine.run(np.zeros((0, 3, 2, 2), np.float32))
        assert engine.run(np.ones((1, 3, 2, 2), np.float32)).tolist() == [[12.0]]


def test_an_exception_while_loading_is_raised_here() -> None:
    with pytest.raises(AoftError, match="onyx"):
        SubprocessEngine(unknown)


def test_the_end_of_the_subprocess_is_an_error() -> None:
    with SubprocessEngine(partial(Summing, 1.0)) as engine:
        with pytest.raises(AoftError, match="process ended with 7"):
            engine.run(np.zeros((13, 3, 2, 2), np.float32))


def test_the_subprocess_ends_with_the_context_manager() -> None:
    with SubprocessEngine(partial(Summing, 1.0)) as engine:
        process = int(engine.info["process"])
        os.kill(process, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_engines_in_subprocesses_are_timed_there() -> None:
    with (
        SubprocessEngine(partial(Summing, 1.0)) as one,
        SubprocessEngine(partial(Summing, 2.0)) as other,
    ):
        timings = interleaved([Subject.of("1", one), Subject.of("2", other)], [1, 2], (4, 4), 3)
    assert [(t.subject.name, t.batch) for t in timings] == [("1", 1), ("2", 1), ("1", 2), ("2", 2)]
    assert all(0 < second < 60 for timing in timings for second in timing.seconds)


def test_a_loader_that_returns_no_engine_is_an_error() -> None:
    with pytest.raises(AttributeError, match="info"):
        SubprocessEngine(partial(operator.add, 1, 2))
