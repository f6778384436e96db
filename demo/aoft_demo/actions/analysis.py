"""Analysis of a tuned task: angles between vectors, and the size of each layer's update."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from aoft_demo.tasks.session import Session
from aoft_demo.tasks.shared_fleet import BUNDLED, checkpoint_of

__all__ = ["Family", "TaskAnalysis", "analyse_task", "lora_angles"]


@dataclass(frozen=True)
class Family:
    """Angles between the vectors of a kind of matrix.

    Attributes:
        name: Name of the vectors, such as ``backbone, rows``.
        pairs: Number of angles.
        mean: Mean in degrees.
        sd: Standard deviation in degrees.
        farthest: Largest deviation from 90 degrees.
        counts: Histogram in equal bins from 0 to 180 degrees.
    """

    name: str
    pairs: int
    mean: float
    sd: float
    farthest: float
    counts: tuple[int, ...]

    @property
    def near(self) -> float:
        """Share of the angles within 5 degrees of a right angle, 0 to 1."""
        width, bins = 180 / len(self.counts), range(len(self.counts))
        near = sum(self.counts[i] for i in bins if abs((i + 0.5) * width - 90) < 5)
        return near / (sum(self.counts) or 1)


@dataclass(frozen=True)
class TaskAnalysis:
    """Angles and update sizes of a task.

    Attributes:
        families: Angles of the backbone, of the method, and of a LoRA for comparison.
        layers: Block and role of each changed layer, with ‖ΔW‖₂ / ‖W‖₂.
        unchanged: Number of layers that training did not change.
        method: Name of the method.
        notes: Sentences about quantities that do not exist for the method.
        lora: About the LoRA for comparison, such as ``rank 8, trained on digits``; empty without.
    """

    families: tuple[Family, ...]
    layers: tuple[tuple[str, str, float], ...]
    unchanged: int
    method: str
    notes: tuple[str, ...]
    lora: str = ""


def analyse_task(session: Session, name: str) -> TaskAnalysis:
    """Analyse a task's checkpoint.

    Raises:
        AoftError: The task has no checkpoint, it was removed in the meantime, or its method changes
            nothing that can be analysed.
    """
    with session.using(name) as task:
        path = checkpoint_of(task, name)
        analysis = _analysis(path, path.stat().st_mtime_ns, session.shared.weights)
    angles, method = analysis["angles"], str(analysis["method"])
    kinds = [kind for kind in ("down", "up", "prompts") if kind in angles]
    families = [_family(f"backbone, {kind}", angles[kind]) for kind in ("rows", "columns")]
    families += [_family(f"{method}, {kind}", angles[kind]) for kind in kinds]
    lora, about = lora_angles(), ""
    if method != "lora" and any(kind in lora for kind in kinds):
        families += [_family(f"LoRA, {kind}", lora[kind]) for kind in kinds if kind in lora]
        about = _about_lora()
    layers = tuple(
        (layer["block"], layer["role"], float(layer["change_ratio"]))
        for layer in analysis["layers"]
        if layer["change_ratio"] is not None
    )
    notes = tuple(note for note in analysis["notes"] if "metrics.jsonl" not in note)
    unchanged = len(analysis["layers"]) - len(layers)
    return TaskAnalysis(tuple(families), layers, unchanged, method, notes, about)


def lora_angles() -> Mapping[str, Any]:
    """Angles of a LoRA on one of the tasks, by kind of matrix; see tools/demo_skills.py."""
    return dict(_lora()["angles"])


def _about_lora() -> str:
    return f"rank {_lora()['rank']}, trained on {_lora()['task']}"


@lru_cache(maxsize=1)
def _lora() -> Mapping[str, Any]:
    content: Mapping[str, Any] = json.loads((BUNDLED / "lora_angles.json").read_text("utf-8"))
    return content


@lru_cache(maxsize=32)
def _analysis(path: Path, modified_ns: int, weights: Path | None) -> dict[str, Any]:
    """The library's analysis of a file; the time of the last change is part of the cache key."""
    from aoft_deploy.training.analysis.quantities import analyse_file

    return analyse_file(path, weights=weights)


def _family(name: str, angles: Mapping[str, Any]) -> Family:
    return Family(
        name=name,
        pairs=angles["pairs"],
        mean=angles["mean"],
        sd=angles["sd"],
        farthest=angles["farthest_from_90"],
        counts=tuple(angles["counts"]),
    )
