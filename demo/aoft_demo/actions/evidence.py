"""Measured results of the project, read from benchmarks/results."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Accuracy", "Speed", "accuracies", "results_folder", "speeds"]

T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Factor of Student's t for a 95 % confidence interval, by number of values."""


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of a method on digits at 32 pixels; see benchmarks/accuracy/methods.py.

    Attributes:
        method: Name of the method.
        mean: Mean test accuracy over the seeds, 0 to 1.
        margin: Half width of the 95 % confidence interval.
        parameters: Number of trained parameters, without the classifier.
        seeds: Number of seeds.
    """

    method: str
    mean: float
    margin: float
    parameters: int
    seeds: int


@dataclass(frozen=True)
class Speed:
    """Throughput of ViT-B/16 on two CPU cores, relative to a baseline.

    Attributes:
        name: What was measured, such as ``OpenVINO bf16``.
        ratio: Throughput divided by that of the baseline.
        baseline: Name of the baseline.
        batch: Batch size.
    """

    name: str
    ratio: float
    baseline: str
    batch: int


def results_folder() -> Path | None:
    """Folder of the results: in the installed package, else in the checkout; None if missing."""
    package = Path(__file__).parents[1]
    for folder in (package / "results", package.parents[1] / "benchmarks" / "results"):
        if (folder / "methods.jsonl").is_file():
            return folder
    return None


def accuracies() -> list[Accuracy]:
    """Accuracy of every method; empty if there are no results."""
    folder = results_folder()
    if folder is None:
        return []
    runs: dict[str, dict[int, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for text in (folder / "methods.jsonl").read_text("utf-8").splitlines():
        line = json.loads(text)
        if line["task"] != "digits":
            continue
        runs[line["variant"]][line["seed"]].append(line)
    return [_accuracy(name, seeds) for name, seeds in runs.items()]


def _accuracy(name: str, seeds: dict[int, list[dict[str, Any]]]) -> Accuracy:
    """Accuracy over all seeds, at the learning-rate factor that validated best on seed 0."""
    best = max(seeds[0], key=lambda line: (line["val"], -line["val_loss"]))
    lines = [line for lines in seeds.values() for line in lines]
    values = [line["test"] for line in lines if line["factor"] == best["factor"]]
    margin = 0.0
    if len(values) > 1:
        margin = T95.get(len(values), 1.96) * statistics.stdev(values) / math.sqrt(len(values))
    return Accuracy(name, statistics.fmean(values), margin, best["parameters"], len(values))


def speeds() -> list[Speed]:
    """Throughput of engines at the largest batch, and of fleets; empty if there are no results."""
    folder = results_folder()
    try:
        return [] if folder is None else [*_engines(folder), *_fleets(folder)]
    except (OSError, ValueError, KeyError, TypeError):
        return []  # the files have another format; the page works without them


def _engines(folder: Path) -> list[Speed]:
    rows = json.loads((folder / "engines.json").read_text("utf-8"))["rows"]
    batch = max(row["batch"] for row in rows)
    rows = [row for row in rows if row["batch"] == batch]
    baseline = next(row["name"] for row in rows if row["ratio"] == 1)
    return [Speed(row["name"], row["ratio"], baseline, batch) for row in rows]


def _fleets(folder: Path) -> list[Speed]:
    rows = json.loads((folder / "fleet_16.json").read_text("utf-8"))["rows"]
    return [
        Speed(
            f"{row['variant']}, {row['tasks']} tasks",
            row["of merged"],
            "its merged model",
            row["batch"],
        )
        for row in rows
        if row["variant"] in ("fleet", "fleet int8")
    ]
