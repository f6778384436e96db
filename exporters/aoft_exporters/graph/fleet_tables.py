"""Names of a fleet graph's tables, and the logits of a folded fleet task by task."""

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
"""What a fleet knows of its tasks, and what the first axis of each table counts."""


def folded_logits(
    answer: Any, images: NDArray[Any], task: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Logits of a graph that folds one task at a time, which gets the images task by task."""
    if (task == task[:1]).all():
        whole: NDArray[np.float32] = answer(images, task)
        return whole
    logits: NDArray[np.float32] | None = None
    for each in np.unique(task):
        chosen = np.flatnonzero(task == each)
        part = answer(images[chosen], task[chosen])
        if logits is None:
            logits = np.empty((len(task), part.shape[1]), np.float32)
        logits[chosen] = part
    assert logits is not None
    return logits
