"""A session: one visitor's tasks in the shared fleet, and what the visitor has chosen.

A session's tasks have keys in the fleet that no other session knows. They leave the fleet when the
session ends.
"""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aoft_demo.tasks.shared_fleet import SharedFleet, Task
from aoft_demo.tasks.training_queue import Training
from aoft_deploy.errors import CheckpointError, SettingError, UnknownNameError

__all__ = ["MAX_TASKS", "NO_TASK", "ON_AT_FIRST", "Session", "own_first", "task_name"]

MAX_TASKS = 64
"""Tasks that one session may add."""

MAX_REMOVED = 16
"""Removed tasks that a session can get back, the last one first."""

ON_AT_FIRST = 12
"""Tasks of the shared fleet that are on at first."""

NO_TASK = "You have no skill: add one on the tab Skills, or teach one."
"""What an action says that needs a task."""

PUNCTUATION = " .,()+-"
NAME = re.compile(rf"\w[\w{PUNCTUATION}]{{0,39}}")
INVALID = re.compile(rf"[^\w{PUNCTUATION}]")


def task_name(text: str) -> str:
    """Check a task's name and normalise its white space.

    Raises:
        SettingError: The text is not a valid name.
    """
    name = " ".join(text.split())
    if not NAME.fullmatch(name):
        raise SettingError(
            "A task's name has 1 to 40 letters, digits, spaces, dots or dashes, and starts with a "
            "letter or digit: type another name."
        )
    return name


def own_first(tasks: Mapping[str, Task]) -> dict[str, Task]:
    """A session's tasks, those that the visitor has added or taught first."""
    return dict(sorted(tasks.items(), key=lambda item: item[1].origin == "initial"))


