"""Requests share batches, each gets its own answer, and none waits without need."""

from __future__ import annotations

import asyncio
import math
import selectors
import threading
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from aoft_deploy.serving.batching.batcher import Batcher
from aoft_deploy.serving.batching.collector import Collector
from aoft_deploy.serving.batching.worker import Answer, NotFiniteError, Replica
from aoft_deploy.serving.deadlines import TICK, Deadlines
from aoft_deploy.serving.protocol.refusals import Refusal


def test_a_single_request_is_sent_at_once() -> None:
    queue: Collector[str] = Collector(8, 0.01, 10)
    assert queue.wait(0.0) is None
    for now in (1.0, 2.0, 3.0):
        assert queue.add("a", 1, now)
        assert queue.wait(now) == 0.0
        assert queue.take() == ["a"]
        queue.engine_free(1, now + 0.5)


def test_returning_clients_share_a_batch() -> None:
    queue: Collector[int] = Collector(8, 0.01, 10)
    queue.add(0, 1, 0.0)
    assert queue.take() == [0]
    for i in (1, 2, 3):
        queue.add(i, 1, 0.1)
    queue.engine_free(1, 1.0)  # three wait, one is expected again
    assert queue.wait(1.0) == pytest.approx(0.01)
    queue.add(4, 1, 1.001)
    assert queue.wait(1.001) == 0.0
    assert queue.take() == [1, 2, 3, 4]
    queue.engine_free(4, 2.0)
    queue.add(5, 1, 2.001)  # the other clients do not return
    assert queue.wait(2.001) == pytest.approx(0.01)
    assert queue.wait(2.012) == 0.0
    assert queue.take() == [5]
    queue.engine_free(1, 3.0)
    queue.add(6, 1, 3.001)
    assert queue.wait(3.001) == 0.0


def test_a_batch_respects_the_maximum_but_a_larger_request_runs_alone() -> None:
    queue: Collector[str] = Collector(4, 0.0, 10)
    for name, rows in (("a", 3), ("b", 2), ("c", 2), ("d", 9), ("e", 1)):
        queue.add(name, rows, 0.0)
    assert queue.rows == 17
    assert [queue.take() for _ in range(4)] == [["a"], ["b", "c"], ["d"], ["e"]]
    assert queue.rows == 0 and len(queue) == 0


def test_a_full_queue_refuses_until_a_request_leaves() -> None:
    queue: Collector[str] = Collector(4, 0.0, 2)
    assert queue.add("a", 1, 0.0) and queue.add("b", 5, 0.0) and not queue.add("c", 1, 0.0)
    queue.discard("b")
    queue.discard("b")
    assert queue.rows == 1 and queue.add("c", 1, 0.0)
    assert queue.clear() == ["a", "c"] and queue.rows == 0 and queue.wait(0.0) is None


STEPS = st.lists(
    st.tuples(st.sampled_from(["add", "discard", "take"]), st.integers(1, 6)), max_size=60
)


@settings(max_examples=200, deadline=None)
@given(steps=STEPS, capacity=st.integers(1, 8))
def test_every_request_runs_once_in_order_and_within_the_limits(
    steps: list[tuple[str, int]], capacity: int
) -> None:
    queue: Collector[int] = Collector(5, 0.01, capacity)
    waiting: dict[int, int] = {}
    for now, (step, number) in enumerate(steps):
        if step == "add":
            assert queue.add(now, number, now) is (len(waiting) < capacity)
            if len(waiting) < capacity:
                waiting[now] = number
        elif step == "discard":
            gone = next(iter(waiting), -1)
            queue.discard(gone)
            waiting.pop(gone, None)
        else:
            wait = queue.wait(now)
            assert (wait is None) is (not waiting) and (wait is None or 0 <= wait <= 0.01)
            batch = queue.take()
            assert batch == list(waiting)[: len(batch)] and bool(batch) is bool(waiting)
            rows = [waiting.pop(item) for item in batch]
            assert sum(rows) <= 5 or len(rows) == 1
            queue.engine_free(sum(rows), now + 0.5)
        assert (len(queue), queue.rows) == (len(waiting), sum(waiting.values()))


