"""Which waiting requests form the next batch, and when it goes. No clock, no thread, no server.

A batch goes as soon as the engine is free and as many rows wait as can be expected: those of the
batch before, whose clients ask again, and those that waited meanwhile. Fewer go after a short wait.
So a lone client never waits, and clients that ask in turn come together.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Generic, TypeVar

__all__ = ["Collector"]

Item = TypeVar("Item", bound=Hashable)


class Collector(Generic[Item]):
    """Requests that wait for one engine, in their order.

    Attributes:
        rows: Samples that wait.

    Args:
        max_rows: Samples in a batch; a single larger request goes alone.
        max_wait: Seconds that a batch waits for more at most.
        capacity: Requests that may wait.
    """

    def __init__(self, max_rows: int, max_wait: float, capacity: int) -> None:
        self._max_rows, self._max_wait, self._capacity = max_rows, max_wait, capacity
        self._waiting: dict[Item, tuple[int, float]] = {}
        self.rows = 0
        self._expected, self._free_since = 1, -math.inf

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, item: Item, rows: int, now: float) -> bool:
        """Let a request wait; False where there is no room."""
        if len(self._waiting) >= self._capacity:
            return False
        self._waiting[item] = rows, now
        self.rows += rows
        return True

    def discard(self, item: Item) -> None:
        """Let a request go that may have gone already."""
        rows, _ = self._waiting.pop(item, (0, 0.0))
        self.rows -= rows

    def engine_free(self, rows: int, now: float) -> None:
        """The engine has answered a batch of ``rows`` and is free."""
        self._expected = min(max(rows + self.rows, 1), self._max_rows)
        self._free_since = now

    def wait(self, now: float) -> float | None:
        """Seconds until the next batch goes to a free engine; None where nothing waits."""
        if not self._waiting:
            return None
        if self.rows >= self._expected:
            return 0.0
        _, oldest = next(iter(self._waiting.values()))
        return max(max(oldest, self._free_since) + self._max_wait - now, 0.0)

    def take(self) -> list[Item]:
        """The next batch: the longest waiting requests that fit together, one at least."""
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
        """Take everything that waits."""
        items, self._waiting, self.rows = list(self._waiting), {}, 0
        return items
