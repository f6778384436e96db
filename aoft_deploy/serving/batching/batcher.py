"""One engine, one thread for it, one queue before it.

The queue is of the event loop; only whole batches go to the engine's thread. A request whose time
is up, or whose client has gone, leaves the queue at once. Where a batch fails, its requests run one
by one, so that only those at fault fail. An engine that does not return is found by a timer: those
who wait are told, and new requests are refused until it does return.
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

from aoft_deploy.serving.batching.collector import Collector
from aoft_deploy.serving.deadlines import Deadlines
from aoft_deploy.serving.protocol.refusals import Refusal

__all__ = ["ENGINE", "Answer", "Batcher", "NotFiniteError", "Run"]

ENGINE = "engine"
"""Name of every engine's thread; there is none where no engine computes and all are closed."""

Run = Callable[[NDArray[Any], Sequence[str]], Iterable[tuple[NDArray[np.float32], Sequence[str]]]]
"""From a batch and the name of each sample's task to each sample's logits and their classes.

All samples of a task are answered by one version of it."""


class NotFiniteError(ArithmeticError):
    """NaN or infinity among a request's logits: no probabilities come of them."""


class Answer(NamedTuple):
    """Logits, and how they came about.

    Attributes:
        logits: (batch, classes) of the request.
        classes: Names of the classes, in the order of the logits, of what computed them.
        queued: Seconds in the queue.
        computed: Seconds in the engine, of the whole batch.
        rows: Samples of the whole batch.
        first: Whether the request is the first of its task in the batch.
    """

    logits: NDArray[np.float32]
    classes: Sequence[str]
    queued: float
    computed: float
    rows: int
    first: bool


class _Job:
    """A request on its way."""

    __slots__ = ("arrived", "future", "images", "sent", "task")

    def __init__(self, images: NDArray[Any], task: str, future: asyncio.Future[Answer]) -> None:
        self.images, self.task, self.future = images, task, future
        self.arrived = self.sent = 0.0


class Batcher:
    """Answers requests in batches. All methods but the engine are of one event loop.

    Attributes:
        stuck: Whether the engine has not returned in time and still has not.

    Args:
        run: The engine.
        max_rows: Samples in a batch; a single larger request goes to the engine alone.
        max_wait: Seconds that a batch waits for more at most.
        capacity: Requests that may wait.
        engine_seconds: Time after which an engine that has not returned is given up.
        stop: Asks the engine to give up what it runs; None: it cannot.
        observe: Told rows and seconds of every batch, in the event loop.
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
        self._pace = 0.0  # seconds that the last batch took
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._collector)

    async def answer(self, images: NDArray[Any], task: str, seconds: float) -> Answer:
        """Logits of a request's images.

        Args:
            images: One sample at least.
            task: Name of the task that all of them ask.
            seconds: Time that is left for it.

        Raises:
            Refusal: 429 where the queue is full, 504 where the time is up, 503 where the engine is
                stuck.
            Exception: Whatever the engine raised for this request alone.
        """
        loop = self._started()
        if self.stuck:
            raise Refusal(503, "The model does not answer: try another replica.")
        job = _Job(images, task, loop.create_future())
        job.arrived = loop.time()
        if not self._collector.add(job, len(images), job.arrived):
            after = {"Retry-After": str(self._retry_after())}
            raise Refusal(429, "Too many requests wait: try again later.", headers=after)
        self._deadlines.add(job, seconds, partial(self._expire, job))
        self._pump()
        try:
            return await job.future
        finally:
            self._deadlines.discard(job)
            self._collector.discard(job)
            del job  # an error in its future holds this frame, and so its images

    def close(self) -> None:
        """End the thread as soon as nothing waits any more."""
        self._closing = True
        self._end_if_idle()

    def _started(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            threading.Thread(target=self._work, name=ENGINE, daemon=True).start()
        return self._loop

    def _retry_after(self) -> int:
        batches = math.ceil(self._collector.rows / self._max_rows)
        return min(max(math.ceil(batches * self._pace), 1), 60)

    def _expire(self, job: _Job) -> None:
        self._collector.discard(job)
        if not job.future.done():
            job.future.set_exception(Refusal(504, "The time for this request is up."))

    def _pump(self) -> None:
        """Send the next batch if it is time, or come back when it will be."""
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
            self._watchdog = self._loop.call_later(self._engine_seconds, self._give_up)
        self._inbox.put(batch)

    def _wake(self) -> None:
        self._timer = None
        self._pump()

    def _give_up(self) -> None:
        """The engine did not return in time."""
        self.stuck = True
        for job in self._running:
            self._fail(job, Refusal(504, "The model did not answer in time."))
        for job in self._collector.clear():
            self._fail(job, Refusal(503, "The model does not answer: try another replica."))
        if self._stop is not None:
            self._stop()

    def _fail(self, job: _Job, error: Exception) -> None:
        if not job.future.done():
            job.future.set_exception(error)

    def _done(self, outcomes: list[Answer | Exception], seconds: float) -> None:
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
        self._pace = seconds
        self._collector.engine_free(rows, self._loop.time())
        self._pump()

    def _end_if_idle(self) -> None:
        if self._closing and not self._busy and not self._collector:
            self._inbox.put(None)

    def _work(self) -> None:
        """The engine's thread."""
        assert self._loop is not None
        while (batch := self._inbox.get()) is not None:
            start = time.perf_counter()
            outcomes = self._outcomes(batch)
            seconds = time.perf_counter() - start
            try:
                self._loop.call_soon_threadsafe(self._done, outcomes, seconds)
            except RuntimeError:  # the loop has ended
                return
            del batch, outcomes  # a request's memory does not wait for the next one

    def _outcomes(self, batch: list[_Job]) -> list[Answer | Exception]:
        try:
            return list(self._answers(batch))
        except Exception as error:
            if len(batch) == 1:
                return [error]
        return [self._outcomes([job])[0] for job in batch]

    def _answers(self, batch: list[_Job]) -> list[Answer]:
        images = [job.images for job in batch]
        together = (
            np.concatenate(images) if len(images) > 1 else np.require(images[0], None, ["C", "A"])
        )
        tasks = [job.task for job in batch for _ in range(len(job.images))]
        start = time.perf_counter()
        rows = list(self._run(together, tasks))
        seconds = time.perf_counter() - start
        if not all(np.isfinite(logits).all() for logits, _ in rows):
            raise NotFiniteError("The model's logits are not finite.")
        answers, seen, row = [], set[str](), 0
        for job in batch:
            own = rows[row : row + len(job.images)]
            row += len(job.images)
            logits, classes = np.stack([each for each, _ in own]), own[0][1]
            queued, first = job.sent - job.arrived, job.task not in seen
            answers.append(Answer(logits, classes, queued, seconds, len(together), first))
            seen.add(job.task)
        return answers
