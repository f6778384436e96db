"""Task names derived from the paths of checkpoints. Imports neither torch nor timm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from aoft_deploy.errors import SettingError
from aoft_deploy.path_kinds import CHECKPOINT

__all__ = ["task_name", "unique_task_names"]


def task_name(checkpoint: Path) -> str:
    """The name of a checkpoint's task.

    Returns:
        The file's name without its suffix, or the folder's name for ``model.ckpt`` and for the
        folder of a training run.
    """
    if (checkpoint / CHECKPOINT).is_file():
        return checkpoint.resolve().name
    return checkpoint.resolve().parent.name if checkpoint.name == CHECKPOINT else checkpoint.stem


def unique_task_names(checkpoints: Sequence[Path]) -> list[str]:
    """The names of several checkpoints' tasks, in the same order.

    Raises:
        SettingError: Two tasks have the same name.
    """
    names = [task_name(path) for path in checkpoints]
    for name in names:
        if names.count(name) > 1:
            raise SettingError(
                f"Two tasks are called {name!r}: rename one's file, or its folder if the file is "
                "model.ckpt."
            )
    return names
