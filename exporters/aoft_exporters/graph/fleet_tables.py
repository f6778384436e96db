"""Names of a fleet graph's tables, and batches of a folded fleet."""

from __future__ import annotations

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
    answer: Any, images: NDArray[Any], task: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Logits of a batch from a graph that folds one task at a time: one call for each task."""
    if (task == task[:1]).all():
        full: NDArray[np.float32] = answer(images, task)
        return full
    logits: NDArray[np.float32] | None = None
    for each in np.unique(task):
        rows = np.flatnonzero(task == each)
        part = answer(images[rows], task[rows])
        if logits is None:
            logits = np.empty((len(task), part.shape[1]), np.float32)
        logits[rows] = part
    assert logits is not None
    return logits
