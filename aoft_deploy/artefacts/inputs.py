"""Check of a batch against the inputs of an artefact."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.errors import SettingError

if TYPE_CHECKING:
    pass

__all__ = ["check_batch"]


def check_batch(
    images: NDArray[Any],
    task: NDArray[np.int64] | None,
    *,
    takes: tuple[Any, tuple[int | None, ...]],
    tasks: int | None,
) -> None:
    """Whether a batch is what an artefact takes.

    Args:
        images: The batch.
        task: A task for each image.
        takes: Type of the images, and their shape without the batch; None where any length goes.
        tasks: How many the artefact has; None if it is a single model.

    Raises:
        SettingError: It is not.
    """
    dtype, shape = np.dtype(takes[0]), takes[1]
    fits = len(images.shape) == len(shape) + 1 and all(
        theirs in (None, ours) for ours, theirs in zip(images.shape[1:], shape, strict=True)
    )
    if images.dtype != dtype or not fits or not len(images):
        sides = ", ".join("any" if side is None else str(side) for side in shape)
        raise SettingError(
            f"This artefact takes {dtype} [batch, {sides}], but got {images.dtype} "
            f"{list(images.shape)}."
        )
    if (task is not None) is not (tasks is not None):
        missing = "needs a task for each image" if tasks is not None else "holds a single task"
        raise SettingError(f"This artefact {missing}.")
    if task is None or tasks is None:
        return
    if len(task) != len(images) or ((task < 0) | (task >= tasks)).any():
        raise SettingError(
            f"Tasks {task.tolist()[:8]} for {len(images)} images: give one from 0 to {tasks - 1} "
            "for each."
        )
