"""Training of a task: ``aoft-train`` in a subprocess, followed through its metrics."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aoft_demo.tasks.shared_fleet import SharedFleet
from aoft_demo.tasks.training_queue import Training
from aoft_deploy.data.folder import load_folder
from aoft_deploy.errors import SettingError

__all__ = ["EFFORTS", "TrainingProgress", "run_training", "training_arguments"]

EFFORTS = {"quick": 1500, "normal": 4000}
"""Training pictures over all epochs: pictures times epochs."""

TIMEOUT = 600
"""Seconds after which a training is stopped."""


@dataclass(frozen=True)
class TrainingProgress:
    """State of a training.

    Attributes:
        epochs: Number of epochs in all.
        lines: Metrics of the finished epochs, as in metrics.jsonl.
        test: Accuracy on the test pictures; None before the end.
        checkpoint: The trained checkpoint; None before the end.
        seconds: Time since the start.
    """

    epochs: int
    lines: tuple[Mapping[str, Any], ...]
    test: float | None
    checkpoint: Path | None
    seconds: float


def training_arguments(
    shared: SharedFleet, data: Path, out: Path, effort: str, seed: int = 0
) -> tuple[list[str], int]:
    """Arguments of ``aoft-train`` for a task that fits the fleet.

    Args:
        shared: The fleet that the task will join.
        data: Folder of pictures.
        out: Folder for the results.
        effort: A key of ``EFFORTS``.
        seed: Seed of the training.

    Returns:
        The arguments and the number of epochs.

    Raises:
        DataError: The pictures cannot be split.
        SettingError: The fleet's backbone is unknown.
    """
    if not shared.backbone:
        raise SettingError(
            "The fleet's manifest is missing, so its backbone is unknown: start aoft-demo with the "
            "fleet's checkpoints instead."
        )
    kind = shared.fleet.kind
    train = len(load_folder(data, seed=seed).train)
    batch = 8 if train < 100 else 16 if train < 300 else 32
    epochs = min(max(math.ceil(EFFORTS[effort] / train), 3), 40)
    arguments: list[object] = ["--data", data, "--out", out, "--method", kind.method]
    arguments += ["--backbone", shared.backbone["name"], "--seed", seed, "--quiet"]
    arguments += ["--epochs", epochs, "--batch-size", batch]
    for name, value in kind.settings.items():
        arguments += ["--set", f"{name}={json.dumps(value)}"]
    if "img_size" in shared.backbone.get("args", {}):
        arguments += ["--img-size", shared.backbone["args"]["img_size"]]
    if shared.weights is not None:
        arguments += ["--backbone-weights", shared.weights]
    return [str(argument) for argument in arguments], epochs


def run_training(
    arguments: Sequence[str], out: Path, epochs: int, training: Training
) -> Iterator[TrainingProgress]:
    """Run ``aoft-train``; yield its progress after each epoch and at the end.

    Args:
        arguments: Arguments of ``aoft-train``.
        out: Its folder for results.
        epochs: Number of epochs.
        training: The training that owns the subprocess.

    Raises:
        SettingError: The training failed, was stopped, or took too long.
    """
    log, start, reported = out.parent / "train.log", time.monotonic(), -1
    training.start([sys.executable, "-m", "aoft_deploy.cli.train", *arguments], log)
    try:
        while True:
            code = training.wait(0.25)
            training.check_not_stopped()
            seconds = time.monotonic() - start
            if code:
                raise SettingError(_reason(log.read_text("utf-8", "replace")))
            lines = _metrics(out / "metrics.jsonl")
            if code == 0:
                *finished, last = lines
                test, checkpoint = last.get("test_accuracy"), out / "model.ckpt"
                yield TrainingProgress(epochs, tuple(finished), test, checkpoint, seconds)
                return
            if seconds > TIMEOUT:
                raise SettingError(
                    f"Training took longer than {TIMEOUT} s and was stopped: use fewer pictures."
                )
            if len(lines) != reported:
                reported = len(lines)
                finished = [line for line in lines if "lr" in line]
                yield TrainingProgress(epochs, tuple(finished), None, None, seconds)
    finally:
        training.stop()


def _metrics(path: Path) -> list[dict[str, Any]]:
    """Metrics so far; a line that is still being written is left out."""
    if not path.is_file():
        return []
    lines = path.read_text("utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _reason(log: str) -> str:
    """The error message of the command, or that it ended without one."""
    errors = [line for line in log.splitlines() if line.startswith("error: ")]
    last = errors[-1].removeprefix("error: ") if errors else "its process ended unexpectedly."
    return f"Training failed: {last}"
