from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from aoft_deploy.artefacts.machine import gemm_peaks
from aoft_deploy.artefacts.timing import Subject, Timing, inputs_for, interleaved, trusted_peaks
from aoft_deploy.errors import ArtefactError


class Clock:
    """A clock that moves only when a test sets ``now``."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Worker:
    """An engine that advances a clock by given durations, one for each run in turn."""

    device = "cpu"

    def __init__(self, clock: Clock, seconds: Sequence[float], order: list[str], **info: str):
        self.clock, self.seconds, self.order = clock, itertools.cycle(seconds), order
        self.info: Mapping[str, str] = info
        self.takes_pixels = "pixels" in info
        self.takes_tasks = "tasks" in info

    def run(
        self, images: NDArray[Any], task: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        self.order.append(f"{self.info['name']}{len(images)}")
        self.clock.now += next(self.seconds)
        return np.zeros((len(images), 1), np.float32)


TASKS = '[{"name": "a", "classes": ["x", "y"]}, {"name": "b", "classes": ["x", "y"]}]'


def idle(**info: str) -> Worker:
    return Worker(Clock(), [0.0], [], **info)


def test_subjects_run_in_turn_and_every_other_round_runs_in_reverse() -> None:
    order: list[str] = []
    clock = Clock()
    subjects = [Subject.of(n, Worker(clock, [1.0], order, name=n)) for n in "ab"]
    done: list[int] = []
    interleaved(subjects, [1, 2], (4, 4), 2, done.append, clock)
    once = ["a1", "b1", "a2", "b2"]
    turns = [turn for turn in once for _ in range(2)]
    assert order == once + turns + turns[::-1]
    assert done == [1, 2]


def test_medians_ratios_and_shares_follow_from_the_rounds() -> None:
    clock = Clock()
    times = [9.0, *(8.0, 4.0), *(8.0, 5.0), *(8.0, 30.0)]  # a first run, then two per round
    slow = Worker(clock, times, [], name="s", flops="1000")
    fast = Worker(clock, [9.0, 8.0, 1.0, 8.0, 2.0, 8.0, 1.5], [], name="f", flops="1000")
    fast.info = {**fast.info, "precision": "int8"}
    subjects = [Subject.of("slow", slow), Subject.of("fast", fast)]
    timings = interleaved(subjects, [2], (4, 4), 3, clock=clock)
    assert [timing.subject.name for timing in timings] == ["slow", "fast"]
    assert [timing.seconds for timing in timings] == [(4.0, 5.0, 30.0), (1.0, 2.0, 1.5)]
    assert timings[0].ratio == 1
    assert timings[1].ratios == (4.0, 2.5, 20.0) and timings[1].ratio == 4.0
    assert timings[0].median == 5.0 and timings[0].throughput == 0.4
    peaks = {"fp32": 800.0, "int8": 2000.0}
    assert timings[0].share(peaks) == pytest.approx(0.4 * 1000 / 800)
    assert timings[1].share(peaks) == pytest.approx(2 / 1.5 * 1000 / 2000)
    assert timings[1].share({"fp32": 1.0}) is None
    assert Subject.of("x", idle(name="x")).flops is None
    entry = timings[1].to_dict(peaks)
    assert entry["rounds"] == [1.0, 2.0, 1.5]
    assert (entry["ratio_lowest"], entry["ratio"], entry["ratio_highest"]) == (2.5, 4.0, 20.0)
    assert entry["share_of_peak"] == timings[1].share(peaks)
    assert entry["images_per_second"] == 2 / 1.5 and entry["seconds"] == 1.5


def test_dropped_subjects_are_not_timed_any_more_and_keep_their_ratios() -> None:
    order: list[str] = []
    clock = Clock()
    subjects = [Subject.of(n, Worker(clock, [1.0], order, name=n)) for n in "abc"]
    seen: list[list[int]] = []

    def drop(timings: Sequence[Timing]) -> set[int]:
        seen.append([len(each.ratios) for each in timings])
        return {0, 1} if len(seen) == 1 else set()

    timings = interleaved(subjects, [1], (4, 4), 3, clock=clock, drop=drop)
    assert [len(each.seconds) for each in timings] == [3, 1, 3]  # the first one is never dropped
    assert seen == [[1, 1, 1], [2, 1, 2], [3, 1, 3]]
    assert order.count("b1") == 1 + 2
    timings = interleaved(subjects, [1], (4, 4), 9, clock=clock, drop=lambda timings: {1, 2})
    assert [len(each.seconds) for each in timings] == [1, 1, 1]  # only the first one is left


def timing(precision: str, rate: float) -> Timing:
    """The timing of an artefact that computes at a rate in operations per second."""
    subject = Subject(precision, idle(), 1000, precision)
    return Timing(subject, 1, (1000 / rate,), (1.0,))


def test_a_peak_that_an_engine_exceeds_is_not_trusted() -> None:
    timings = [timing("fp32", 90.0), timing("int8", 300.0), timing("int8", 50.0)]
    assert trusted_peaks({"fp32": 100.0, "int8": 280.0}, timings) == {"fp32": 100.0}
    both = {"fp32": 90.0, "int8": 301.0}
    assert trusted_peaks(both, timings) == both
    unknown = Timing(Subject("x", idle(), None, "fp32"), 1, (1e-9,), (1.0,))
    assert trusted_peaks(both, [unknown]) == both


def test_inputs_have_the_type_and_shape_that_the_engine_takes() -> None:
    (images,) = inputs_for(idle(pixels=""), 3, (8, 4))
    assert images.dtype == np.uint8 and images.shape == (3, 8, 4, 3)
    images, task = inputs_for(idle(tasks=TASKS), 3, (8, 4))
    assert images.dtype == np.float32 and images.shape == (3, 3, 8, 4)
    assert task.tolist() == [0, 1, 0]
    with pytest.raises(ArtefactError, match="no valid entry 'tasks'"):
        inputs_for(idle(tasks="oops"), 1, (8, 8))


def products(clock: Clock, done: list[int], **rates: float) -> Any:
    """Products for ``gemm_peaks`` that advance a clock according to a rate for each precision."""

    def at_rate(rate: float) -> Any:
        def make(side: int) -> Any:
            def product() -> None:
                done.append(side)
                clock.now += 2 * side**3 / rate

            return product

        return make

    return {name: at_rate(rate) for name, rate in rates.items()}


def test_a_precision_that_is_not_faster_than_fp32_has_no_peak() -> None:
    clock = Clock()
    kinds = products(clock, [], fp32=1.5e11, bf16=2.6e9, int8=1.6e11)
    peaks = gemm_peaks(1, products=kinds, clock=clock)
    assert peaks == pytest.approx({"fp32": 1.5e11, "int8": 1.6e11})
    kinds = products(clock, [], fp32=1.5e11, int8=1.5e11)
    assert set(gemm_peaks(1, products=kinds, clock=clock)) == {"fp32"}


def test_measuring_the_peaks_stays_within_the_time_limit() -> None:
    clock, done = Clock(), list[int]()
    kinds = products(clock, done, fp32=7e10, int8=0.7e9)  # a product of 2048 would take 25 s
    assert set(gemm_peaks(1, 4.0, products=kinds, clock=clock)) == {"fp32"}
    assert clock.now <= 4.0
    assert 2048 in done
    done.clear()
    assert gemm_peaks(1, 1.0, products=products(clock, done, fp32=1e6), clock=clock) == {
        "fp32": pytest.approx(1e6)
    }
    assert done == [256]  # the smallest product always runs, even beyond the time limit


def test_the_peak_is_the_rate_of_the_fastest_product() -> None:
    clock = Clock()
    rates = iter([1e9, 2e9, 3e9, 2e9, 9e9, 8e9, *[5e9] * 8])

    def make(side: int) -> Any:
        def product() -> None:
            clock.now += 2 * side**3 / next(rates)

        return product

    assert gemm_peaks(1, 1e9, products={"fp32": make}, clock=clock) == {"fp32": pytest.approx(9e9)}
    assert next(rates, None) is None


def test_the_number_of_threads_is_set_and_then_restored() -> None:
    before, clock, seen = torch.get_num_threads(), Clock(), set[int]()

    def make(side: int) -> Any:
        def product() -> None:
            seen.add(torch.get_num_threads())
            clock.now += 1.0

        return product

    gemm_peaks(before + 1, products={"fp32": make}, clock=clock)
    assert seen == {before + 1} and torch.get_num_threads() == before


def test_the_peaks_of_pytorch_include_fp32_and_only_faster_precisions() -> None:
    peaks = gemm_peaks(1, 0.5)
    assert {"fp32"} <= set(peaks) <= {"fp32", "bf16", "int8"}
    assert all(peak >= peaks["fp32"] > 0 for peak in peaks.values())
