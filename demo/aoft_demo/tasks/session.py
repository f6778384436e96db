"""A session: one browser tab with its own tasks in the shared fleet.

A session's tasks have keys in the fleet that no other session knows. They leave the fleet when the
session ends.
"""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aoft_demo.tasks.shared_fleet import SharedFleet, Task
from aoft_demo.tasks.training_queue import Training
from aoft_deploy.errors import CheckpointError, SettingError, UnknownNameError

__all__ = ["MAX_TASKS", "Session", "task_name"]

MAX_TASKS = 64
"""Tasks that one session may add."""

NAME = re.compile(r"[\w][\w .,()+-]{0,39}", re.UNICODE)


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


class Session:
    """One browser tab. Safe to use from any thread.

    Args:
        shared: The fleet, and the tasks to start with.
        key: A name that no other session has.
        folder: Folder for the session's files.
        now: Time of the start.

    Attributes:
        shared: The fleet, and the tasks that the session started with.
        folder: The session's files; removed when it ends.
        tasks: The session's tasks by name.
        last_active: Time of the last request.
        displayed: Names of the tasks that the page shows; None before the page is loaded.
        ended: Whether the session has ended.
    """

    def __init__(self, shared: SharedFleet, key: str, folder: Path, now: float) -> None:
        self.shared, self.folder, self.last_active = shared, folder, now
        self.tasks = dict(shared.tasks)
        self.displayed: set[str] | None = None
        self.ended = False
        self._trainings: dict[str, Training] = {}
        self._key, self._added_count = key, 0
        self._lock = threading.RLock()

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

    def remove(self, name: str) -> None:
        """Remove a task from this session.

        Raises:
            UnknownNameError: There is no such task.
        """
        with self._lock:
            task = self.task(name)
            del self.tasks[name]
            self._release(task)

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
                self._release(task)
            self.tasks.clear()
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

    def _release(self, task: Task) -> None:
        """Remove a task of this session from the fleet; initial tasks belong to all sessions."""
        if task.origin == "initial":
            return
        self.shared.fleet.remove(task.key)
        if task.checkpoint is not None:
            shutil.rmtree(task.checkpoint.parent, ignore_errors=True)
