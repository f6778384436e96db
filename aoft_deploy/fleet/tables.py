"""The tables of a fleet's graph: where the numbers of the tasks in memory lie.

Address space for all that a budget allows is reserved once and never moves, so a request may read
the tables while others write. The system gives memory to a page when it is first written, and takes
it back when a task has left the page: what is used is what the tasks in memory need, whatever came
and went before.
"""

from __future__ import annotations

import heapq
import mmap
import sys
from bisect import bisect_left
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.errors import SettingError
from aoft_deploy.fleet.task import TaskParameters

__all__ = ["TaskTables"]

NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
ROOM = 2
"""Address space of the classifiers' table over the budget, so that widths of all kinds fit."""


class TaskTables:
    """Tables with room for a budget of bytes. Not thread-safe by itself.

    Attributes:
        bank: Updates, float32 (slots, numbers).
        heads: Classifier rows, weight and bias, float32 (rows, width + 1).
        first: First row of each slot's classifier, int64 (slots,).
        count: Number of its classes, int64 (slots,).
        budget: Bytes that the tasks may take.
        used: Bytes that they take.

    Args:
        numbers: Length of a row of the bank.
        width: Features that a classifier takes.
        budget: As the attribute.

    Raises:
        SettingError: The budget holds no task, or the system does not reserve it.
    """

    def __init__(self, numbers: int, width: int, budget: int) -> None:
        self._row, self._class = 4 * numbers, 4 * (width + 1)
        self.budget, self.used = budget, 0
        slots = budget // (self._row + self._class)
        if slots < 1:
            raise SettingError(
                f"A budget of {budget} bytes holds no task: one takes "
                f"{self._row + self._class} and more."
            )
        self._bank = _Memory(slots * self._row)
        self._heads = _Memory(ROOM * budget // self._class * self._class)
        self.bank = self._bank.numbers.reshape(slots, numbers)
        self.heads = self._heads.numbers.reshape(-1, width + 1)
        self.first, self.count = np.zeros(slots, np.int64), np.zeros(slots, np.int64)
        self._next_slot, self._free_slots = 0, list[int]()
        self._free_rows = [(0, len(self.heads))]

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """The tables by the names of ``MixedModel.forward``."""
        return {n: getattr(self, n) for n in ("bank", "heads", "first", "count")}

    def size(self, classes: int) -> int:
        """Bytes of a task with so many classes."""
        return self._row + classes * self._class

    def take(self, classes: int) -> int | None:
        """A free slot with room for so many classes; None where there is none."""
        place = next((i for i, (_, n) in enumerate(self._free_rows) if n >= classes), None)
        if place is None or self.used + self.size(classes) > self.budget:
            return None
        first, length = self._free_rows[place]
        self._free_rows[place : place + 1] = (
            [(first + classes, length - classes)] if length > classes else []
        )
        if self._free_slots:
            slot = heapq.heappop(self._free_slots)
        else:
            slot, self._next_slot = self._next_slot, self._next_slot + 1
        self.first[slot], self.count[slot] = first, classes
        self.used += self.size(classes)
        return slot

    def write(self, slot: int, task: TaskParameters) -> None:
        """Put a task's numbers into a slot that was taken for it."""
        first = int(self.first[slot])
        self.bank[slot] = task.row
        self.heads[first : first + len(task.head)] = task.head

    def give_back(self, slot: int) -> None:
        """Free a slot and its classifier's rows, and let the system have their memory."""
        first, count = int(self.first[slot]), int(self.count[slot])
        self.used -= self.size(count)
        heapq.heappush(self._free_slots, slot)
        self._bank.release(slot * self._row, (slot + 1) * self._row)
        low, high = self._join(first, count)
        pages = mmap.PAGESIZE
        self._heads.release(
            max(low * self._class, first * self._class // pages * pages),
            min(high * self._class, -((first + count) * self._class // -pages) * pages),
        )

    def _join(self, first: int, count: int) -> tuple[int, int]:
        """Add free rows to their free neighbours; begin and end of what comes of it."""
        low, high = first, first + count
        place = end = bisect_left(self._free_rows, (first, 0))
        if place and sum(self._free_rows[place - 1]) == low:
            place -= 1
            low = self._free_rows[place][0]
        if end < len(self._free_rows) and self._free_rows[end][0] == high:
            high = sum(self._free_rows[end])
            end += 1
        self._free_rows[place:end] = [(low, high - low)]
        return low, high


class _Memory:
    """Zeros of float32 that take no memory before they are written and after they are released."""

    def __init__(self, size: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
        try:
            self._map = mmap.mmap(-1, max(size, 4), flags=flags)
        except (OSError, OverflowError) as error:
            raise SettingError(
                f"The system does not reserve {size} bytes for tasks ({error}): give a smaller "
                "budget."
            ) from error
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            self._map.madvise(mmap.MADV_NOHUGEPAGE)
        self.numbers = np.frombuffer(self._map, np.float32, size // 4)

    def release(self, start: int, end: int) -> None:
        """Give the whole pages between two bytes back."""
        start, end = (
            -(start // -mmap.PAGESIZE) * mmap.PAGESIZE,
            end // mmap.PAGESIZE * mmap.PAGESIZE,
        )
        if start < end and sys.platform == "linux":
            self._map.madvise(mmap.MADV_DONTNEED, start, end - start)
