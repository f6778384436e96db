"""The tables of a fleet's graph, which hold the parameters of the tasks in memory.

The memory that a budget allows is reserved once by the engine that reads it, and never moves, so a
request may read the tables while other threads write to them. Rows of the bank take its bytes from
the beginning and classifiers from the end, so tasks of any number of classes can fill it. In this
process's memory, the system assigns a page when it is first written, and takes it back after a task
has left the page. The memory in use is therefore what the current tasks need, regardless of the
tasks before them. On a GPU the whole budget is taken at once.
"""

from __future__ import annotations

import mmap
from bisect import bisect_left, insort
from collections.abc import Callable
from typing import Any

import numpy as np

from aoft_deploy.artefacts.table_memory import HostMemory, TableMemory
from aoft_deploy.errors import SettingError
from aoft_deploy.fleet.task import TaskParameters

__all__ = ["TaskTables"]

ALIGNMENT = 256
"""Bytes; the bank begins at a multiple of it."""


class TaskTables:
    """Tables for as many tasks as a budget of bytes allows. Not thread-safe by itself.

    Attributes:
        bank: Parameters of the updates, float32 (slots, row_length), as the engine takes them.
        heads: Classifiers, weights and bias of each class, float32 (rows, width + 1), likewise.
        first: First row of each slot's classifier, int64 (slots,).
        count: Number of its classes, int64 (slots,).
        budget: Bytes that the tasks may take.
        used: Bytes that they take.

    Args:
        row_length: Number of parameters in a row of the bank.
        width: Features that a classifier takes.
        budget: As the attribute.
        reserve: Reserves memory of a number of bytes for the tables.

    Raises:
        SettingError: The budget is too small for one task, or the memory cannot be reserved.
    """

    def __init__(
        self,
        row_length: int,
        width: int,
        budget: int,
        reserve: Callable[[int], TableMemory] = HostMemory,
    ) -> None:
        self._row_bytes, self._class_bytes = 4 * row_length, 4 * (width + 1)
        self.budget, self.used = budget, 0
        slots = budget // (self._row_bytes + self._class_bytes)
        if slots < 1:
            raise SettingError(
                f"`budget` is {budget} bytes, but one task takes "
                f"{self._row_bytes + self._class_bytes} bytes or more."
            )
        index = slots * np.dtype(np.int64).itemsize
        self._start = -(2 * index // -ALIGNMENT) * ALIGNMENT  # of bank and heads
        # Classifiers begin at multiples of a class's bytes, which may leave a gap at either end.
        self._memory = reserve(self._start + budget + 2 * self._class_bytes)
        rows = (self._memory.size - self._start) // self._class_bytes
        self.bank = self._memory.table(self._start, (slots, row_length), np.float32)
        self.heads = self._memory.table(self._start, (rows, width + 1), np.float32)
        self._index = {
            "first": self._memory.table(0, (slots,), np.int64),
            "count": self._memory.table(index, (slots,), np.int64),
        }
        self.first, self.count = np.zeros(slots, np.int64), np.zeros(slots, np.int64)
        self._next_slot = 0  # no slot from here on is taken
        self._free_slots = list[int]()  # below it, ascending
        self._free_rows = [(0, rows)]  # (first, length), ascending, never adjacent

    @property
    def arrays(self) -> dict[str, Any]:
        """The tables as the engine takes them, under ``MixedModel.forward``'s parameter names."""
        return {"bank": self.bank, "heads": self.heads, **self._index}

    def size(self, classes: int) -> int:
        """Bytes of a task with this number of classes."""
        return self._row_bytes + classes * self._class_bytes

    def allocate(self, classes: int) -> int | None:
        """A free slot for a task with this number of classes; None if there is no room."""
        slot = self._free_slots[0] if self._free_slots else self._next_slot
        next_slot = max(self._next_slot, slot + 1)
        floor = self._rows_below(next_slot)
        if self.used + self.size(classes) > self.budget or floor > self._unused_rows():
            return None
        place = self._last_place(classes, floor)
        if place is None:
            return None
        start, length = self._free_rows[place]
        self._free_rows[place : place + 1] = [(start, length - classes)] if length > classes else []
        if slot < self._next_slot:
            del self._free_slots[0]
        self._next_slot = next_slot
        self.first[slot], self.count[slot] = start + length - classes, classes
        self.used += self.size(classes)
        return slot

    def write(self, slot: int, task: TaskParameters) -> None:
        """Write a task's parameters into a slot that was allocated for it."""
        row = np.ascontiguousarray(task.row, np.float32)
        head = np.ascontiguousarray(task.head, np.float32)
        first, count = self.first[slot : slot + 1], self.count[slot : slot + 1]
        self._memory.write(self._start + slot * self._row_bytes, row)
        self._memory.write(self._class_offset(int(first[0])), head)
        self._memory.write(slot * first.nbytes, first)
        self._memory.write(self.first.nbytes + slot * count.nbytes, count)

    def free(self, slot: int) -> None:
        """Free a slot and its classifier's rows, and return their memory to the system."""
        first, count = int(self.first[slot]), int(self.count[slot])
        self.used -= self.size(count)
        row = self._start + slot * self._row_bytes
        self._memory.release(row, row + self._row_bytes)
        insort(self._free_slots, slot)
        while self._free_slots and self._free_slots[-1] == self._next_slot - 1:
            self._next_slot = self._free_slots.pop()
        low, high = self._free_range(first, count)
        low = max(low, self._rows_below(self._next_slot))
        # Only pages that the freed rows touch: the others of the range were returned before.
        pages = mmap.PAGESIZE
        start, end = self._class_offset(first), self._class_offset(first + count)
        self._memory.release(
            max(self._class_offset(low), start // pages * pages),
            min(self._class_offset(high), -(end // -pages) * pages),
        )

    def _last_place(self, classes: int, floor: int) -> int | None:
        """Index of the last free range with room for so many rows, not before row ``floor``."""
        for place in reversed(range(len(self._free_rows))):
            start, length = self._free_rows[place]
            if start + length - max(start, floor) >= classes:
                return place
        return None

    def _class_offset(self, row: int) -> int:
        """First byte of a classifier's row."""
        return self._start + row * self._class_bytes

    def _rows_below(self, next_slot: int) -> int:
        """Number of classifier rows whose bytes the bank's rows before a slot take."""
        return -(next_slot * self._row_bytes // -self._class_bytes)

    def _unused_rows(self) -> int:
        """Number of classifier rows before the first that a classifier takes."""
        first, length = self._free_rows[0] if self._free_rows else (0, 0)
        return length if first == 0 else 0

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
