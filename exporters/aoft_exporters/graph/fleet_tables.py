"""Names of a fleet graph's tables, and batches of a fleet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["FLEET_TABLES", "fleet_logits"]

FLEET_TABLES = {
    "bank": "tasks",
    "heads": "rows",
    "first": "tasks",
    "count": "tasks",
    "columns": "classes",
}
"""Tables of a fleet's tasks, each with the name of its first axis."""


def fleet_logits(
    run: Callable[[NDArray[Any], NDArray[np.int64]], NDArray[np.float32]],
    images: NDArray[Any],
    task: NDArray[np.int64],
    info: Mapping[str, str],
) -> NDArray[np.float32]:
    """Logits of a batch; a graph of the folded form computes one task at a time.

    Args:
        run: Computes the logits of images and their tasks.
        images: The batch.
        task: The task of each image, int64 [batch].
        info: The fleet's metadata.
    """
    if info.get("form") != "folded" or (task == task[:1]).all():
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
