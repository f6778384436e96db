"""A data set by what a user names: an offline task, or a folder of images."""

from __future__ import annotations

from pathlib import Path

from aoft_deploy.data.folder import load_folder
from aoft_deploy.data.splits import Splits
from aoft_deploy.errors import UnknownNameError

__all__ = ["load_data"]


def load_data(source: str, *, seed: int = 0) -> Splits:
    """Load what a user names: an offline task, or an image folder.

    Args:
        source: A name of :func:`aoft_deploy.data.task_names`, or else a path. To use a folder
            that bears the name of a task, write it as ``./name``.
        seed: Seed of the task, or of the split where the folder has none.

    Raises:
        UnknownNameError: Neither a task nor a path that exists.
        DataError: As for :func:`load_folder`.
    """
    from aoft_deploy.data import synthetic  # which builds on this module

    if source in synthetic.task_names():
        return synthetic.load_task(source, seed=seed)
    if not Path(source).exists():
        raise UnknownNameError("folder or task", source, synthetic.task_names())
    return load_folder(Path(source), seed=seed)
