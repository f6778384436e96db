"""What a classifier's outputs mean, from the config.json that transformers writes."""

from __future__ import annotations

import json
from pathlib import Path

from aoft_deploy.classes import Classes
from aoft_deploy.errors import CheckpointError

__all__ = ["outputs"]

CONFIG = "config.json"

ACTIVATIONS = {
    "single_label_classification": "softmax",
    "multi_label_classification": "sigmoid",
    "regression": "none",
}
"""The activation of each ``problem_type``."""


def outputs(folder: Path, count: int) -> Classes:
    """The names and the activation of a classifier's outputs.

    Args:
        folder: A PEFT folder, which may hold a config.json beside the adapter.
        count: Number of outputs.

    Returns:
        The names of ``id2label`` if there are as many, else ``"0"``, ``"1"`` …; the activation of
        ``problem_type``, else softmax.

    Raises:
        CheckpointError: The file is no JSON object, or its ``problem_type`` is unknown.
    """
    file = folder / CONFIG
    numbers = [str(i) for i in range(count)]
    if not file.is_file():
        return Classes(numbers)
    try:
        found = json.loads(file.read_text("utf-8"))
        labels, kind = dict(found.get("id2label") or {}), found.get("problem_type")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file} is no config of transformers ({error}).") from error
    if kind is not None and str(kind) not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise CheckpointError(f"{file} has the problem_type {kind!r}, but must have {known}.")
    names = [str(labels[n]) for n in numbers] if labels.keys() == set(numbers) else numbers
    return Classes(names, ACTIVATIONS.get(kind))
