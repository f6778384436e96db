"""Requests come together in batches, each gets its own answer, and nobody waits for nothing."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from aoft_deploy.serving.batcher import Answer, Batcher
from aoft_deploy.serving.collector import Collector
from aoft_deploy.serving.deadlines import Deadlines
from aoft_deploy.serving.refusals import Refusal


def test_a_lone_request_goes_at_once() -> None:
    queue: Collector[str] = Collector(8, 0.01, 10)
    assert queue.wait(0.0) is None
    for now in (1.0, 2.0, 3.0):
        assert queue.add("a", 1, now)
        assert queue.wait(now) == 0.0
        assert queue.take() == ["a"]
        queue.engine_free(1, now + 0.5)


def test_clients_that_ask_again_are_waited_for_and_then_go_together() -> None:
    queue: Collector[int] = Collector(8, 0.01, 10)
    queue.add(0, 1, 0.0)
    assert queue.take() == [0]
    for i in (1, 2, 3):
        queue.add(i, 1, 0.1)
    queue.engine_free(1, 1.0)  # three wait, one asks again
    assert queue.wait(1.0) == pytest.approx(0.01)
    queue.add(4, 1, 1.001)
    assert queue.wait(1.001) == 0.0
    assert queue.take() == [1, 2, 3, 4]
    queue.engine_free(4, 2.0)
    queue.add(5, 1, 2.001)  # the others have gone home
    assert queue.wait(2.001) == pytest.approx(0.01)
    assert queue.wait(2.012) == 0.0
    assert queue.take() == [5]
    queue.engine_free(1, 3.0)
    queue.add(6, 1, 3.001)
    assert queue.wait(3.001) == 0.0


def test_a_batch_has_no_more_rows_than_it_may_but_a_large_request_goes_alone() -> None:
    queue: Collector[str] = Collector(4, 0.0, 10)
    for name, rows in (("a", 3), ("b", 2), ("c", 2), ("d", 9), ("e", 1)):
        queue.add(name, rows, 0.0)
    assert queue.rows == 17
    assert [queue.take() for _ in range(4)] == [["a"], ["b", "c"], ["d"], ["e"]]
    assert queue.rows == 0 and len(queue) == 0


def test_a_full_queue_takes_no_more_until_one_leaves() -> None:
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
def test_every_request_goes_once_in_order_and_within_the_limits(
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
    """Answers each sample with its own value and its task's length; what it met is kept."""

    def __init__(self) -> None:
        self.batches: list[list[float]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.poison: set[float] = set()

    def __call__(self, images: NDArray[Any], tasks: Sequence[str]) -> list[NDArray[np.float32]]:
        values = images[:, 0].tolist()
        self.batches.append(values)
        assert self.gate.wait(10)
        if self.poison.intersection(values):
            raise RuntimeError("poison")
        return [np.array([v, len(t)], np.float32) for v, t in zip(values, tasks, strict=True)]


def batcher(engine: Engine, **changes: Any) -> Batcher:
    options = {"max_rows": 8, "max_wait": 0.005, "capacity": 64, **changes}
    return Batcher(engine, **options)


def sample(*values: float) -> NDArray[np.float32]:
    return np.array([[value] for value in values], np.float32)


Ask = Callable[[Batcher, Engine], Coroutine[Any, Any, None]]


def played(play: Ask, **options: Any) -> Engine:
    async def run() -> Engine:
        engine = Engine()
        subject = batcher(engine, **options)
        await asyncio.wait_for(play(subject, engine), 10)
        assert subject.waiting == 0
        engine.gate.set()
        subject.close()
        return engine

    return asyncio.run(run())


async def asked(subject: Batcher, value: float, task: str = "", seconds: float = 5.0) -> Answer:
    return await subject.answer(sample(value), task, seconds)


def test_each_request_gets_its_own_answer_from_mixed_batches() -> None:
    async def play(subject: Batcher, engine: Engine) -> None:
        async def client(number: int) -> None:
            for turn in range(10):
                rows = 1 + (number + turn) % 3
                values = [100.0 * number + 10 * turn + i for i in range(rows)]
                answer = await subject.answer(sample(*values), "x" * number, 5.0)
                assert answer.logits.tolist() == [[value, number] for value in values]
                assert answer.rows >= rows

        await asyncio.gather(*map(client, range(12)))

    engine = played(play)
    assert max(map(len, engine.batches)) > 4 and max(map(len, engine.batches)) <= 8


def test_a_request_larger_than_a_batch_runs_in_parts() -> None:
    async def play(subject: Batcher, engine: Engine) -> None:
        values = [float(i) for i in range(20)]
        answer = await subject.answer(sample(*values), "ab", 5.0)
        assert answer.logits.tolist() == [[value, 2] for value in values] and answer.rows == 20

    assert list(map(len, played(play).batches)) == [8, 8, 4]


def test_a_poison_sample_fails_alone() -> None:
    async def play(subject: Batcher, engine: Engine) -> None:
        engine.poison = {3.0}
        engine.gate.clear()
        first = asyncio.create_task(asked(subject, 9))
        others = [asyncio.create_task(asked(subject, value)) for value in range(8)]
        await asyncio.sleep(0.02)
        engine.gate.set()
        await first
        found = await asyncio.gather(*others, return_exceptions=True)
        assert [isinstance(answer, RuntimeError) for answer in found] == [i == 3 for i in range(8)]

    assert played(play).batches[1] == [float(i) for i in range(8)]


def test_logits_that_are_not_finite_are_no_answer() -> None:
    async def play(subject: Batcher, engine: Engine) -> None:
        answers = await asyncio.gather(
            asked(subject, 1.0), asked(subject, float("inf")), return_exceptions=True
        )
        assert isinstance(answers[0], Answer) and isinstance(answers[1], ArithmeticError)

    played(play)


def test_time_runs_out_in_the_queue_at_once_and_the_request_never_runs() -> None:
    async def play(subject: Batcher, engine: Engine) -> None:
        engine.gate.clear()
        first = asyncio.create_task(asked(subject, 1.0))
        await asyncio.sleep(0.02)
        start = time.monotonic()
        with pytest.raises(Refusal, match="time for this request") as caught:
            await asked(subject, 2.0, seconds=0.001)
        assert caught.value.status == 504 and time.monotonic() - start < 0.1
        assert subject.waiting == 0
        engine.gate.set()
        await first

    assert played(play).batches == [[1.0]]


def test_a_request_that_is_cancelled_leaves_the_queue() -> None:
    async def play(subject: Batcher, engine: Engine) -> None:
        engine.gate.clear()
        first = asyncio.create_task(asked(subject, 1.0))
        await asyncio.sleep(0.02)
        gone = asyncio.create_task(asked(subject, 2.0))
        await asyncio.sleep(0.01)
        assert subject.waiting == 1
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert subject.waiting == 0
        engine.gate.set()
        await first

    assert played(play).batches == [[1.0]]


def test_a_full_queue_refuses_at_once_and_says_when_to_come_again() -> None:
    async def play(subject: Batcher, engine: Engine) -> None:
        engine.gate.clear()
        accepted = [asyncio.create_task(asked(subject, value)) for value in range(5)]
        await asyncio.sleep(0.02)
        start = time.monotonic()
        with pytest.raises(Refusal, match="Too many requests wait") as caught:
            await asked(subject, 9.0)
        assert time.monotonic() - start < 0.05
        assert caught.value.status == 429 and int(caught.value.headers["Retry-After"]) >= 1
        engine.gate.set()
        await asyncio.gather(*accepted)

    played(play, capacity=4)


def test_an_engine_that_does_not_return_is_told_of_and_used_again_when_it_does() -> None:
    stopped = threading.Event()

    async def play(subject: Batcher, engine: Engine) -> None:
        engine.gate.clear()
        running = asyncio.create_task(asked(subject, 1.0))
        await asyncio.sleep(0.02)
        queued = asyncio.create_task(asked(subject, 2.0))
        with pytest.raises(Refusal, match="did not answer in time") as late:
            await running
        with pytest.raises(Refusal, match="try another replica") as never:
            await queued
        assert (late.value.status, never.value.status) == (504, 503)
        assert subject.stuck and stopped.is_set()
        with pytest.raises(Refusal, match="try another replica"):
            await asked(subject, 3.0)
        engine.gate.set()
        while subject.stuck:
            await asyncio.sleep(0.005)
        assert (await asked(subject, 4.0)).logits.tolist() == [[4.0, 0.0]]

    assert played(play, engine_seconds=0.1, stop=stopped.set).batches == [[1.0], [4.0]]


def test_the_first_request_of_each_task_in_a_batch_is_marked() -> None:
    async def play(subject: Batcher, engine: Engine) -> None:
        engine.gate.clear()
        first = asyncio.create_task(asked(subject, 0.0))
        await asyncio.sleep(0.02)
        tasks = [asyncio.create_task(asked(subject, 1.0, task)) for task in ("a", "b", "a")]
        await asyncio.sleep(0.02)
        engine.gate.set()
        await first
        answers = await asyncio.gather(*tasks)
        assert [answer.first for answer in answers] == [True, True, False]
        assert all(answer.rows == 3 and answer.queued > 0.01 for answer in answers)

    played(play)


def test_what_waits_when_it_closes_is_still_answered_and_the_thread_ends() -> None:
    async def play(subject: Batcher, engine: Engine) -> None:
        engine.gate.clear()
        tasks = [asyncio.create_task(asked(subject, value)) for value in range(3)]
        await asyncio.sleep(0.02)
        subject.close()
        engine.gate.set()
        assert [answer.logits[0, 0] for answer in await asyncio.gather(*tasks)] == [0, 1, 2]

    before = threading.active_count()
    played(play)
    end = time.monotonic() + 2
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_deadlines_call_in_time_and_never_after_they_were_discarded() -> None:
    async def run() -> None:
        deadlines, called = Deadlines(), list[str]()
        for name, seconds in (("a", 0.03), ("b", 0.03), ("c", 30.0), ("d", 0.001)):
            deadlines.add(name, seconds, partial(called.append, name))
        deadlines.discard("b")
        await asyncio.sleep(0.02)
        assert called == ["d"]
        await asyncio.sleep(0.04)
        assert called == ["d", "a"]
        deadlines.shorten(0.01)
        await asyncio.sleep(0.04)
        assert called == ["d", "a", "c"]
        deadlines.add("e", 0.001, partial(called.append, "e"))
        await asyncio.sleep(0.03)
        assert called[-1] == "e"

    asyncio.run(run())


def test_deadlines_do_not_wake_the_loop_before_they_are_due() -> None:
    async def run() -> None:
        deadlines, called = Deadlines(), list[str]()
        for name in "abc":
            deadlines.add(name, 30.0, partial(called.append, name))
        wakes, select = 0, asyncio.get_running_loop()._selector.select  # type: ignore[attr-defined]

        def counted(timeout: float | None) -> object:
            nonlocal wakes
            wakes += 1
            return select(timeout)

        asyncio.get_running_loop()._selector.select = counted  # type: ignore[attr-defined]
        await asyncio.sleep(0.3)
        assert wakes <= 3
        deadlines.add("d", 0.02, partial(called.append, "d"))  # earlier than those there are
        await asyncio.sleep(0.1)
        assert called == ["d"]

    asyncio.run(run())
