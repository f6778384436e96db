"""Training in the page: pictures to a folder, ``aoft-train`` in a process, its metrics."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aoft_demo.actions.classify import read_picture
from aoft_demo.tasks.shared_fleet import Stage
from aoft_demo.tasks.training_queue import Training
from aoft_demo.tasks.visitors import task_name
from aoft_deploy.data.folder import load_folder, write_folder
from aoft_deploy.data.folder_structure import part_of
from aoft_deploy.data.synthetic import load_task
from aoft_deploy.errors import DataError, SettingError

__all__ = ["EFFORTS", "Step", "plan", "run", "write_pictures", "write_task"]

EFFORTS = {"quick": 1500, "normal": 4000}
"""Pictures that training looks at in all, each time that it looks counted."""

LEAST, MOST = 3, 200
"""Pictures of a class."""

SECONDS = 600
"""After which a training is stopped."""

STORED = 512
"""Longest side of a stored picture."""


@dataclass(frozen=True)
class Step:
    """Where a training stands.

    Attributes:
        epochs: In all.
        lines: Metrics of the finished epochs, as metrics.jsonl has them.
        test: Accuracy on the pictures kept for the test, at the end.
        checkpoint: At the end.
        seconds: Since the start.
    """

    epochs: int
    lines: tuple[Mapping[str, Any], ...]
    test: float | None
    checkpoint: Path | None
    seconds: float


def write_task(name: str, images: int, seed: int, root: Path) -> None:
    """An offline task's pictures as a folder.

    Raises:
        UnknownNameError: There is no such task.
    """
    held_out = max(images // 5, 30)
    write_folder(load_task(name, seed=seed, train=images, val=held_out, test=held_out), root)


def write_pictures(
    groups: Sequence[tuple[str, Sequence[Path]]],
    root: Path,
    before_each: Callable[[], None] = lambda: None,
) -> None:
    """Uploaded pictures as a folder with a subfolder for each class.

    Args:
        groups: Name and pictures of each class; those with neither are left out.
        root: The folder, which is made.
        before_each: Called before each picture is read; what it raises ends the writing.

    Raises:
        SettingError: A class has no name, two have the same, or they are called after parts of a
            data set, such as train and test.
        DataError: There are fewer than two classes, or too few or too many pictures of one.
        ImageError: A picture cannot be used.
    """
    given = [(name, files) for name, files in groups if name.strip() or files]
    names = [_class_name(name, number) for number, (name, _) in enumerate(given, 1)]
    for name in names:
        if names.count(name) > 1:
            raise SettingError(f"Two classes are called {name!r}: rename one.")
    parts = {part_of(name): name for name in names if part_of(name)}
    if len(parts) > 1:
        raise SettingError(
            f"Classes called {' and '.join(map(repr, parts.values()))} look like parts of a data "
            "set: rename them, or give the pictures of each class together."
        )
    if len(given) < 2:
        raise DataError("A task needs two classes at least: name them and add pictures of each.")
    for name, (_, files) in zip(names, given, strict=True):
        if not LEAST <= len(files) <= MOST:
            raise DataError(
                f"Class {name!r} has {len(files)} pictures: give {LEAST} to {MOST} of each class."
            )
    for name, (_, files) in zip(names, given, strict=True):
        (root / name).mkdir(parents=True)
        for number, file in enumerate(files):
            before_each()
            image = read_picture(file, STORED).image
            image.thumbnail((STORED, STORED))
            image.save(root / name / f"{number:03}.png")


def _class_name(text: str, number: int) -> str:
    if not text.strip():
        raise SettingError(f"Class {number} has pictures but no name: type one.")
    return task_name(text)


def plan(stage: Stage, data: Path, out: Path, effort: str, seed: int = 0) -> tuple[list[str], int]:
    """The command that trains a task for the stage's fleet, and its number of epochs.

    Raises:
        DataError: The pictures cannot be split.
        SettingError: Such tasks cannot be trained here.
    """
    if not stage.backbone:
        raise SettingError(
            "The fleet's manifest is missing, so its backbone's name is not known: start aoft-demo "
            "with the fleet's checkpoints instead."
        )
    kind = stage.fleet.kind
    train = len(load_folder(data, seed=seed).train)
    batch = 8 if train < 100 else 16 if train < 300 else 32
    epochs = min(max(math.ceil(EFFORTS[effort] / train), 3), 40)
    words: list[object] = ["--data", data, "--out", out, "--method", kind.method]
    words += ["--backbone", stage.backbone["name"], "--seed", seed, "--quiet"]
    words += ["--epochs", epochs, "--batch-size", batch]
    for name, value in kind.settings.items():
        words += ["--set", f"{name}={json.dumps(value)}"]
    if "img_size" in stage.backbone.get("args", {}):
        words += ["--img-size", stage.backbone["args"]["img_size"]]
    if stage.weights is not None:
        words += ["--backbone-weights", stage.weights]
    return [str(word) for word in words], epochs


def run(arguments: Sequence[str], out: Path, epochs: int, training: Training) -> Iterator[Step]:
    """Train, and say where it stands whenever that changes.

    Args:
        arguments: Of aoft-train.
        out: Its folder for results.
        epochs: How many it will do.
        training: Whose process it becomes; anyone may stop it.

    Raises:
        SettingError: It failed, was stopped, or took too long; the sentence says why.
    """
    log, start, told = out.parent / "train.log", time.monotonic(), -1
    training.start([sys.executable, "-m", "aoft_deploy.cli.train", *arguments], log)
    try:
        while True:
            code = training.wait(0.25)
            training.go_on()
            seconds = time.monotonic() - start
            if code:
                raise SettingError(_reason(log.read_text("utf-8", "replace")))
            lines = _metrics(out / "metrics.jsonl")
            if code == 0:
                fitted, test = lines[:-1], lines[-1].get("test_accuracy")
                yield Step(epochs, tuple(fitted), test, out / "model.ckpt", seconds)
                return
            if seconds > SECONDS:
                raise SettingError(
                    f"Training took longer than {SECONDS} s and was ended: use fewer pictures."
                )
            if len(lines) != told:
                told = len(lines)
                fitted = [line for line in lines if "lr" in line]
                yield Step(epochs, tuple(fitted), None, None, seconds)
    finally:
        training.stop()


def _metrics(path: Path) -> list[dict[str, Any]]:
    """Whole lines of the metrics so far."""
    if not path.is_file():
        return []
    lines = path.read_text("utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _reason(log: str) -> str:
    """The command's own sentence, or the end of what it said."""
    errors = [line for line in log.splitlines() if line.startswith("error: ")]
    last = errors[-1].removeprefix("error: ") if errors else "its process ended early."
    return f"Training failed: {last}"
