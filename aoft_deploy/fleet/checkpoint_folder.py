"""A folder of checkpoints as a store of tasks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from aoft_deploy.errors import CheckpointError, SettingError, UnknownNameError
from aoft_deploy.fleet.name_index import NameIndex
from aoft_deploy.fleet.task import TaskKind, TaskParameters, read_task

__all__ = ["CheckpointFolder"]


class CheckpointFolder:
    """The checkpoints ``NAME.ckpt`` and ``NAME/model.ckpt`` of a folder.

    Nothing is read before it is asked for, so opening takes no time, and a checkpoint that comes
    into the folder later is there at once.

    Attributes:
        path: The folder.
        kind: What its tasks must be.

    Args:
        path: As the attribute.
        kind: As the attribute, such as ``Fleet.kind``.

    Raises:
        CheckpointError: There is no such folder.
    """

    def __init__(self, path: Path, kind: TaskKind) -> None:
        self.path, self.kind = Path(path), kind
        if not self.path.is_dir():
            raise CheckpointError(f"There is no folder {path}.")

    @property
    def names(self) -> NameIndex:
        """Names of the tasks that are there now.

        Raises:
            SettingError: Two checkpoints give the same name.
        """
        return NameIndex.of(self._listed())

    def __contains__(self, name: str) -> bool:
        return bool(self._found(name))

    def read(self, name: str) -> TaskParameters:
        """A task's numbers.

        Raises:
            UnknownNameError: There is no such task.
            SettingError: Two checkpoints have the name.
            CheckpointError: The file is damaged or of another kind.
        """
        found = self._found(name)
        if not found:
            raise UnknownNameError("task", name, self.names.closest(name))
        if len(found) > 1:
            raise SettingError(f"Two tasks are called {name!r}, {found[0]} and {found[1]}.")
        return read_task(found[0], self.kind)

    def _found(self, name: str) -> list[Path]:
        """Files of that name; a name that would lead out of the folder has none."""
        if name in ("", ".", "..") or {"/", "\0", os.sep} & set(name):
            return []
        both = [self.path / name / "model.ckpt"]
        if name != "model":
            both.insert(0, self.path / f"{name}.ckpt")
        return [path for path in both if os.path.isfile(path)]  # also of names too long to exist

    def _listed(self) -> Iterator[str]:
        with os.scandir(self.path) as entries:
            for entry in entries:
                if entry.name.endswith(".ckpt") and entry.name != "model.ckpt" and entry.is_file():
                    yield entry.name.removesuffix(".ckpt")
                elif entry.is_dir() and os.path.isfile(os.path.join(entry.path, "model.ckpt")):
                    yield entry.name
