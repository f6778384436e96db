"""A live fleet: tasks come and go while requests run, on one graph and one backbone.

The graph of ``aoft-export --fleet`` takes the tasks' numbers as tables. Here the tables are memory
of this process that the runtime reads in place: adding a task writes one row, removing it frees the
row, switching to it is an index. A store on disk may hold more tasks than memory does. Needs
neither torch nor timm.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.artefacts.manifest import unchanged
from aoft_deploy.artefacts.registry import load_fleet
from aoft_deploy.checkpoints.names import task_name
from aoft_deploy.data.preprocessing import Preprocessing
from aoft_deploy.errors import CheckpointError, SettingError
from aoft_deploy.fleet.opening import open_store
from aoft_deploy.fleet.resident_tasks import ResidentTasks
from aoft_deploy.fleet.slots import Residency
from aoft_deploy.fleet.store import TaskStore
from aoft_deploy.fleet.tables import TaskTables
from aoft_deploy.fleet.task import TaskKind, TaskParameters, read_task

__all__ = ["Fleet", "TaskAnswer"]


class TaskAnswer(NamedTuple):
    """A task's answer about one image; both fields are of the same version of the task.

    Attributes:
        logits: (classes,).
        classes: Names of the classes, in the order of the logits.
    """

    logits: NDArray[np.float32]
    classes: tuple[str, ...]


class Fleet:
    """Many tasks on one backbone, each image of a batch answered by its own.

    All methods may be called from any thread. An image is answered by what its task's name meant at
    some moment of the request; no request that begins after ``remove`` returns is answered by the
    removed task.

    Tasks of the store are read when a request asks for them, and the least recently used of them
    leave memory for others when the budget is full. Tasks of the fleet's file and added ones stay
    until they are removed, and come before those of the same name in the store.

    Attributes:
        kind: What its tasks share: backbone, method, settings, preprocessing.
        preprocessing: How an image becomes a row of ``pixel_values``, the same for all tasks.

    Args:
        path: What ``aoft-export --fleet`` wrote; its tasks are there from the start.
        store: More tasks: a folder of checkpoints, a file of ``pack``, or any ``TaskStore``.
        budget: Bytes that the numbers of tasks may take in memory; None: as much as the machine
            has. Memory is used as tasks come, and given back as they go.
        threads: Threads within an operator; None lets the runtime choose.

    Raises:
        CheckpointError: The file is no fleet, or the store cannot be used or is of another kind.
        SettingError: The file's own tasks exceed the budget.
    """

    def __init__(
        self,
        path: Path,
        *,
        store: Path | str | TaskStore | None = None,
        budget: int | None = None,
        threads: int | None = None,
    ) -> None:
        self._engine = load_fleet(Path(path), threads=threads)
        tables, self._engine.tables = self._engine.tables, {}
        try:
            named = json.loads(self._engine.info["tasks"])
            names = [str(task["name"]) for task in named]
            classes = [tuple(map(str, task["classes"])) for task in named]
            self.kind = TaskKind.of_fleet(self._engine.info, tables["heads"].shape[1] - 1)
            last = tables["first"] + tables["count"]
            heads = [tables["heads"][i:j] for i, j in zip(tables["first"], last, strict=True)]
            numbers = map(TaskParameters, tables["bank"], heads, classes)
            own = list(zip(names, numbers, strict=True))
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is no fleet of aoft-export ({error}).") from error
        for name, task in own:
            self.kind.check_parameters(name, task)
        self.preprocessing = Preprocessing.from_dict(self.kind.preprocessing)
        if isinstance(store, str | Path):
            store = open_store(Path(store), self.kind)
        elif store is not None:
            self.kind.check_kind(store, store.kind)
        if budget is None:
            budget = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        self._tables = TaskTables(self.kind.row_length, self.kind.width, budget)
        self._tasks = ResidentTasks(self._tables, store, own)

    @property
    def tasks(self) -> dict[str, tuple[str, ...]]:
        """Names of the tasks in memory and their classes."""
        return self._tasks.resident

    @property
    def names(self) -> set[str]:
        """Names of all tasks, in memory and in the store; may take a while."""
        return self._tasks.names

    def __contains__(self, name: str) -> bool:
        """Whether there is such a task, in memory or in the store; quick."""
        return self._tasks.knows(name)

    @property
    def residency(self) -> Residency:
        """What is in memory, and how often requests found their tasks there."""
        return self._tasks.residency

    def classes(self, name: str) -> tuple[str, ...]:
        """Classes of a task in memory or in the store, in the order of its logits.

        Raises:
            UnknownNameError: There is no such task.
            CheckpointError: The store cannot give them.
        """
        return self._tasks.classes(name)

    def add(self, checkpoint: Path | str, name: str | None = None, *, replace: bool = False) -> str:
        """Take a task in, from its ``model.ckpt``; it stays in memory until it is removed.

        Args:
            checkpoint: Trained on the fleet's backbone, with its method, settings and
                preprocessing.
            name: What to call it; None takes the file's name, or its folder's for ``model.ckpt``.
            replace: Whether it may take the place of a task of that name, at one moment: every
                request is answered by the one or by the other.

        Returns:
            The task's name.

        Raises:
            CheckpointError: The file is damaged, does not belong to this fleet, or is written
                meanwhile.
            SettingError: A task of that name is there already, also in the store, or the tasks
                added leave no room for it in the budget.
        """
        path = Path(checkpoint)
        name = task_name(path) if name is None else name
        with unchanged(path):
            numbers = read_task(path, self.kind)
        self._tasks.add(name, numbers, replace=replace)
        return name

    def remove(self, name: str) -> None:
        """Let a task go. Its room is used again when the requests under way have ended.

        A task of the store stays there, but this fleet does not answer by it any more.

        Raises:
            UnknownNameError: There is no such task.
        """
        self._tasks.remove(name)

    def prefetch(self, names: Sequence[str]) -> None:
        """Find tasks, and read those that are not in memory: all that a request does beforehand.

        Args:
            names: Of tasks; where the budget has no room for all of them, the last ones stay.

        Raises:
            UnknownNameError: There is no such task.
            CheckpointError: The store cannot give a task's numbers.
            SettingError: The tasks added leave no room for one of the store.
        """
        rest = list(dict.fromkeys(names))
        while rest:
            with self._tasks.holding(rest) as slots:
                rest = [name for name in rest if name not in slots]

    def predict(
        self, images: NDArray[np.float32], tasks: Sequence[str], *, rows: int | None = None
    ) -> list[TaskAnswer]:
        """Logits of each image by its own task, with the names of their classes.

        All images of a task are answered by one version of it, also if it is replaced meanwhile.
        A batch of more tasks than the budget has room for runs in parts, as many tasks at a time as
        there is room for beside those of other requests.

        Args:
            images: Normalised, float32 (batch, 3, H, W).
            tasks: Name of each image's task.
            rows: Most images that the engine computes at once; None: all.

        Returns:
            The answer about each image.

        Raises:
            UnknownNameError: There is no such task, or it was removed before its numbers were
                read.
            CheckpointError: The store cannot give a task's numbers.
            SettingError: Numbers of images and tasks differ, the images have another shape, or the
                tasks added leave no room for one of the store.
        """
        size = self.preprocessing.size
        if images.shape != (len(tasks), 3, size, size):
            raise SettingError(
                f"Images of shape {images.shape} for {len(tasks)} tasks: give "
                f"({len(tasks)}, 3, {size}, {size})."
            )
        answers: dict[int, TaskAnswer] = {}
        names = list(dict.fromkeys(tasks))
        while names:
            with self._tasks.holding(names) as held:
                part = [i for i, name in enumerate(tasks) if name in held]
                for start in range(0, len(part), rows or len(part)):
                    some = part[start : start + (rows or len(part))]
                    logits = self._logits(images, some, [held[tasks[i]].slot for i in some])
                    for i, row in zip(some, logits, strict=True):
                        classes = held[tasks[i]].classes
                        answers[i] = TaskAnswer(row[: len(classes)], classes)
            names = [name for name in names if name not in held]
        return [answers[i] for i in range(len(tasks))]

    def _logits(
        self, images: NDArray[np.float32], chosen: list[int], slots: list[int]
    ) -> NDArray[np.float32]:
        """Logits of the chosen images by the tasks in these slots, −inf beyond their classes."""
        some = images if len(chosen) == len(images) else images[chosen]
        task = np.array(slots, np.int64)
        columns = np.arange(self._tables.count[task].max(), dtype=np.int64)
        tables = self._tables.arrays | {"columns": columns}
        logits: NDArray[np.float32] = self._engine.run(some, task, tables)
        return logits
