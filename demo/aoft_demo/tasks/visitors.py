"""Who is looking: each visitor's own tasks, on the fleet that all share.

A visitor's tasks lie in the fleet under names that nobody else sees, and leave it with the visitor.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from aoft_demo.tasks.shared_fleet import Stage, Task
from aoft_demo.tasks.training_queue import Line, Training
from aoft_deploy.errors import CheckpointError, SettingError, UnknownNameError

__all__ = ["MOST_TASKS", "Visitor", "Visitors", "task_name"]

MOST_TASKS = 64
"""Tasks that one visitor may add."""

IDLE = 3600.0
"""Seconds after which a visitor who did nothing is taken to have left."""

NAME = re.compile(r"[\w][\w .,()+-]{0,39}", re.UNICODE)


def task_name(text: str) -> str:
    """A task's name as typed, without surrounding spaces.

    Raises:
        SettingError: It cannot be a name.
    """
    name = " ".join(text.split())
    if not NAME.fullmatch(name):
        raise SettingError(
            "A task's name has 1 to 40 letters, digits, spaces, dots or dashes, and begins with a "
            "letter or digit: type another."
        )
    return name


class Visitor:
    """One browser tab.

    Attributes:
        tasks: What it sees, by name.
        folder: Its files; gone when it leaves.
        seen: When it last did something.
        shown: Names of the tasks that its page knows of; None before it is loaded.
        gone: Whether it has left.
    """

    def __init__(self, stage: Stage, key: str, folder: Path, now: float) -> None:
        self.stage, self.folder, self.seen = stage, folder, now
        self.tasks = dict(stage.tasks)
        self.shown: set[str] | None = None
        self.gone = False
        self._trainings: dict[str, Training] = {}
        self._key, self._count = key, 0
        self._lock = threading.RLock()

    def add(self, checkpoint: Path, name: str, origin: str = "added") -> Task:
        """Take a task in, from a checkpoint, of which a copy is kept.

        Raises:
            SettingError: The name cannot be one or is taken, or there are too many.
            CheckpointError: The file is damaged or does not belong to this backbone.
        """
        name = task_name(name)
        with self._lock:
            self._check_room(name)
            return self._added(checkpoint, name, origin)

    def _added(self, checkpoint: Path, name: str, origin: str) -> Task:
        self._count += 1
        key, folder = f"{self._key}/{self._count}", self.folder / f"{self._count}"
        kept = folder / f"{name}.ckpt"
        folder.mkdir()
        try:
            shutil.copyfile(checkpoint, kept)
            self.stage.fleet.add(kept, key)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        task = self.tasks[name] = Task(key, self.stage.fleet.classes(key), kept, origin)
        return task

    def _check_room(self, name: str) -> None:
        """Whether one more task may have a name."""
        if self.gone:
            raise SettingError("This page has ended: reload it.")
        if name in self._trainings:
            raise SettingError(f"A task {name!r} is being trained: type another name.")
        if name in self.tasks:
            raise SettingError(f"There is a task {name!r}: remove it, or type another name.")
        own = sum(task.origin != "given" for task in self.tasks.values()) + len(self._trainings)
        if own >= MOST_TASKS:
            raise SettingError(f"You have added {own} tasks, the most there may be: remove one.")

    @contextmanager
    def training(self, name: str) -> Iterator[Training]:
        """A training while the block runs; its task's name is kept free for ``add_trained``.

        Raises:
            SettingError: As for ``add``.
        """
        name = task_name(name)
        with self._lock:
            self._check_room(name)
            training = self._trainings[name] = Training()
        try:
            yield training
        finally:
            training.stop()
            with self._lock:
                self._trainings.pop(name, None)

    def add_trained(self, training: Training, checkpoint: Path) -> tuple[str, Task]:
        """Take in what a training has made; its name and the task.

        Raises:
            SettingError: The training was stopped.
            CheckpointError: The file is damaged or does not belong to this backbone.
        """
        with self._lock:
            training.go_on()
            (name,) = (key for key, value in self._trainings.items() if value is training)
            return name, self._added(checkpoint, name, "trained")

    def stop_trainings(self) -> None:
        """End what is being trained or waits for its turn."""
        with self._lock:
            trainings = list(self._trainings.values())
        for training in trainings:
            training.stop()

    def remove(self, name: str) -> None:
        """Let a task go, for this visitor.

        Raises:
            UnknownNameError: There is no such task.
        """
        with self._lock:
            task = self.task(name)
            del self.tasks[name]
            if task.origin != "given":
                self._drop(task)

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
        """A task by its name, while the block uses its numbers or its checkpoint.

        Raises:
            UnknownNameError: There is no such task, or it was removed and the block failed.
            CheckpointError: Another has taken its name, and the block failed.
        """
        task = self.task(name)
        try:
            yield task
        except Exception as error:
            now = self.tasks.get(name)
            if now is None:
                raise UnknownNameError("task", name, self.tasks) from error
            if now is not task:
                raise CheckpointError(
                    f"Task {name!r} was replaced by another meanwhile: try again."
                ) from error
            raise

    def leave(self) -> None:
        """Take this visitor's tasks out of the fleet, and its files away."""
        with self._lock:
            self.gone = True
        self.stop_trainings()
        with self._lock:
            for task in self.tasks.values():
                if task.origin != "given":
                    self._drop(task)
            self.tasks.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _drop(self, task: Task) -> None:
        self.stage.fleet.remove(task.key)
        if task.checkpoint is not None:
            shutil.rmtree(task.checkpoint.parent, ignore_errors=True)


class Visitors:
    """All who are there; safe from any thread.

    Attributes:
        line: Whose turn it is to train.

    Args:
        stage: What they look at.
        clock: Seconds.
    """

    def __init__(self, stage: Stage, clock: Callable[[], float] = time.monotonic) -> None:
        self.stage, self._clock = stage, clock
        self.line = Line()
        self._closed = False
        self._here: dict[str, Visitor] = {}
        self._lock = threading.Lock()

    def of(self, key: str | None) -> Visitor:
        """The visitor of a session, new where the session is.

        Raises:
            SettingError: All have left, and the demo ends.
        """
        key, now = key or "", self._clock()
        with self._lock:
            if self._closed:
                raise SettingError("The demo has ended: start it again.")
            gone = [k for k, v in self._here.items() if now - v.seen > IDLE and k != key]
            left = [self._here.pop(k) for k in gone]
            if key not in self._here:
                folder = Path(tempfile.mkdtemp(prefix="visitor-", dir=self.stage.folder))
                self._here[key] = Visitor(self.stage, folder.name, folder, now)
            visitor = self._here[key]
            visitor.seen = now
        for other in left:
            other.leave()
        return visitor

    def leave(self, key: str | None) -> None:
        """Forget a session."""
        with self._lock:
            visitor = self._here.pop(key or "", None)
        if visitor is not None:
            visitor.leave()

    def close(self) -> None:
        """Let everybody leave, and nobody come."""
        with self._lock:
            self._closed = True
            here, self._here = list(self._here.values()), {}
        for visitor in here:
            visitor.leave()

    def __len__(self) -> int:
        return len(self._here)
