"""LRU slots with reference counts: which task is in which slot of the tables.

A slot is free, being written, published under a name, or removed: without a name, but still in use
by a request. A slot that a request uses is neither evicted nor overwritten.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

from aoft_deploy.classes import Classes
from aoft_deploy.errors import SettingError
from aoft_deploy.fleet.tables import TaskTables

__all__ = ["HeldTask", "Residency", "TaskSlots"]


class HeldTask(NamedTuple):
    """A version of a task that a request holds a reference to.

    Attributes:
        slot: Its slot in the tables.
        classes: Names of its classes, in the order of its logits.
    """

    slot: int
    classes: Classes


@dataclass(frozen=True)
class Residency:
    """How many tasks are in memory, and how often requests found theirs there.

    Attributes:
        tasks: Tasks in memory.
        bytes: Memory that their parameters take.
        budget: Memory that they may take, in bytes.
        hits: Tasks of requests that were in memory, counted once per request.
        misses: Tasks of requests that were not in memory.
        evictions: Tasks that were evicted to make room for others.
    """

    tasks: int
    bytes: int
    budget: int
    hits: int
    misses: int
    evictions: int


class TaskSlots:
    """The slot of each task. Not thread-safe by itself.

    Attributes:
        tables: The tables that the slots belong to.
        slots: Slot of each task in memory.
        classes: Classes of each task in memory.

    Args:
        tables: As the attribute.
    """

    def __init__(self, tables: TaskTables) -> None:
        self.tables = tables
        self.slots: dict[str, int] = {}
        self.classes: dict[str, Classes] = {}
        self._evictable: OrderedDict[str, None] = OrderedDict()  # least recently used first
        self._pinned_bytes = 0  # of tasks that are never evicted
        self._references: Counter[int] = Counter()
        self._writing: set[int] = set()
        self._removed: set[int] = set()
        self._hits = self._misses = self._evictions = 0

    @property
    def residency(self) -> Residency:
        """Counts since the start."""
        used, budget = self.tables.used, self.tables.budget
        counts = self._hits, self._misses, self._evictions
        return Residency(len(self.slots), used, budget, *counts)

    def allocate(self, classes: int) -> int | None:
        """A slot to write a task into; tasks are evicted to make room for it.

        Returns:
            The slot, or None if requests use all tasks that could be evicted.

        Raises:
            SettingError: Tasks that are never evicted leave no room for it.
        """
        size, budget = self.tables.size(classes), self.tables.budget
        while size <= budget - self._pinned_bytes:
            slot = self.tables.allocate(classes)
            if slot is not None:
                self._writing.add(slot)
                return slot
            unused = next((n for n in self._evictable if not self._references[self.slots[n]]), None)
            if unused is not None:
                self.remove(unused)
                self._evictions += 1
            elif self._evictable or self._removed or self._writing:
                return None
            else:
                break
        raise SettingError(
            f"A task of {classes} classes takes {size} bytes, but the tasks added leave no room "
            f"for it in a `budget` of {budget}: remove some, or give a larger `budget`."
        )

    def free(self, slot: int) -> None:
        """Free a slot that was allocated but not published."""
        self._writing.remove(slot)
        self.tables.free(slot)

    def publish(self, slot: int, name: str, classes: tuple[str, ...], *, evictable: bool) -> None:
        """Make a slot that was written available under its task's name.

        Args:
            slot: The slot.
            name: A name that is not in memory.
            classes: The task's classes.
            evictable: Whether the task may be evicted.
        """
        self._writing.remove(slot)
        self.slots[name], self.classes[name] = slot, Classes(classes)
        if evictable:
            self._evictable[name] = None
        else:
            self._pinned_bytes += self.tables.size(len(classes))

    def acquire(self, name: str, *, hit: bool) -> HeldTask:
        """Add a reference to the current version of a task.

        The slot is not reused before ``release`` was called once for each ``acquire``.

        Args:
            name: The task.
            hit: Whether the request found it in memory.
        """
        slot = self.slots[name]
        self._hits, self._misses = self._hits + hit, self._misses + (not hit)
        self._references[slot] += 1
        if name in self._evictable:
            self._evictable.move_to_end(name)
        return HeldTask(slot, self.classes[name])

    def release(self, slot: int) -> None:
        """Remove a reference."""
        self._references[slot] -= 1
        if not self._references[slot]:
            del self._references[slot]
            if slot in self._removed:
                self._removed.remove(slot)
                self.tables.free(slot)

    def remove(self, name: str) -> None:
        """Remove a task's name; its slot is free once no request uses it."""
        slot, classes = self.slots.pop(name), self.classes.pop(name)
        if name in self._evictable:
            del self._evictable[name]
        else:
            self._pinned_bytes -= self.tables.size(len(classes))
        if self._references[slot]:
            self._removed.add(slot)
        else:
            self.tables.free(slot)
