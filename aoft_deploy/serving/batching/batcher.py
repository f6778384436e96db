"""An engine that answers requests in batches, in its own thread.

The queue belongs to the event loop; only whole batches go to the engine's thread. A request leaves
the queue as soon as its time is up or its client disconnects. If a batch fails, its requests run
one by one, so that only the faulty ones fail. A watchdog times out a hung engine and fails its
requests; new requests are refused until the engine returns.
"""

from __future__ import annotations

import asyncio
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.classes import Classes
from aoft_deploy.serving.batching.collector import Collector
from aoft_deploy.serving.deadlines import Deadlines
from aoft_deploy.serving.protocol.refusals import ENGINE_STUCK, OUT_OF_TIME, QUEUE_FULL, Refusal

__all__ = ["ENGINE", "Answer", "Batcher", "NotFiniteError", "Run"]

ENGINE = "engine"
"""Name of every engine's thread. A closed engine that is idle has no thread."""

Run = Callable[[NDArray[Any], Sequence[str]], Iterable[tuple[NDArray[np.float32], Classes]]]
"""From a batch and the task name of each sample to the logits and classes of each sample.

All samples of a task are classified by one version of it."""


class NotFiniteError(ArithmeticError):
    """NaN or infinity among a request's logits, which give no answer."""


class Answer(NamedTuple):
    """The logits of a request, and where its time was spent.

    Attributes:
        logits: (batch, classes).
        classes: Names of the classes in the order of the logits, from the version of the model that
            computed them.
        queued: Seconds in the queue.
        computed: Seconds in the engine, for the whole batch.
        rows: Number of samples in the whole batch.
        first: Whether the request is the first of its task in the batch.
    """

    logits: NDArray[np.float32]
    classes: Classes
    queued: float
    computed: float
    rows: int
    first: bool


class _Job:
    """A request that is queued or running."""

    __slots__ = ("arrived", "future", "images", "sent", "task")

    def __init__(self, images: NDArray[Any], task: str, future: asyncio.Future[Answer]) -> None:
        self.images, self.task, self.future = images, task, future
        self.arrived = self.sent = 0.0


