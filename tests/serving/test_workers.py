"""Several batches run at once from one queue, and a hung one affects no other."""

from __future__ import annotations

import asyncio
import math
import threading
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from aoft_deploy.serving.batching.batcher import Batcher
from aoft_deploy.serving.batching.collector import Collector
from aoft_deploy.serving.batching.worker import Answer, Replica
from aoft_deploy.serving.protocol.refusals import Refusal


class Engine:
    """Answers with each sample's value; batches that start with a held value wait for release."""

    def __init__(self) -> None:
        self.batches: list[list[float]] = []
        self.stops = 0
        self._gates: dict[float, threading.Event] = defaultdict(threading.Event)
        self._held: set[float] = set()
        self.faulty: set[float] = set()

    def hold(self, *values: float) -> None:
        """Let batches that start with these values wait."""
        self._held.update(values)

    def release(self, value: float) -> None:
        """Let the batch that starts with this value return."""
        self._gates[value].set()

    def stop(self) -> None:
        self.stops += 1

    def __call__(self, images: NDArray[Any], tasks: Sequence[str]) -> list[Any]:
        values = images[:, 0].tolist()
        self.batches.append(values)
        if values[0] in self._held:
            assert self._gates[values[0]].wait(60)
        if self.faulty.intersection(values):
            raise RuntimeError("faulty")
        return [(np.array([value], np.float32), ("value",)) for value in values]


async def until(true: Callable[[], bool]) -> None:
    """Wait for a condition; the test's timeout ends a wait in vain."""
    while not true():
        await asyncio.sleep(0.001)


def ask(subject: Batcher, *values: float) -> asyncio.Task[Answer]:
    images = np.array([[value] for value in values], np.float32)
    return asyncio.create_task(subject.answer(images, "", 60.0))


async def status(request: Awaitable[Answer]) -> int:
    """Status of a request that is refused."""
    with pytest.raises(Refusal) as caught:
        await request
    return caught.value.status


def run(
    scenario: Callable[..., Awaitable[None]], *lanes: int, **options: Any
) -> tuple[Engine, ...]:
    """Run a scenario with a batcher and with an engine for each number of lanes."""

    async def start() -> tuple[Engine, ...]:
        engines = tuple(Engine() for _ in lanes)
        replicas = [
            Replica(engine, count, engine.stop)
            for engine, count in zip(engines, lanes, strict=True)
        ]
        settings = {"max_rows": 4, "max_wait": 0.0, "capacity": 64, **options}
        subject = Batcher(replicas, **settings)
        await asyncio.wait_for(scenario(subject, *engines), 60)
        assert subject.waiting == subject.hung == 0
        subject.close()
        return engines

    return asyncio.run(start())


def test_workers_expect_equal_parts_of_the_rows() -> None:
    queue: Collector[int] = Collector(16, 0.01, 100)
    queue.engine_free(15, 1.0, [1])  # 16 clients, of which one waits in the other worker
    for i in range(7):
        queue.add(i, 1, 1.0)
        assert queue.wait(1.0) == pytest.approx(0.01)
    queue.add(7, 1, 1.0)
    assert queue.wait(1.0) == 0.0 and len(queue.take()) == 8
    queue.engine_free(1, 2.0, [8])
    queue.add(8, 1, 2.0)
    assert queue.wait(2.0) == pytest.approx(0.01)


def test_a_single_client_of_many_workers_never_waits() -> None:
    queue: Collector[int] = Collector(16, 0.01, 100)
    for now in (1.0, 2.0, 3.0):
        queue.add(0, 1, now)
        assert queue.wait(now) == 0.0
        queue.take()
        queue.engine_free(1, now + 0.5, [0, 0, 0])


def test_batches_of_other_workers_do_not_prolong_the_wait_for_an_idle_one() -> None:
    queue: Collector[int] = Collector(16, 0.01, 100)
    queue.engine_free(8, 1.0, [8])
    queue.add(0, 1, 1.001)
    assert queue.wait(1.005) == pytest.approx(0.006)
    queue.engine_free(8, 1.009, [0])
    assert queue.wait(1.009) == pytest.approx(0.002)


def test_lanes_run_batches_at_once() -> None:
    async def scenario(subject: Batcher, engine: Engine) -> None:
        assert subject.workers == 2
        engine.hold(1.0, 2.0)
        first, second = ask(subject, 1.0), ask(subject, 2.0)
        await until(lambda: sorted(engine.batches) == [[1.0], [2.0]])
        third = ask(subject, 3.0)
        await until(lambda: subject.waiting == 1)
        engine.release(2.0)  # the later batch returns first
        assert (await second).logits.tolist() == [[2.0]]
        assert (await third).logits.tolist() == [[3.0]] and not first.done()
        engine.release(1.0)
        assert (await first).logits.tolist() == [[1.0]]

    run(scenario, 2)


def test_a_batch_goes_to_the_replica_with_the_fewest_running() -> None:
    async def scenario(subject: Batcher, one: Engine, two: Engine) -> None:
        for engine in (one, two):
            engine.hold(1.0, 2.0, 3.0, 4.0, 5.0)
        asked = {}
        for value in (1.0, 2.0, 3.0, 4.0):
            asked[value] = ask(subject, value)
            await until(lambda: len(one.batches) + len(two.batches) == len(asked))
        assert (one.batches, two.batches) == ([[1.0], [3.0]], [[2.0], [4.0]])
        for value, engine in ((1.0, one), (2.0, two), (4.0, two)):
            engine.release(value)
            await asked[value]
        asked[5.0] = ask(subject, 5.0)
        await until(lambda: len(two.batches) == 3)
        for value, engine in ((3.0, one), (5.0, two)):
            engine.release(value)
            await asked[value]

    run(scenario, 2, 2)


