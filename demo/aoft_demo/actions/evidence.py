"""The project's measurements, read from benchmarks/results."""

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
"""Student's factor of a 95 % interval, by number of values."""


@dataclass(frozen=True)
class Accuracy:
    """A method on digits at 32 pixels, see benchmarks/accuracy/methods.py.

    Attributes:
        method: Its name.
        mean: Test accuracy, 0 to 1, over the seeds.
        half: Half of its 95 % interval.
        parameters: Numbers trained beside the classifier.
        seeds: How many.
    """

    method: str
    mean: float
    half: float
    parameters: int
    seeds: int


@dataclass(frozen=True)
class Speed:
    """A way to run ViT-B/16 on two CPU cores.

    Attributes:
        name: What ran.
        ratio: Its throughput over that of what it is compared with.
        against: What that is.
        batch: Images in a batch.
    """

    name: str
    ratio: float
    against: str
    batch: int


def results_folder() -> Path | None:
    """Where the results are: beside this file when installed, else in the checkout."""
    here = Path(__file__).parents[1]
    for folder in (here / "results", here.parents[1] / "benchmarks" / "results"):
        if (folder / "methods.jsonl").is_file():
            return folder
    return None


def accuracies() -> list[Accuracy]:
    """Every method's accuracy, each seed with the rate that its validation images chose."""
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
    """The factor that did best on seed 0's validation images, over all seeds."""
    best = max(seeds[0], key=lambda line: (line["val"], -line["val_loss"]))
    same = [ls for lines in seeds.values() for ls in lines if ls["factor"] == best["factor"]]
    values = [line["test"] for line in same]
    half = 0.0
    if len(values) > 1:
        half = T95.get(len(values), 1.96) * statistics.stdev(values) / math.sqrt(len(values))
    return Accuracy(name, statistics.fmean(values), half, best["parameters"], len(values))


def speeds() -> list[Speed]:
    """Throughputs of engines at their largest batch, and of a fleet; empty if there are none."""
    folder = results_folder()
    try:
        return [] if folder is None else [*_engines(folder), *_fleets(folder)]
    except (OSError, ValueError, KeyError, TypeError):
        return []  # of another version of the benchmarks; the page opens without them


def _engines(folder: Path) -> list[Speed]:
    rows = json.loads((folder / "engines.json").read_text("utf-8"))["rows"]
    most = max(row["batch"] for row in rows)
    largest = [row for row in rows if row["batch"] == most]
    against = next(row["name"] for row in largest if row["ratio"] == 1)
    return [Speed(row["name"], row["ratio"], against, most) for row in largest]


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
