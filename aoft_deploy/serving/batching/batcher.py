"""Engines that answer requests in batches, each in its own threads.

The queue belongs to the event loop; only whole batches go to the engines' threads. With several
lanes or devices, several batches run at once, from one queue. A request leaves the queue as soon as
its time is up or its client disconnects. If a batch fails, its requests run one by one, so that
only the faulty ones fail. A watchdog times out a hung batch and fails its requests; the others go
on. If every worker hangs, the queue fails as well, and new requests are refused until one returns.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from numpy.typing import NDArray

from aoft_deploy.serving.batching.collector import Collector
from aoft_deploy.serving.batching.worker import Answer, Job, Replica, Worker
from aoft_deploy.serving.deadlines import Deadlines
from aoft_deploy.serving.protocol.refusals import ENGINE_STUCK, OUT_OF_TIME, QUEUE_FULL, Refusal

__all__ = ["Batcher"]


class Batcher:
    """Answers requests in batches. All methods are called in one event loop.

    Attributes:
        hung: Number of batches that exceeded their time and have not returned since.

    Args:
        replicas: The engines. Each gets as many workers as it has lanes.
        max_rows: Maximum number of samples in a batch; a single larger request runs alone.
        max_wait: Maximum seconds that a batch waits for more requests.
        capacity: Maximum number of requests in the queue.
        engine_seconds: Seconds after which the watchdog considers a running batch hung.
        observe: Called in the event loop with rows and seconds of every batch.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        *,
        max_rows: int,
        max_wait: float,
        capacity: int,
        engine_seconds: float = math.inf,
        observe: Callable[[int, float], object] | None = None,
    ) -> None:
        most = max(replica.lanes for replica in replicas)
        lanes = [replica for lane in range(most) for replica in replicas if lane < replica.lanes]
        self._workers = [Worker(replica) for replica in lanes]
        self._max_rows, self._engine_seconds, self._observe = max_rows, engine_seconds, observe
        self._collector: Collector[Job] = Collector(max_rows, max_wait, capacity)
        self._closing, self.hung = False, 0
        self._deadlines = Deadlines()
        self._timer: asyncio.TimerHandle | None = None
        self._batch_seconds = 0.0  # of the last batch
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def waiting(self) -> int:
        """Number of requests in the queue."""
        return len(self._collector)

    @property
    def workers(self) -> int:
        """Number of batches that run at once."""
        return len(self._workers)

    @property
    def stuck(self) -> bool:
        """Whether every worker hangs, so that no request can be answered."""
        return self.hung == len(self._workers)

    async def answer(self, images: NDArray[Any], task: str, seconds: float) -> Answer:
        """Classify a request's images.

        Args:
            images: One or more samples.
            task: Name of the task of all samples.
            seconds: Time left for the request.

        Raises:
            Refusal: 429 if the queue is full, 504 if the time is up, 503 if every worker hangs.
            Exception: Whatever the engine raises for this request alone.
        """
        loop = self._start()
        if self.stuck:
            raise Refusal(503, ENGINE_STUCK)
        job = Job(images, task, loop.create_future())
        job.arrived = loop.time()
        if not self._collector.add(job, len(images), job.arrived):
            raise Refusal(429, QUEUE_FULL, retry_after=self._retry_after())
        self._deadlines.add(job, seconds, partial(self._expire, job))
        self._send_next()
        try:
            return await job.future
        finally:
            self._deadlines.discard(job)
            self._collector.discard(job)
            del job  # an exception in its future refers to this frame, and thereby to the images

    def close(self) -> None:
        """End the workers' threads once the queue is empty."""
        self._closing = True
        self._end_idle()

    def _start(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            for worker in self._workers:
                worker.start(self._loop, self._finish)
        return self._loop

    def _retry_after(self) -> int:
        """Seconds until the requests in the queue will have been answered, from 1 to 60."""
        batches = math.ceil(self._collector.rows / self._max_rows / len(self._workers))
        return min(max(math.ceil(batches * self._batch_seconds), 1), 60)

    def _expire(self, job: Job) -> None:
        self._collector.discard(job)
        self._fail(job, Refusal(504, OUT_OF_TIME))

    def _send_next(self) -> None:
        """Send the next batches to idle workers, now or when they are due."""
        assert self._loop is not None
        while (worker := self._idle_worker()) is not None:
            now = self._loop.time()
            wait = self._collector.wait(now)
            if wait:
                if self._timer is None:
                    self._timer = self._loop.call_later(wait, self._wake)
                return
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if wait is None:
                self._end_idle()
                return
            self._send(worker, self._collector.take(), now)

    def _idle_worker(self) -> Worker | None:
        """An idle worker of the replica with the fewest running batches; None if all are busy."""
        idle = [worker for worker in self._workers if not worker.batch]
        if len(idle) < 2:
            return idle[0] if idle else None
        busy = [worker.replica for worker in self._workers if worker.batch]
        return min(idle, key=lambda worker: sum(replica is worker.replica for replica in busy))

    def _send(self, worker: Worker, batch: list[Job], now: float) -> None:
        assert self._loop is not None
        for job in batch:
            job.sent = now
        if self._engine_seconds < math.inf:
            worker.watchdog = self._loop.call_later(self._engine_seconds, self._time_out, worker)
        worker.send(batch)

    def _wake(self) -> None:
        self._timer = None
        self._send_next()

    def _time_out(self, worker: Worker) -> None:
        """Mark a worker as hung, and fail its requests; the queue too if every worker hangs."""
        worker.hung, self.hung = True, self.hung + 1
        for job in worker.batch:
            self._fail(job, Refusal(504, "The model did not answer in time."))
        if self.stuck:
            for job in self._collector.clear():
                self._fail(job, Refusal(503, ENGINE_STUCK))
        self._stop_if_hung(worker.replica)

    def _stop_if_hung(self, replica: Replica) -> None:
        """Stop a replica if all its running batches hang, since a stop aborts all of them."""
        running = [w for w in self._workers if w.batch and w.replica is replica]
        if replica.stop is not None and running and all(worker.hung for worker in running):
            replica.stop()

    def _fail(self, job: Job, error: Exception) -> None:
        if not job.future.done():
            job.future.set_exception(error)

    def _finish(self, worker: Worker, outcomes: list[Answer | Exception], seconds: float) -> None:
        """Deliver a batch's outcomes, then send the next batches."""
        assert self._loop is not None
        if worker.watchdog is not None:
            worker.watchdog.cancel()
        for job, outcome in zip(worker.batch, outcomes, strict=True):
            if isinstance(outcome, Exception):
                self._fail(job, outcome)
            elif not job.future.done():
                job.future.set_result(outcome)
        rows = worker.rows
        if self._observe is not None:
            self._observe(rows, seconds)
        self.hung -= worker.hung
        worker.batch, worker.hung = [], False
        self._batch_seconds = seconds
        others = [w.rows for w in self._workers if w is not worker and not w.hung]
        self._collector.engine_free(rows, self._loop.time(), others)
        if self.hung:
            self._stop_if_hung(worker.replica)
        self._send_next()

    def _end_idle(self) -> None:
        if self._closing and not self._collector:
            for worker in self._workers:
                if not worker.batch:
                    worker.end()
