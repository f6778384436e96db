"""Loading a data set by name: an offline task, or a folder of images."""

from __future__ import annotations

from pathlib import Path

from aoft_deploy.data.folder import load_folder
from aoft_deploy.data.splits import Splits
from aoft_deploy.data.synthetic import load_task, task_names
from aoft_deploy.errors import UnknownNameError

__all__ = ["load_data"]


def load_data(source: str, *, seed: int = 0) -> Splits:
    """Load an offline task by its name, or an image folder by its path.

    Args:
        source: One of :func:`aoft_deploy.data.task_names`, or a path. Write a folder that has the
            name of a task as ``./name``.
        seed: Seed of the task, or of the split if the folder has none.

    Raises:
        UnknownNameError: A single word that is neither a task nor a path that exists.
        DataError: As for :func:`load_folder`.
    """
    if source in task_names():
        return load_task(source, seed=seed)
    path = Path(source)
    if path.name == source and not path.exists():
        folders = (p.name for p in Path().glob("[!.]*") if p.is_dir())
        raise UnknownNameError("folder or task", source, {*task_names(), *folders})
    return load_folder(path, seed=seed)