class Engine:
    """Answers with each sample's value and its task's length; records its calls."""

    def __init__(self) -> None:
        self.batches: list[list[float]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.poison: set[float] = set()

    def __call__(self, images: NDArray[Any], tasks: Sequence[str]) -> list[Any]:
        values = images[:, 0].tolist()
        self.batches.append(values)
        assert self.gate.wait(60)
        if self.poison.intersection(values):
            raise RuntimeError("poison")
        rows = [np.array([v, len(t)], np.float32) for v, t in zip(values, tasks, strict=True)]
        return [
            (row, (f"value of {task}", "length")) for row, task in zip(rows, tasks, strict=True)
        ]

    async def blocked(self, subject: Batcher, *values: float) -> list[asyncio.Task[Answer]]:
        """Requests of which the first blocks in the engine and the others are queued."""
        self.gate.clear()
        running = asyncio.create_task(asked(subject, values[0]))
        await until(lambda: self.batches[-1:] == [[values[0]]])
        tasks = [running, *(asyncio.create_task(asked(subject, value)) for value in values[1:])]
        await until(lambda: subject.waiting == len(values) - 1)
        return tasks


async def until(true: Callable[[], bool]) -> None:
    """Wait for a condition; the test's timeout ends a wait in vain."""
    while not true():
        await asyncio.sleep(0.001)


def batcher(engine: Engine, stop: Callable[[], object] | None = None, **changes: Any) -> Batcher:
    options = {"max_rows": 8, "max_wait": 0.005, "capacity": 64, **changes}
    return Batcher([Replica(engine, stop=stop)], **options)


def sample(*values: float) -> NDArray[np.float32]:
    return np.array([[value] for value in values], np.float32)


Ask = Callable[[Batcher, Engine], Coroutine[Any, Any, None]]


def run_scenario(scenario: Ask, **options: Any) -> Engine:
    async def run() -> Engine:
        engine = Engine()
        subject = batcher(engine, **options)
        await asyncio.wait_for(scenario(subject, engine), 60)
        assert subject.waiting == 0
        engine.gate.set()
        subject.close()
        return engine

    return asyncio.run(run())


async def asked(subject: Batcher, value: float, task: str = "", seconds: float = 60.0) -> Answer:
    return await subject.answer(sample(value), task, seconds)


def test_each_request_gets_its_own_answer_from_mixed_batches() -> None:
    async def scenario(subject: Batcher, engine: Engine) -> None:
        async def client(number: int) -> None:
            for turn in range(10):
                rows = 1 + (number + turn) % 3
                values = [100.0 * number + 10 * turn + i for i in range(rows)]
                answer = await subject.answer(sample(*values), "x" * number, 60.0)
                assert answer.logits.tolist() == [[value, number] for value in values]
                assert answer.classes == (f"value of {'x' * number}", "length")
                assert answer.rows >= rows

        await asyncio.gather(*map(client, range(12)))

    engine = run_scenario(scenario)
    assert max(map(len, engine.batches)) > 4 and max(map(len, engine.batches)) <= 8


def test_a_request_larger_than_a_batch_runs_alone() -> None:
    """The engine answers all of it with one version, and may run it in parts."""

    async def scenario(subject: Batcher, engine: Engine) -> None:
        engine.gate.clear()
        values = [float(i) for i in range(20)]
        first = asyncio.create_task(asked(subject, -1.0))
        await until(lambda: engine.batches == [[-1.0]])
        large = asyncio.create_task(subject.answer(sample(*values), "ab", 60.0))
        last = asyncio.create_task(asked(subject, -2.0))
        await until(lambda: subject.waiting == 2)
        engine.gate.set()
        answer = await large
        assert answer.logits.tolist() == [[value, 2] for value in values] and answer.rows == 20
        await asyncio.gather(first, last)

    assert list(map(len, run_scenario(scenario).batches)) == [1, 20, 1]


def test_a_faulty_request_fails_alone() -> None:
    async def scenario(subject: Batcher, engine: Engine) -> None:
        engine.poison = {3.0}
        first, *others = await engine.blocked(subject, 9, *range(8))
        engine.gate.set()
        await first
        found = await asyncio.gather(*others, return_exceptions=True)
        assert [isinstance(answer, RuntimeError) for answer in found] == [i == 3 for i in range(8)]

    assert run_scenario(scenario).batches[1] == [float(i) for i in range(8)]


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_logits_that_are_not_finite_are_an_error(value: float) -> None:
    async def scenario(subject: Batcher, engine: Engine) -> None:
        first, *both = await engine.blocked(subject, 0.0, 1.0, value)
        engine.gate.set()
        await first
        answers = await asyncio.gather(*both, return_exceptions=True)
        assert isinstance(answers[0], Answer) and isinstance(answers[1], NotFiniteError)

    run_scenario(scenario)


def test_time_runs_out_in_the_queue_and_the_request_never_runs() -> None:
    async def scenario(subject: Batcher, engine: Engine) -> None:
        (first,) = await engine.blocked(subject, 1.0)
        with pytest.raises(Refusal, match="time for this request") as caught:
            await asked(subject, 2.0, seconds=0.001)  # the engine is still blocked
        assert caught.value.status == 504 and not first.done()
        assert subject.waiting == 0
        engine.gate.set()
        await first

    assert run_scenario(scenario).batches == [[1.0]]


def test_a_cancelled_request_leaves_the_queue() -> None:
    async def scenario(subject: Batcher, engine: Engine) -> None:
        first, gone = await engine.blocked(subject, 1.0, 2.0)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert subject.waiting == 0
        engine.gate.set()
        await first

    assert run_scenario(scenario).batches == [[1.0]]


def test_a_full_queue_refuses_at_once_with_retry_after() -> None:
    async def scenario(subject: Batcher, engine: Engine) -> None:
        accepted = await engine.blocked(subject, *range(5))
        with pytest.raises(Refusal, match="Too many requests wait") as caught:
            await asked(subject, 9.0)
        assert not any(task.done() for task in accepted)  # refused while the engine is blocked
        assert caught.value.status == 429 and int(caught.value.headers["Retry-After"]) >= 1
        engine.gate.set()
        await asyncio.gather(*accepted)

    run_scenario(scenario, capacity=4)


def test_a_hung_engine_fails_its_requests_and_is_used_again_later() -> None:
    stopped = threading.Event()

    async def scenario(subject: Batcher, engine: Engine) -> None:
        (running,) = await engine.blocked(subject, 1.0)
        with pytest.raises(Refusal, match="did not answer in time") as late:
            await running
        assert late.value.status == 504 and subject.stuck and stopped.is_set()
        with pytest.raises(Refusal, match="try another replica") as never:
            await asked(subject, 3.0)
        assert never.value.status == 503
        engine.gate.set()
        await until(lambda: not subject.stuck)
        subject._engine_seconds = math.inf  # from here on the test triggers the watchdog
        running, queued = await engine.blocked(subject, 5.0, 6.0)
        subject._time_out(subject._workers[0])
        for task, status in ((running, 504), (queued, 503)):
            with pytest.raises(Refusal) as caught:
                await task
            assert caught.value.status == status
        engine.gate.set()
        await until(lambda: not subject.stuck)
        assert (await asked(subject, 4.0)).logits.tolist() == [[4.0, 0.0]]

    batches = run_scenario(scenario, engine_seconds=0.05, stop=stopped.set).batches
    assert batches == [[1.0], [5.0], [4.0]]


def test_the_first_request_of_each_task_in_a_batch_is_marked() -> None:
    async def scenario(subject: Batcher, engine: Engine) -> None:
        (first,) = await engine.blocked(subject, 0.0)
        tasks = [asyncio.create_task(asked(subject, 1.0, task)) for task in ("a", "b", "a")]
        await until(lambda: subject.waiting == 3)
        engine.gate.set()
        await first
        answers = await asyncio.gather(*tasks)
        assert [answer.first for answer in answers] == [True, True, False]
        assert all(answer.rows == 3 and answer.queued > 0 for answer in answers)

    run_scenario(scenario)


def test_queued_requests_are_answered_after_close_and_the_thread_ends() -> None:
    threads: list[threading.Thread] = []

    async def scenario(subject: Batcher, engine: Engine) -> None:
        before = set(threading.enumerate())
        tasks = await engine.blocked(subject, *range(3))
        threads.extend(set(threading.enumerate()) - before)
        subject.close()
        engine.gate.set()
        assert [answer.logits[0, 0] for answer in await asyncio.gather(*tasks)] == [0, 1, 2]

    run_scenario(scenario)
    (thread,) = threads
    thread.join(60)
    assert not thread.is_alive()


class Timeless(selectors.DefaultSelector):
    """A selector that does not sleep, but advances the clock instead."""

    now = 0.0
    waits: list[float]

    def select(self, timeout: float | None = None) -> Any:
        if timeout is not None and timeout > 0:
            self.waits.append(timeout)
            self.now += timeout
        return super().select(0)


def run_with_fake_clock(
    scenario: Callable[[Callable[[], float]], Coroutine[Any, Any, None]],
) -> list[float]:
    """Run with a clock that advances only when the event loop waits; return the waits."""
    selector = Timeless()
    selector.waits = []
    loop = asyncio.SelectorEventLoop(selector)
    loop.time = lambda: selector.now  # type: ignore[method-assign]
    try:
        loop.run_until_complete(scenario(loop.time))
    finally:
        loop.close()
    return selector.waits


def test_deadlines_run_in_time_and_not_after_they_were_discarded() -> None:
    async def scenario(now: Callable[[], float]) -> None:
        deadlines, called = Deadlines(), dict[str, float]()
        for name, seconds in (("a", 3.0), ("b", 3.0), ("c", 30.0), ("d", 1.0)):
            deadlines.add(name, seconds, partial(lambda own: called.update({own: now()}), name))
        deadlines.discard("b")
        await asyncio.sleep(2.0)
        assert called == {"d": pytest.approx(1.0, abs=2 * TICK)}
        await asyncio.sleep(2.0)
        assert called.keys() == {"d", "a"} and called["a"] == pytest.approx(3.0, abs=2 * TICK)
        deadlines.shorten(5.0)  # at 4
        await asyncio.sleep(4.5)
        assert "c" not in called
        await asyncio.sleep(1.0)
        assert called["c"] == pytest.approx(9.0, abs=2 * TICK)
        deadlines.add("e", 1.0, lambda: called.update(e=now()))
        deadlines.shorten(100.0)  # not longer
        await asyncio.sleep(2.0)
        assert called["e"] == pytest.approx(10.5, abs=2 * TICK)
        assert "b" not in called

    run_with_fake_clock(scenario)


def test_deadlines_do_not_wake_the_loop_before_they_are_due() -> None:
    async def scenario(now: Callable[[], float]) -> None:
        deadlines, called = Deadlines(), list[str]()
        for name in "abc":
            deadlines.add(name, 30.0, partial(called.append, name))
        await asyncio.sleep(20.0)
        deadlines.add("d", 2.0, partial(called.append, "d"))  # earlier than all others
        await asyncio.sleep(5.0)
        assert called == ["d"]

    waits = run_with_fake_clock(scenario)
    assert sum(waits) == pytest.approx(25.0) and len(waits) == 3
