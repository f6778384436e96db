"""The tables of a fleet's graph, which hold the parameters of the tasks in memory.

The address space that a budget allows is reserved once and never moves, so a request may read the
tables while other threads write to them. The system assigns memory to a page when it is first
written, and takes it back after a task has left the page. The memory in use is therefore what the
current tasks need, regardless of the tasks before them.
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
HEADROOM = 2
"""Address space of the classifiers' table, as a multiple of the budget.

Free rows between classifiers of different widths then do not exhaust it.
"""


class TaskTables:
    """Tables for as many tasks as a budget of bytes allows. Not thread-safe by itself.

    Attributes:
        bank: Parameters of the updates, float32 (slots, row_length).
        heads: Classifiers, weights and bias of each class, float32 (rows, width + 1).
        first: First row of each slot's classifier, int64 (slots,).
        count: Number of its classes, int64 (slots,).
        budget: Bytes that the tasks may take.
        used: Bytes that they take.

    Args:
        row_length: Number of parameters in a row of the bank.
        width: Features that a classifier takes.
        budget: As the attribute.

    Raises:
        SettingError: The budget is too small for one task, or the system does not reserve it.
    """

    def __init__(self, row_length: int, width: int, budget: int) -> None:
        self._row_bytes, self._class_bytes = 4 * row_length, 4 * (width + 1)
        self.budget, self.used = budget, 0
        slots = budget // (self._row_bytes + self._class_bytes)
        if slots < 1:
            raise SettingError(
                f"`budget` is {budget} bytes, but one task takes "
                f"{self._row_bytes + self._class_bytes} bytes or more."
            )
        self._bank = _Memory(slots * self._row_bytes)
        self._heads = _Memory(HEADROOM * budget // self._class_bytes * self._class_bytes)
        self.bank = self._bank.values.reshape(slots, row_length)
        self.heads = self._heads.values.reshape(-1, width + 1)
        self.first, self.count = np.zeros(slots, np.int64), np.zeros(slots, np.int64)
        self._next_slot, self._free_slots = 0, list[int]()
        self._free_rows = [(0, len(self.heads))]  # (first, length), ascending, never adjacent

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """The tables under the parameter names of ``MixedModel.forward``."""
        return {n: getattr(self, n) for n in ("bank", "heads", "first", "count")}

    def size(self, classes: int) -> int:
        """Bytes of a task with this number of classes."""
        return self._row_bytes + classes * self._class_bytes

    def allocate(self, classes: int) -> int | None:
        """A free slot for a task with this number of classes; None if there is no room."""
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
        """Write a task's parameters into a slot that was allocated for it."""
        first = int(self.first[slot])
        self.bank[slot] = task.row
        self.heads[first : first + len(task.head)] = task.head

    def free(self, slot: int) -> None:
        """Free a slot and its classifier's rows, and return their memory to the system."""
        first, count = int(self.first[slot]), int(self.count[slot])
        self.used -= self.size(count)
        heapq.heappush(self._free_slots, slot)
        self._bank.release(slot * self._row_bytes, (slot + 1) * self._row_bytes)
        low, high = self._free_range(first, count)
        # Only pages that the freed rows touch: the others of the range were returned before.
        pages = mmap.PAGESIZE
        self._heads.release(
            max(low * self._class_bytes, first * self._class_bytes // pages * pages),
            min(high * self._class_bytes, -((first + count) * self._class_bytes // -pages) * pages),
        )

    def _free_range(self, first: int, count: int) -> tuple[int, int]:
        """Free rows, and merge them with adjacent free rows.

        Returns:
            First row of the merged range, and the row after its last.
        """
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
    """Reserved float32 zeros that take no memory before they are written or once released."""

    def __init__(self, size: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
        try:
            self._map = mmap.mmap(-1, max(size, 4), flags=flags)
        except (OSError, OverflowError) as error:
            raise SettingError(
                f"The system does not reserve {size} bytes for tasks ({error}): give a smaller "
                "`budget`."
            ) from error
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            self._map.madvise(mmap.MADV_NOHUGEPAGE)
        self.values = np.frombuffer(self._map, np.float32, size // 4)

    def release(self, start: int, end: int) -> None:
        """Return all pages that lie entirely between two bytes to the system."""
        start, end = (
            -(start // -mmap.PAGESIZE) * mmap.PAGESIZE,
            end // mmap.PAGESIZE * mmap.PAGESIZE,
        )
        if start < end and sys.platform == "linux":
            self._map.madvise(mmap.MADV_DONTNEED, start, end - start)