class Session:
    """One visitor. Safe to use from any thread.

    Args:
        shared: The fleet, and the tasks to start with.
        key: A name that no other session has.
        folder: Folder for the session's files.
        now: Time of the start.

    Attributes:
        shared: The fleet, and the tasks that the session started with.
        folder: The session's files; removed when it ends.
        tasks: The session's tasks by name.
        off: Names of the tasks that do not answer.
        picture: The visitor's picture, as the page sent it; None for the first example.
        last_active: Time of the last request.
        ended: Whether the session has ended.
    """

    def __init__(self, shared: SharedFleet, key: str, folder: Path, now: float) -> None:
        self.shared, self.folder, self.last_active = shared, folder, now
        self.tasks = dict(shared.tasks)
        self.off = set(list(shared.tasks)[ON_AT_FIRST:])
        self.picture: Any = None
        self.ended = False
        self._removed: list[tuple[str, Task, int, bool]] = []
        self._trainings: dict[str, Training] = {}
        self._key, self._added_count = key, 0
        self._lock = threading.RLock()

    @property
    def on(self) -> list[str]:
        """Names of the tasks that answer, in the order of ``tasks``."""
        return [name for name in list(self.tasks) if name not in self.off]

    @property
    def is_new(self) -> bool:
        """Whether the page shows what it showed at first."""
        first = set(list(self.shared.tasks)[ON_AT_FIRST:])
        same = self.tasks == self.shared.tasks and self.off == first
        return same and self.picture is None and not self._removed

    def switch(self, name: str, on: bool) -> None:
        """Switch a task on or off.

        Raises:
            UnknownNameError: There is no such task.
        """
        with self._lock:
            self.task(name)
            (self.off.discard if on else self.off.add)(name)

    def task(self, name: str) -> Task:
        """A task by its name.

        Raises:
            UnknownNameError: There is no such task.
        """
        task = self.tasks.get(name)
        if task is None:
            raise UnknownNameError("task", name, self.tasks)
        return task

    @contextmanager
    def using(self, name: str) -> Iterator[Task]:
        """Context manager: use a task that another thread may remove.

        If the block fails because the task was removed or replaced, the error says so.

        Raises:
            UnknownNameError: There is no such task, or it was removed and the block failed.
            CheckpointError: The task was replaced by one of the same name, and the block failed.
        """
        task = self.task(name)
        try:
            yield task
        except Exception as error:
            current = self.tasks.get(name)
            if current is None:
                raise UnknownNameError("task", name, self.tasks) from error
            if current is not task:
                raise CheckpointError(
                    f"Task {name!r} was replaced in the meantime: try again."
                ) from error
            raise

    def add(self, checkpoint: Path, name: str, origin: str = "added") -> Task:
        """Add a task from a checkpoint. The session keeps a copy of the file.

        Raises:
            SettingError: The name is invalid or taken, or the session has too many tasks.
            CheckpointError: The file is damaged, or was trained on another backbone.
        """
        name = task_name(name)
        with self._lock:
            self._check_can_add(name)
            return self._add(checkpoint, name, origin)

    def free_name(self, wanted: str) -> str:
        """A valid name near the wanted one; a number follows if that is taken."""
        base = " ".join(INVALID.sub(" ", wanted).split()).lstrip(PUNCTUATION)[:34].rstrip()
        base, number = base or "task", 1
        with self._lock:
            taken = self.tasks.keys() | self._trainings.keys()
            while (name := base if number == 1 else f"{base} {number}") in taken:
                number += 1
        return name

    def remove(self, name: str) -> None:
        """Remove a task from this session; ``restore`` brings it back.

        Raises:
            UnknownNameError: There is no such task.
        """
        with self._lock:
            task, place = self.task(name), list(self.tasks).index(name)
            del self.tasks[name]
            if task.origin != "initial":
                self.shared.fleet.remove(task.key)
            self._removed.append((name, task, place, name in self.off))
            self.off.discard(name)
            for _, old, _, _ in self._removed[:-MAX_REMOVED]:
                self._delete(old)
            del self._removed[:-MAX_REMOVED]

    @property
    def removed(self) -> str | None:
        """Name of the task that was removed last; None if ``restore`` has nothing to restore."""
        return self._removed[-1][0] if self._removed else None

    def restore(self) -> str:
        """Bring back the task that was removed last, at its place and with its switch.

        Returns:
            Its name; it has a number if its name was taken in the meantime.

        Raises:
            SettingError: No task was removed, or the session has too many tasks.
        """
        with self._lock:
            if not self._removed:
                raise SettingError("No task was removed, so there is none to bring back.")
            removed, task, place, off = self._removed[-1]
            name = self.free_name(removed)
            if task.origin != "initial":
                self._check_can_add(name)
                assert task.checkpoint is not None
                self.shared.fleet.add(task.checkpoint, task.key)
            self._removed.pop()
            items = list(self.tasks.items())
            self.tasks = dict([*items[:place], (name, task), *items[place:]])
            if off:
                self.off.add(name)
            return name

    @contextmanager
    def training(self, name: str) -> Iterator[Training]:
        """Context manager: a training, whose task's name is reserved for ``add_trained``.

        Raises:
            SettingError: As for ``add``.
        """
        name = task_name(name)
        with self._lock:
            self._check_can_add(name)
            training = self._trainings[name] = Training()
        try:
            yield training
        finally:
            training.stop()
            with self._lock:
                self._trainings.pop(name, None)

    def add_trained(self, training: Training, checkpoint: Path) -> tuple[str, Task]:
        """Add the task of a training.

        Returns:
            Its name and the task.

        Raises:
            SettingError: The training was stopped.
            CheckpointError: The file is damaged, or was trained on another backbone.
        """
        with self._lock:
            training.check_not_stopped()
            (name,) = (key for key, value in self._trainings.items() if value is training)
            return name, self._add(checkpoint, name, "trained")

    def stop_trainings(self) -> None:
        """Stop the trainings that run or wait."""
        with self._lock:
            trainings = list(self._trainings.values())
        for training in trainings:
            training.stop()

    def end(self) -> None:
        """Stop the trainings, remove the tasks from the fleet and delete the files."""
        with self._lock:
            self.ended = True
        self.stop_trainings()
        with self._lock:
            for task in self.tasks.values():
                if task.origin != "initial":
                    self.shared.fleet.remove(task.key)
            self.tasks.clear()
            self._removed.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _check_can_add(self, name: str) -> None:
        if self.ended:
            raise SettingError("This page has ended: reload it.")
        if name in self._trainings:
            raise SettingError(f"A task {name!r} is being trained: type another name.")
        if name in self.tasks:
            raise SettingError(
                f"There is a task {name!r} already: remove it, or type another name."
            )
        own = sum(task.origin != "initial" for task in self.tasks.values()) + len(self._trainings)
        if own >= MAX_TASKS:
            raise SettingError(f"You have added {own} tasks, which is the limit: remove one first.")

    def _add(self, checkpoint: Path, name: str, origin: str) -> Task:
        self._added_count += 1
        key = f"{self._key}/{self._added_count}"
        folder = self.folder / str(self._added_count)
        copy = folder / f"{name}.ckpt"
        folder.mkdir()
        try:
            shutil.copyfile(checkpoint, copy)
            self.shared.fleet.add(copy, key)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        task = self.tasks[name] = Task(key, self.shared.fleet.classes(key), copy, origin)
        return task

    @staticmethod
    def _delete(task: Task) -> None:
        """Delete the file of a removed task; initial tasks belong to all sessions."""
        if task.origin != "initial" and task.checkpoint is not None:
            shutil.rmtree(task.checkpoint.parent, ignore_errors=True)
