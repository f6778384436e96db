"""An engine's threads, each of which computes one batch at a time."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.classes import Classes

__all__ = ["ENGINE", "Answer", "Job", "NotFiniteError", "Replica", "Run", "Worker"]

ENGINE = "engine"
"""Name of every engine's threads. A closed engine that is idle has no thread."""

Run = Callable[[NDArray[Any], Sequence[str]], Iterable[tuple[NDArray[np.float32], Classes]]]
"""From a batch and the task name of each sample to the logits and classes of each sample.

All samples of a task are classified by one version of it."""


class NotFiniteError(ArithmeticError):
    """NaN or infinity among a request's logits, which give no answer."""


class Replica(NamedTuple):
    """The engine on one device.

    Attributes:
        run: The engine, called in its own threads.
        lanes: Number of batches that it computes at once.
        stop: Asks the engine to abort all its batches; None if it cannot.
    """

    run: Run
    lanes: int = 1
    stop: Callable[[], object] | None = None


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


class Job:
    """A request that is queued or running."""

    __slots__ = ("arrived", "future", "images", "sent", "task")

    def __init__(self, images: NDArray[Any], task: str, future: asyncio.Future[Answer]) -> None:
        self.images, self.task, self.future = images, task, future
        self.arrived = self.sent = 0.0


class Worker:
    """A thread that computes the batches of one lane of a replica.

    Its attributes and methods are used in the event loop.

    Attributes:
        replica: The replica.
        batch: The requests that are running; empty if the worker is idle.
        hung: Whether the batch exceeded its time and has not returned since.
        watchdog: Timer of the batch.

    Args:
        replica: As the attribute.
    """

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.batch: list[Job] = []
        self.hung = False
        self.watchdog: asyncio.TimerHandle | None = None
        self._inbox: queue.SimpleQueue[list[Job] | None] = queue.SimpleQueue()

    @property
    def rows(self) -> int:
        """Number of samples that are running."""
        return sum(len(job.images) for job in self.batch)

    def start(
        self,
        loop: asyncio.AbstractEventLoop,
        finish: Callable[[Worker, list[Answer | Exception], float], object],
    ) -> None:
        """Start the thread.

        Args:
            loop: The event loop.
            finish: Called in the event loop with the outcomes of every batch and its seconds.
        """
        arguments = (loop, finish)
        threading.Thread(target=self._work, args=arguments, name=ENGINE, daemon=True).start()

    def send(self, batch: list[Job]) -> None:
        """Run a batch; the worker is idle."""
        self.batch = batch
        self._inbox.put(batch)

    def end(self) -> None:
        """End the thread once it is idle."""
        self._inbox.put(None)

    def _work(
        self,
        loop: asyncio.AbstractEventLoop,
        finish: Callable[[Worker, list[Answer | Exception], float], object],
    ) -> None:
        """Run batches, in the worker's thread."""
        while (batch := self._inbox.get()) is not None:
            start = time.perf_counter()
            outcomes = self._outcomes(batch)
            seconds = time.perf_counter() - start
            try:
                loop.call_soon_threadsafe(finish, self, outcomes, seconds)
            except RuntimeError:  # the loop has ended
                return
            del batch, outcomes  # or their memory stays until the next batch

    def _outcomes(self, batch: list[Job]) -> list[Answer | Exception]:
        """The answer or the exception of each request.

        The requests of a failed batch run one by one, without those that have ended meanwhile.
        """
        try:
            return list(self._answers(batch))
        except Exception as error:
            if len(batch) == 1:
                return [error]
        return [TimeoutError() if job.future.done() else self._outcomes([job])[0] for job in batch]

    def _answers(self, batch: list[Job]) -> list[Answer]:
        images = [job.images for job in batch]
        joined = (
            np.concatenate(images) if len(images) > 1 else np.require(images[0], None, ["C", "A"])
        )
        tasks = [job.task for job in batch for _ in range(len(job.images))]
        start = time.perf_counter()
        rows = list(self.replica.run(joined, tasks))
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