def test_every_request_is_answered_once_by_one_of_many_workers() -> None:
    async def scenario(subject: Batcher, *engines: Engine) -> None:
        async def client(number: int) -> None:
            for turn in range(20):
                values = [1000.0 * number + 10 * turn + i for i in range(1 + (number + turn) % 3)]
                answer = await ask(subject, *values)
                assert answer.logits.tolist() == [[value] for value in values]

        await asyncio.gather(*map(client, range(16)))

    engines = run(scenario, 2, 1, max_wait=0.005)
    ran = sorted(value for engine in engines for batch in engine.batches for value in batch)
    assert (
        len(ran)
        == len(set(ran))
        == sum(1 + (number + turn) % 3 for number in range(16) for turn in range(20))
    )
    assert all(max(map(len, engine.batches)) <= 4 and engine.batches for engine in engines)


def test_a_hung_batch_fails_alone_and_the_other_workers_go_on() -> None:
    async def scenario(subject: Batcher, one: Engine, two: Engine) -> None:
        one.hold(1.0)
        late = ask(subject, 1.0)
        await until(lambda: one.batches == [[1.0]])
        subject._time_out(subject._workers[0])
        assert await status(late) == 504
        assert (subject.hung, subject.stuck, one.stops) == (1, False, 1)
        for value in (2.0, 3.0):
            assert (await ask(subject, value)).logits.tolist() == [[value]]
        assert two.batches == [[2.0], [3.0]] and two.stops == 0
        two.hold(4.0)
        running = ask(subject, 4.0)
        await until(lambda: two.batches[-1] == [4.0])
        queued = ask(subject, 5.0)
        await until(lambda: subject.waiting == 1)
        subject._time_out(subject._workers[1])
        assert [await status(running), await status(queued)] == [504, 503]
        assert subject.stuck and await status(ask(subject, 6.0)) == 503
        one.release(1.0)
        await until(lambda: not subject.stuck)
        assert (await ask(subject, 7.0)).logits.tolist() == [[7.0]]
        two.release(4.0)
        await until(lambda: subject.hung == 0)

    run(scenario, 1, 1, engine_seconds=1e6)


def test_the_watchdog_times_out_each_batch_by_itself() -> None:
    async def scenario(subject: Batcher, one: Engine, two: Engine) -> None:
        one.hold(1.0)
        late = ask(subject, 1.0)
        assert await status(late) == 504 and subject.hung == 1
        subject._engine_seconds = math.inf
        assert (await ask(subject, 2.0)).logits.tolist() == [[2.0]]
        one.release(1.0)
        await until(lambda: subject.hung == 0)

    run(scenario, 1, 1, engine_seconds=0.05)


def test_an_engine_is_stopped_when_all_its_running_batches_hang() -> None:
    """A stop would abort the batches of the other lanes too."""

    async def scenario(subject: Batcher, engine: Engine) -> None:
        engine.hold(1.0, 2.0)
        late, healthy = ask(subject, 1.0), ask(subject, 2.0)
        await until(lambda: len(engine.batches) == 2)
        hung = next(w for w in subject._workers if w.batch and w.batch[0].images[0, 0] == 1.0)
        subject._time_out(hung)
        assert await status(late) == 504 and engine.stops == 0
        engine.release(2.0)
        assert (await healthy).logits.tolist() == [[2.0]]
        assert engine.stops == 1  # between two batches of the healthy lane
        engine.release(1.0)
        await until(lambda: subject.hung == 0)

    run(scenario, 2, engine_seconds=1e6)


def test_requests_that_ended_do_not_run_again_after_their_batch_failed() -> None:
    async def scenario(subject: Batcher, engine: Engine) -> None:
        engine.hold(1.0, 2.0)
        first = ask(subject, 1.0)
        await until(lambda: engine.batches == [[1.0]])
        batch = [ask(subject, value) for value in (2.0, 3.0, 4.0)]
        await until(lambda: subject.waiting == 3)
        engine.release(1.0)
        await first
        await until(lambda: engine.batches[-1] == [2.0, 3.0, 4.0])
        engine.faulty = {3.0}
        subject._time_out(subject._workers[0])
        assert [await status(request) for request in batch] == [504, 504, 504]
        engine.release(2.0)
        await until(lambda: subject.hung == 0)

    (engine,) = run(scenario, 1, engine_seconds=1e6)
    assert engine.batches == [[1.0], [2.0, 3.0, 4.0]]


def test_all_threads_end_after_the_queue_is_empty() -> None:
    threads: list[threading.Thread] = []

    async def scenario(subject: Batcher, engine: Engine) -> None:
        before = set(threading.enumerate())
        engine.hold(1.0, 2.0)
        asked = [ask(subject, float(value)) for value in range(1, 7)]
        await until(lambda: subject.waiting == 4)
        threads.extend(set(threading.enumerate()) - before)
        subject.close()
        engine.release(1.0)
        engine.release(2.0)
        assert [a.logits[0, 0] for a in await asyncio.gather(*asked)] == [1, 2, 3, 4, 5, 6]

    run(scenario, 2)
    assert len(threads) == 2
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
