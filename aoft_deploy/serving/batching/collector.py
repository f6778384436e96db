"""The choice of the next batch and of its time. Independent of clock, threads and server.

A batch is sent when a worker is free and the expected number of rows is waiting: the rows of the
previous batch, whose clients are likely to send again, and the rows that queued meanwhile. Workers
share the rows: with those that are running in other workers, each expects an equal part. Fewer rows
are sent after a short wait. A single client therefore never waits, and clients that send one
request after another share batches.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

__all__ = ["Collector"]

Item = TypeVar("Item", bound=Hashable)


class Collector(Generic[Item]):
    """The queue of requests for one artefact, first in, first out.

    Attributes:
        rows: Number of samples in the queue.

    Args:
        max_rows: Maximum number of samples in a batch; a single larger request runs alone.
        max_wait: Maximum seconds that a batch waits for more requests.
        capacity: Maximum number of requests in the queue.
    """

    def __init__(self, max_rows: int, max_wait: float, capacity: int) -> None:
        self._max_rows, self._max_wait, self._capacity = max_rows, max_wait, capacity
        self._waiting: dict[Item, tuple[int, float]] = {}
        self.rows = 0
        self._expected, self._free_since = 1, -math.inf

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, item: Item, rows: int, now: float) -> bool:
        """Queue a request; False if the queue is full."""
        if len(self._waiting) >= self._capacity:
            return False
        self._waiting[item] = rows, now
        self.rows += rows
        return True

    def discard(self, item: Item) -> None:
        """Remove a request; does nothing if it is not in the queue."""
        rows, _ = self._waiting.pop(item, (0, 0.0))
        self.rows -= rows

    def engine_free(self, rows: int, now: float, others: Sequence[int] = ()) -> None:
        """Note that a worker has finished a batch.

        Args:
            rows: Number of samples in the batch.
            now: The time.
            others: Number of samples that each other worker is running, 0 for an idle one.
        """
        share = math.ceil((rows + self.rows + sum(others)) / (1 + len(others)))
        self._expected = min(max(share, 1), self._max_rows)
        if 0 not in others:  # no worker was free before
            self._free_since = now

    def wait(self, now: float) -> float | None:
        """Seconds until the next batch is sent to a free worker; None if the queue is empty."""
        if not self._waiting:
            return None
        if self.rows >= self._expected:
            return 0.0
        _, oldest = next(iter(self._waiting.values()))
        return max(max(oldest, self._free_since) + self._max_wait - now, 0.0)

    def take(self) -> list[Item]:
        """Remove the next batch: the oldest requests that fit together, at least one."""
        batch: list[Item] = []
        total = 0
        for item, (rows, _) in self._waiting.items():
            if batch and total + rows > self._max_rows:
                break
            batch.append(item)
            total += rows
        for item in batch:
            del self._waiting[item]
        self.rows -= total
        return batch

    def clear(self) -> list[Item]:
        """Remove all requests."""
        items, self._waiting, self.rows = list(self._waiting), {}, 0
        return items
