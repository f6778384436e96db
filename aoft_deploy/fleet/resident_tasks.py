"""Which tasks are in memory: read from a store when asked for, the least recently used out.

One lock guards names and slots, and is never held while a disk is read or numbers are copied. A
request waits for room only while it holds nothing, so requests cannot wait for each other in a
circle.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager

from aoft_deploy.errors import SettingError, UnknownNameError
from aoft_deploy.fleet.name_index import NameIndex
from aoft_deploy.fleet.slots import Held, Residency, TaskSlots
from aoft_deploy.fleet.store import TaskStore
from aoft_deploy.fleet.tables import TaskTables
from aoft_deploy.fleet.task import TaskParameters

__all__ = ["ResidentTasks"]


class ResidentTasks:
    """Tasks in tables, safe to use from any thread.

    Args:
        tables: Where their numbers lie; only this object writes there.
        store: Where others can be had; None: there are no others.
        own: Tasks that are there from the start, before those of the same name in the store.

    Raises:
        SettingError: The budget has no room for ``own``.
    """

    def __init__(
        self,
        tables: TaskTables,
        store: TaskStore | None = None,
        own: Iterable[tuple[str, TaskParameters]] = (),
    ) -> None:
        self._tables = tables
        self._lock = threading.Lock()
        self._room, self._changes = threading.Condition(self._lock), 0
        self._slots = TaskSlots(tables)
        self._removed: set[str] = set()  # of the store's
        self._paging: dict[str, Future[TaskParameters]] = {}
        self._store: TaskStore | None = None
        for name, task in own:
            self.add(name, task)
        self._store = store

    @property
    def resident(self) -> dict[str, tuple[str, ...]]:
        """The tasks in memory and their classes."""
        with self._lock:
            return dict(self._slots.classes)

    @property
    def residency(self) -> Residency:
        """Counts since the start."""
        with self._lock:
            return self._slots.residency

    def knows(self, name: str) -> bool:
        """Whether there is such a task, in memory or in the store."""
        with self._lock:
            if name in self._slots.slots:
                return True
            if self._store is None or name in self._removed:
                return False
        return name in self._store

    def classes(self, name: str) -> tuple[str, ...]:
        """Classes of a task in memory or in the store.

        Raises:
            UnknownNameError: There is no such task.
            CheckpointError: The store cannot give them.
        """
        with self._lock:
            if name in self._slots.classes:
                return self._slots.classes[name]
        return self._read(name).classes

    @property
    def names(self) -> set[str]:
        """Names of all tasks, in memory and in the store; may take a while."""
        with self._lock:
            here, removed = set(self._slots.slots), set(self._removed)
        return here if self._store is None else here | (set(self._store.names) - removed)

    def add(self, name: str, task: TaskParameters, *, replace: bool = False) -> None:
        """Take a task in for good: it is never evicted.

        Args:
            name: What to call it.
            task: Its numbers.
            replace: Whether it may take the place of one of that name, which requests that hold it
                keep to their end.

        Raises:
            SettingError: A task of that name is there, or the tasks added leave no room for it.
        """
        if not replace and self.knows(name):
            raise _taken(name)
        while True:
            changes = self._changes
            slot = self._written(task)
            if slot is not None:
                break
            self._wait(changes)
        with self._changing():
            if name in self._slots.slots:
                if not replace:
                    self._slots.discard(slot)
                    raise _taken(name)
                self._slots.drop(name)
            self._slots.show(slot, name, task.classes, paged=False)

    def remove(self, name: str) -> None:
        """Let a task go for good, the store's too; requests that hold it keep it to their end.

        Raises:
            UnknownNameError: There is no such task.
        """
        stored = self._store is not None and name in self._store
        with self._changing():
            known = name in self._slots.slots or (stored and name not in self._removed)
            if stored:
                self._removed.add(name)
            if name in self._slots.slots:
                self._slots.drop(name)
        if not known:
            raise self._unknown(name)

    @contextmanager
    def holding(self, names: Sequence[str]) -> Iterator[Mapping[str, Held]]:
        """Slots and classes of tasks, which stay theirs until the end.

        Args:
            names: Different names, one at least.

        Yields:
            What is held, by name: all of them, or as many as there is room for, one at least.

        Raises:
            UnknownNameError: There is no such task, or it was removed meanwhile.
            CheckpointError: The store cannot give its numbers.
            SettingError: The tasks added leave no room for it.
        """
        held: dict[str, Held] = {}
        try:
            with self._lock:
                here = [name for name in names if name in self._slots.slots]
                held.update((name, self._slots.hold(name, hit=True)) for name in here)
            missing = [name for name in names if name not in held]
            for name in missing:
                if not self.knows(name):
                    raise self._unknown(name)
            for name in missing:
                task = self._paged_in(name, wait=not held)
                if task is None:
                    break
                held[name] = task
            yield held
        finally:
            with self._changing():
                for task in held.values():
                    self._slots.release(task.slot)

    def _paged_in(self, name: str, wait: bool) -> Held | None:
        """Hold a task that was not in memory; None where there is no room without waiting.

        Of several requests that want it, one reads.
        """
        task: TaskParameters | None = None
        while True:
            with self._lock:
                if name in self._slots.slots:
                    return self._slots.hold(name, hit=False)
                changes, other = self._changes, self._paging.get(name)
                if other is None:
                    mine = self._paging[name] = Future[TaskParameters]()
            if other is not None:
                task = other.result()
                continue
            try:
                task = task or self._read(name)
                held = self._shown(name, task)
            except BaseException as error:
                self._end(name, mine).set_exception(error)
                raise
            self._end(name, mine).set_result(task)
            if held is not None or not wait:
                return held
            self._wait(changes)

    def _end(self, name: str, outcome: Future[TaskParameters]) -> Future[TaskParameters]:
        """Let others read that task again, before those who wait hear of this outcome."""
        with self._lock:
            del self._paging[name]
        return outcome

    def _read(self, name: str) -> TaskParameters:
        if self._store is None or not self.knows(name):
            raise self._unknown(name)
        task = self._store.read(name)
        self._store.kind.check_parameters(name, task)
        return task

    def _written(self, task: TaskParameters) -> int | None:
        """A slot with the task's numbers that nobody sees yet; None where there is no room now."""
        with self._lock:
            slot = self._slots.take(len(task.head))
        if slot is not None:
            self._tables.write(slot, task)
        return slot

    def _shown(self, name: str, task: TaskParameters) -> Held | None:
        """Hold a task just read, unless it was removed meanwhile; None where there is no room."""
        slot = self._written(task)
        if slot is None:
            return None
        with self._changing():
            if name in self._slots.slots or name in self._removed:
                self._slots.discard(slot)
            else:
                self._slots.show(slot, name, task.classes, paged=True)
            if name in self._slots.slots:
                return self._slots.hold(name, hit=False)
        raise self._unknown(name)

    def _unknown(self, name: str) -> UnknownNameError:
        with self._lock:
            resident, removed = list(self._slots.slots), set(self._removed)
        near = set(NameIndex.of(resident).closest(name))
        if self._store is not None:
            near.update(self._store.names.closest(name, without=removed))
        return UnknownNameError("task", name, near)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """The lock, for what may make room; those who wait for it look again."""
        with self._room:
            try:
                yield
            finally:
                self._changes += 1
                self._room.notify_all()

    def _wait(self, changes: int) -> None:
        """Until something has changed since ``changes``."""
        with self._room:
            self._room.wait_for(lambda: self._changes != changes)


def _taken(name: str) -> SettingError:
    return SettingError(f"The fleet has a task {name!r}: remove it first.")
