"""Check a batch against the inputs of an artefact."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.errors import SettingError

__all__ = ["check_batch"]


def check_batch(
    images: NDArray[Any],
    task: NDArray[np.int64] | None,
    *,
    takes: tuple[Any, tuple[int | None, ...]],
    tasks: int | None,
) -> None:
    """Check that an artefact accepts a batch.

    Args:
        images: The batch.
        task: Index of each image's task; None if the artefact holds a single task.
        takes: Type and shape of an image. A length of None accepts any length.
        tasks: Number of tasks of a fleet; None if the artefact holds a single task.

    Raises:
        SettingError: The artefact does not accept the batch.
    """
    dtype, shape = np.dtype(takes[0]), takes[1]
    fits = len(images.shape) == len(shape) + 1 and all(
        expected in (None, length) for length, expected in zip(images.shape[1:], shape, strict=True)
    )
    if images.dtype != dtype or not fits or not len(images):
        lengths = ", ".join("any" if length is None else str(length) for length in shape)
        raise SettingError(
            f"This artefact takes {dtype} [batch, {lengths}], but got {images.dtype} "
            f"{list(images.shape)}."
        )
    if (task is not None) is not (tasks is not None):
        reason = "needs a task for each image" if tasks is not None else "holds a single task"
        raise SettingError(f"This artefact {reason}.")
    if task is None or tasks is None:
        return
    if len(task) != len(images) or ((task < 0) | (task >= tasks)).any():
        raise SettingError(
            f"Tasks {task.tolist()[:8]} for {len(images)} images: give one from 0 to {tasks - 1} "
            "for each."
        )