class Batcher:
    """Answers requests in batches. All methods are called in one event loop.

    Attributes:
        stuck: Whether the engine exceeded its time and has not returned since.

    Args:
        run: The engine, called in its own thread.
        max_rows: Maximum number of samples in a batch; a single larger request runs alone.
        max_wait: Maximum seconds that a batch waits for more requests.
        capacity: Maximum number of requests in the queue.
        engine_seconds: Seconds after which the watchdog considers a running engine stuck.
        stop: Asks the engine to abort its batch; None if it cannot.
        observe: Called in the event loop with rows and seconds of every batch.
    """

    def __init__(
        self,
        run: Run,
        *,
        max_rows: int,
        max_wait: float,
        capacity: int,
        engine_seconds: float = math.inf,
        stop: Callable[[], object] | None = None,
        observe: Callable[[int, float], object] | None = None,
    ) -> None:
        self._run, self._stop, self._observe = run, stop, observe
        self._max_rows, self._engine_seconds = max_rows, engine_seconds
        self._collector: Collector[_Job] = Collector(max_rows, max_wait, capacity)
        self._inbox: queue.SimpleQueue[list[_Job] | None] = queue.SimpleQueue()
        self._running: list[_Job] = []
        self._busy = self._closing = self.stuck = False
        self._deadlines = Deadlines()
        self._timer: asyncio.TimerHandle | None = None
        self._watchdog: asyncio.TimerHandle | None = None
        self._batch_seconds = 0.0  # of the last batch
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def waiting(self) -> int:
        """Number of requests in the queue."""
        return len(self._collector)

    async def answer(self, images: NDArray[Any], task: str, seconds: float) -> Answer:
        """Classify a request's images.

        Args:
            images: One or more samples.
            task: Name of the task of all samples.
            seconds: Time left for the request.

        Raises:
            Refusal: 429 if the queue is full, 504 if the time is up, 503 if the engine is stuck.
            Exception: Whatever the engine raises for this request alone.
        """
        loop = self._start()
        if self.stuck:
            raise Refusal(503, ENGINE_STUCK)
        job = _Job(images, task, loop.create_future())
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
        """End the engine's thread once the queue is empty."""
        self._closing = True
        self._end_if_idle()

    def _start(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            threading.Thread(target=self._work, name=ENGINE, daemon=True).start()
        return self._loop

    def _retry_after(self) -> int:
        """Seconds until the requests in the queue will have been answered, from 1 to 60."""
        batches = math.ceil(self._collector.rows / self._max_rows)
        return min(max(math.ceil(batches * self._batch_seconds), 1), 60)

    def _expire(self, job: _Job) -> None:
        self._collector.discard(job)
        self._fail(job, Refusal(504, OUT_OF_TIME))

    def _send_next(self) -> None:
        """Send the next batch to the engine, now or when it is due."""
        if self._busy:
            return
        assert self._loop is not None
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
            self._end_if_idle()
            return
        batch = self._collector.take()
        for job in batch:
            job.sent = now
        self._running, self._busy = batch, True
        if self._engine_seconds < math.inf:
            self._watchdog = self._loop.call_later(self._engine_seconds, self._time_out)
        self._inbox.put(batch)

    def _wake(self) -> None:
        self._timer = None
        self._send_next()

    def _time_out(self) -> None:
        """Mark the engine as stuck, and fail the running and the queued requests."""
        self.stuck = True
        for job in self._running:
            self._fail(job, Refusal(504, "The model did not answer in time."))
        for job in self._collector.clear():
            self._fail(job, Refusal(503, ENGINE_STUCK))
        if self._stop is not None:
            self._stop()

    def _fail(self, job: _Job, error: Exception) -> None:
        if not job.future.done():
            job.future.set_exception(error)

    def _finish(self, outcomes: list[Answer | Exception], seconds: float) -> None:
        """Deliver a batch's outcomes, then send the next batch."""
        assert self._loop is not None
        if self._watchdog is not None:
            self._watchdog.cancel()
        for job, outcome in zip(self._running, outcomes, strict=True):
            if isinstance(outcome, Exception):
                self._fail(job, outcome)
            elif not job.future.done():
                job.future.set_result(outcome)
        rows = sum(len(job.images) for job in self._running)
        if self._observe is not None:
            self._observe(rows, seconds)
        self._running, self._busy, self.stuck = [], False, False
        self._batch_seconds = seconds
        self._collector.engine_free(rows, self._loop.time())
        self._send_next()

    def _end_if_idle(self) -> None:
        if self._closing and not self._busy and not self._collector:
            self._inbox.put(None)

    def _work(self) -> None:
        """Run batches, in the engine's thread."""
        assert self._loop is not None
        while (batch := self._inbox.get()) is not None:
            start = time.perf_counter()
            outcomes = self._outcomes(batch)
            seconds = time.perf_counter() - start
            try:
                self._loop.call_soon_threadsafe(self._finish, outcomes, seconds)
            except RuntimeError:  # the loop has ended
                return
            del batch, outcomes  # or their memory stays until the next batch

    def _outcomes(self, batch: list[_Job]) -> list[Answer | Exception]:
        """The answer or the exception of each request; a failed batch runs one by one."""
        try:
            return list(self._answers(batch))
        except Exception as error:
            if len(batch) == 1:
                return [error]
        return [self._outcomes([job])[0] for job in batch]

    def _answers(self, batch: list[_Job]) -> list[Answer]:
        images = [job.images for job in batch]
        joined = (
            np.concatenate(images) if len(images) > 1 else np.require(images[0], None, ["C", "A"])
        )
        tasks = [job.task for job in batch for _ in range(len(job.images))]
        start = time.perf_counter()
        rows = list(self._run(joined, tasks))
        seconds = time.perf_counter() - start
        if not all(np.isfinite(logits).all() for logits, _ in rows):
            raise NotFiniteError("The model's logits are not finite.")
        answers, seen, row = [], set[str](), 0
        for job in batch:
            own = rows[row : row + len(job.images)]
            row += len(job.images)
            logits, classes = np.stack([logits for logits, _ in own]), own[0][1]
            queued, first = job.sent - job.arrived, job.task not in seen
            answers.append(Answer(logits, classes, queued, seconds, len(joined), first))
            seen.add(job.task)
        return answers
