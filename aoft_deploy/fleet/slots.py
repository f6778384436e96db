"""Slots of the tasks in memory: by name, held by requests, the least recently used given up.

A slot is free, being written, seen under a name, or leaving: without a name, but held. What is held
is neither given up nor written.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

from aoft_deploy.errors import SettingError
from aoft_deploy.fleet.tables import TaskTables

__all__ = ["Held", "Residency", "TaskSlots"]


class Held(NamedTuple):
    """A version of a task that a request holds.

    Attributes:
        slot: Where its numbers lie in the tables.
        classes: Names of its classes, in the order of its logits.
    """

    slot: int
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Residency:
    """What is in memory, and how often it was what requests asked for.

    Attributes:
        tasks: Tasks in memory.
        bytes: What their numbers take.
        budget: What they may take, in bytes.
        hits: Tasks of requests that were in memory, each once a request.
        misses: Tasks of requests that were not.
        evictions: Tasks that left memory for others.
    """

    tasks: int
    bytes: int
    budget: int
    hits: int
    misses: int
    evictions: int


class TaskSlots:
    """Which task has which slot of the tables. Not thread-safe by itself.

    Attributes:
        tables: What the slots are of.
        slots: Slot of each task in memory.
        classes: Its classes.

    Args:
        tables: As the attribute.
    """

    def __init__(self, tables: TaskTables) -> None:
        self.tables = tables
        self.slots: dict[str, int] = {}
        self.classes: dict[str, tuple[str, ...]] = {}
        self._paged: OrderedDict[str, None] = OrderedDict()  # may be given up, oldest use first
        self._added_bytes = 0  # of those that may not
        self._held: Counter[int] = Counter()
        self._written: set[int] = set()
        self._leaving: set[int] = set()
        self._hits = self._misses = self._evictions = 0

    @property
    def residency(self) -> Residency:
        """Counts since the start."""
        used, budget = self.tables.used, self.tables.budget
        counts = self._hits, self._misses, self._evictions
        return Residency(len(self.slots), used, budget, *counts)

    def take(self, classes: int) -> int | None:
        """A slot to write a task into, others given up for it; None while those are held.

        Raises:
            SettingError: Tasks that may not be given up leave no room for it.
        """
        size, budget = self.tables.size(classes), self.tables.budget
        while size <= budget - self._added_bytes:
            slot = self.tables.take(classes)
            if slot is not None:
                self._written.add(slot)
                return slot
            idle = next((n for n in self._paged if not self._held[self.slots[n]]), None)
            if idle is not None:
                self.drop(idle)
                self._evictions += 1
            elif self._paged or self._leaving or self._written:
                return None
            else:
                break
        raise SettingError(
            f"A task of {classes} classes takes {size} bytes, for which the tasks added leave no "
            f"room in a budget of {budget}: remove some, or give a larger budget."
        )

    def discard(self, slot: int) -> None:
        """Free a slot that was taken."""
        self._written.remove(slot)
        self.tables.give_back(slot)

    def show(self, slot: int, name: str, classes: tuple[str, ...], *, paged: bool) -> None:
        """Give a slot that was written its task's name.

        Args:
            slot: The slot.
            name: A name that is not in memory.
            classes: The task's classes.
            paged: Whether the task may be given up for others.
        """
        self._written.remove(slot)
        self.slots[name], self.classes[name] = slot, classes
        if paged:
            self._paged[name] = None
        else:
            self._added_bytes += self.tables.size(len(classes))

    def hold(self, name: str, *, hit: bool) -> Held:
        """A task as it is now; its slot stays its own until as many releases as holds.

        Args:
            name: The task.
            hit: Whether the request found it in memory.
        """
        slot = self.slots[name]
        self._hits, self._misses = self._hits + hit, self._misses + (not hit)
        self._held[slot] += 1
        if name in self._paged:
            self._paged.move_to_end(name)
        return Held(slot, self.classes[name])

    def release(self, slot: int) -> None:
        """End a hold."""
        self._held[slot] -= 1
        if not self._held[slot]:
            del self._held[slot]
            if slot in self._leaving:
                self._leaving.remove(slot)
                self.tables.give_back(slot)

    def drop(self, name: str) -> None:
        """Take a task's name away, and its slot too when nobody holds it any more."""
        slot, classes = self.slots.pop(name), self.classes.pop(name)
        if name in self._paged:
            del self._paged[name]
        else:
            self._added_bytes -= self.tables.size(len(classes))
        if self._held[slot]:
            self._leaving.add(slot)
        else:
            self.tables.give_back(slot)
