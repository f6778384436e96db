"""Paging: tasks are read from a store on demand, and the least recently used are evicted.

One lock guards names and slots. It is never held while a disk is read or parameters are copied. A
request waits for room only while it holds no task, so requests cannot deadlock.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager

from aoft_deploy.classes import Classes
from aoft_deploy.errors import SettingError, UnknownNameError
from aoft_deploy.fleet.name_index import NameIndex
from aoft_deploy.fleet.slots import HeldTask, Residency, TaskSlots
from aoft_deploy.fleet.store import TaskStore
from aoft_deploy.fleet.tables import TaskTables
from aoft_deploy.fleet.task import TaskParameters

__all__ = ["ResidentTasks"]


class ResidentTasks:
    """The tasks in memory, and those that a store can bring there. Thread-safe.

    Args:
        tables: Holds the parameters; only this object writes to them.
        store: More tasks; None if there are none.
        own: Tasks that are added first. They take precedence over the store's of the same name.

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
        self._removed: set[str] = set()  # tasks of the store that were removed
        self._reads: dict[str, Future[TaskParameters]] = {}  # in progress
        self._store: TaskStore | None = None
        for name, task in own:
            self.add(name, task)
        self._store = store

    @property
    def resident(self) -> dict[str, Classes]:
        """The tasks in memory and their classes."""
        with self._lock:
            return dict(self._slots.classes)

    @property
    def residency(self) -> Residency:
        """Counts since the start."""
        with self._lock:
            return self._slots.residency

    def __contains__(self, name: str) -> bool:
        """Whether there is a task of that name, in memory or in the store."""
        with self._lock:
            if name in self._slots.slots:
                return True
            if self._store is None or name in self._removed:
                return False
        return name in self._store

    def classes(self, name: str) -> Classes:
        """Classes of a task in memory or in the store.

        Raises:
            UnknownNameError: There is no such task.
            CheckpointError: The store cannot read it.
        """
        with self._lock:
            if name in self._slots.classes:
                return self._slots.classes[name]
        return Classes(self._read(name).classes)

    @property
    def names(self) -> set[str]:
        """Names of all tasks, in memory and in the store; may be slow."""
        with self._lock:
            resident, removed = set(self._slots.slots), set(self._removed)
        if self._store is None:
            return resident
        return resident | (set(self._store.names) - removed)

    def add(self, name: str, task: TaskParameters, *, replace: bool = False) -> None:
        """Add a task that is never evicted.

        Args:
            name: Its name.
            task: Its parameters.
            replace: Whether it may replace a task of that name. Requests that hold the old version
                keep it until they end.

        Raises:
            SettingError: There is a task of that name, or no room for this one.
        """
        if not replace and name in self:
            raise _name_in_use(name)
        with self.staged(task) as publish:
            publish(name, replace)

    @contextmanager
    def staged(self, task: TaskParameters) -> Iterator[Callable[[str, bool], None]]:
        """Context manager: hold a task in a slot without a name, after waiting for room.

        Yields:
            Function that publishes the task under a name, and may replace a task of that name if
            its second argument is true. Without this call, the slot is freed at the end.

        Raises:
            SettingError: There is no room for the task.
        """
        while True:
            changes = self._changes
            slot = self._write(task)
            if slot is not None:
                break
            self._wait(changes)
        published = False

        def publish(name: str, replace: bool) -> None:
            nonlocal published
            with self._changing():
                if name in self._slots.slots:
                    if not replace:
                        raise _name_in_use(name)
                    self._slots.remove(name)
                self._slots.publish(slot, name, task.classes, evictable=False)
                published = True

        try:
            yield publish
        finally:
            if not published:
                with self._changing():
                    self._slots.free(slot)

    def remove(self, name: str) -> None:
        """Remove a task permanently, also one of the store.

        Requests that hold it keep it until they end.

        Raises:
            UnknownNameError: There is no such task.
        """
        stored = self._store is not None and name in self._store
        with self._changing():
            known = name in self._slots.slots or (stored and name not in self._removed)
            if stored:
                self._removed.add(name)
            if name in self._slots.slots:
                self._slots.remove(name)
        if not known:
            raise self._unknown(name)

    @contextmanager
    def holding(self, names: Sequence[str]) -> Iterator[Mapping[str, HeldTask]]:
        """Context manager: hold tasks in memory, after reading those that are missing.

        Args:
            names: One or more different names.

        Yields:
            The tasks held, by name: all of them, or as many as there is room for, at least one.

        Raises:
            UnknownNameError: There is no such task, or it was removed meanwhile.
            CheckpointError: The store cannot read one.
            SettingError: The tasks added leave no room for one.
        """
        held: dict[str, HeldTask] = {}
        try:
            with self._lock:
                resident = [name for name in names if name in self._slots.slots]
                held.update((name, self._slots.acquire(name, hit=True)) for name in resident)
            missing = [name for name in names if name not in held]
            for name in missing:
                if name not in self:
                    raise self._unknown(name)
            for name in missing:
                task = self._page_in(name, wait=not held)
                if task is None:
                    break
                held[name] = task
            yield held
        finally:
            with self._changing():
                for task in held.values():
                    self._slots.release(task.slot)

    def _page_in(self, name: str, wait: bool) -> HeldTask | None:
        """Hold a task that was not in memory; None if there is no room and ``wait`` is false.

        If several requests want the same task, one reads it.
        """
        task: TaskParameters | None = None
        while True:
            with self._lock:
                if name in self._slots.slots:
                    return self._slots.acquire(name, hit=False)
                changes, other = self._changes, self._reads.get(name)
                if other is None:
                    own = self._reads[name] = Future[TaskParameters]()
            if other is not None:
                task = other.result()
                continue
            try:
                task = task or self._read(name)
                held = self._publish(name, task)
            except BaseException as error:
                self._end_read(name)
                own.set_exception(error)
                raise
            self._end_read(name)
            own.set_result(task)
            if held is not None or not wait:
                return held
            self._wait(changes)

    def _end_read(self, name: str) -> None:
        """Allow another read of the task. Called before those that wait see the result."""
        with self._lock:
            del self._reads[name]

    def _read(self, name: str) -> TaskParameters:
        if self._store is None or name not in self:
            raise self._unknown(name)
        task = self._store.read(name)
        self._store.kind.check_parameters(name, task)
        return task

    def _write(self, task: TaskParameters) -> int | None:
        """Write a task into a slot that is not published yet; None if there is no room now."""
        with self._lock:
            slot = self._slots.allocate(len(task.head))
        if slot is not None:
            self._tables.write(slot, task)
        return slot

    def _publish(self, name: str, task: TaskParameters) -> HeldTask | None:
        """Hold a task that was just read; None if there is no room.

        Raises:
            UnknownNameError: The task was removed meanwhile.
        """
        slot = self._write(task)
        if slot is None:
            return None
        with self._changing():
            if name in self._slots.slots or name in self._removed:
                self._slots.free(slot)
            else:
                self._slots.publish(slot, name, task.classes, evictable=True)
            if name in self._slots.slots:
                return self._slots.acquire(name, hit=False)
        raise self._unknown(name)

    def _unknown(self, name: str) -> UnknownNameError:
        with self._lock:
            resident, removed = list(self._slots.slots), set(self._removed)
        close = set(NameIndex.of(resident).closest(name))
        if self._store is not None:
            close.update(self._store.names.closest(name, without=removed))
        return UnknownNameError("task", name, close)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Context manager: take the lock for a change that may make room, then wake the waiters."""
        with self._room:
            try:
                yield
            finally:
                self._changes += 1
                self._room.notify_all()

    def _wait(self, changes: int) -> None:
        """Wait until the count of changes differs from ``changes``."""
        with self._room:
            self._room.wait_for(lambda: self._changes != changes)


def _name_in_use(name: str) -> SettingError:
    return SettingError(f"The fleet has a task {name!r}: remove it first.")
