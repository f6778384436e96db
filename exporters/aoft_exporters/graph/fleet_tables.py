"""Names of a fleet graph's tables, and batches of a folded fleet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["FLEET_TABLES", "folded_logits"]

FLEET_TABLES = {
    "bank": "tasks",
    "heads": "rows",
    "first": "tasks",
    "count": "tasks",
    "columns": "classes",
}
"""Tables of a fleet's tasks, each with the name of its first axis."""


def folded_logits(
    run: Callable[[NDArray[Any], NDArray[np.int64]], NDArray[np.float32]],
    images: NDArray[Any],
    task: NDArray[np.int64],
) -> NDArray[np.float32]:
    """Logits of a batch from a graph that folds one task at a time.

    Args:
        run: Computes the logits of images of one task.
        images: The batch.
        task: The task of each image, int64 [batch].
    """
    if (task == task[:1]).all():
        return run(images, task)
    logits: NDArray[np.float32] | None = None
    for each in np.unique(task):
        rows = np.flatnonzero(task == each)
        part = run(images[rows], task[rows])
        if logits is None:
            logits = np.empty((len(task), part.shape[1]), np.float32)
        logits[rows] = part
    assert logits is not None
    return logits
