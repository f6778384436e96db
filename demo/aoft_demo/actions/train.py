"""Training of a task: ``aoft-train`` in a subprocess, followed through its metrics."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aoft_demo.tasks.shared_fleet import SharedFleet
from aoft_demo.tasks.trainers import Trainers
from aoft_demo.tasks.training_queue import Training
from aoft_deploy.data.folder import load_folder
from aoft_deploy.errors import SettingError
from aoft_deploy.training.settings import TrainingSettings

__all__ = ["Plan", "TrainingProgress", "run_training", "training_plan"]

PICTURES_SEEN = 1200
"""Training pictures over all epochs: pictures times epochs."""

TIMEOUT = 600
"""Seconds after which a training is stopped."""

INTERVAL = 0.5
"""Seconds between two reports of a training's progress."""


@dataclass(frozen=True)
class Plan:
    """What ``aoft-train`` is to do.

    Attributes:
        settings: The hyper-parameters.
        train: Number of training pictures.
        val: Number of validation pictures.
        test: Number of test pictures; 0 if there are too few pictures for a test.
    """

    settings: TrainingSettings
    train: int
    val: int
    test: int

    def arguments(self, data: Path, out: Path) -> list[str]:
        """Arguments of ``aoft-train``.

        Args:
            data: Folder of pictures.
            out: Folder for the results.
        """
        chosen = self.settings
        arguments: list[object] = ["--data", data, "--out", out, "--backbone", chosen.backbone]
        if chosen.backbone_weights is not None:
            arguments += ["--backbone-weights", chosen.backbone_weights]
        if chosen.img_size is not None:
            arguments += ["--img-size", chosen.img_size]
        arguments += ["--method", chosen.method]
        for name, value in chosen.method_settings.items():
            arguments += ["--set", f"{name}={json.dumps(value)}"]
        arguments += ["--epochs", chosen.epochs, "--batch-size", chosen.batch_size]
        return [str(argument) for argument in [*arguments, "--augment", chosen.augment]]


@dataclass(frozen=True)
class TrainingProgress:
    """State of a training.

    Attributes:
        plan: What the training does.
        lines: Metrics of the finished epochs, as in metrics.jsonl.
        test: Accuracy on the test pictures; None before the end, or without such pictures.
        checkpoint: The trained checkpoint; None before the end.
        seconds: Time since the start.
        left: Estimate of the time to the end in seconds, from 0; None as long as none is known.
    """

    plan: Plan
    lines: tuple[Mapping[str, Any], ...]
    test: float | None
    checkpoint: Path | None
    seconds: float
    left: float | None


def training_plan(shared: SharedFleet, data: Path) -> Plan:
    """The training of a task that fits the fleet.

    Pictures are rotated, shifted and scaled slightly, but never mirrored: left and right may be
    what the visitor teaches.

    Args:
        shared: The fleet that the task will join.
        data: Folder of pictures with parts, as from ``write_pictures``.

    Raises:
        DataError: The folder cannot be used.
        SettingError: The fleet's backbone is unknown.
    """
    if not shared.backbone:
        raise SettingError(
            "The fleet's manifest is missing, so its backbone is unknown: start aoft-demo with the "
            "fleet's checkpoints instead."
        )
    splits = load_folder(data)
    train = len(splits.train)
    settings = TrainingSettings(
        backbone=shared.backbone["name"],
        backbone_weights=shared.weights,
        img_size=shared.backbone.get("args", {}).get("img_size"),
        method=shared.fleet.kind.method,
        method_settings=dict(shared.fleet.kind.settings),
        epochs=min(max(math.ceil(PICTURES_SEEN / train), 6), 40),
        batch_size=8 if train < 24 else 16 if train < 300 else 32,
        augment="affine",
    )
    return Plan(settings, train, len(splits.val), len(splits.test or ()))


def run_training(
    plan: Plan, data: Path, out: Path, training: Training, trainers: Trainers
) -> Iterator[TrainingProgress]:
    """Run ``aoft-train``; yield its progress twice a second and at the end.

    Args:
        plan: What to do.
        data: Folder of pictures.
        out: Folder for the results.
        training: The training that owns the subprocess.
        trainers: Starts the subprocess.

    Raises:
        SettingError: The training failed, was stopped, or took too long.
    """
    log, start, epochs = out.parent / "train.log", time.monotonic(), plan.settings.epochs
    arguments, startup = [*plan.arguments(data, out), "--quiet"], trainers.startup
    training.start(lambda: trainers.start(arguments, log))
    last, finished = start, 0
    try:
        while True:
            code = training.wait(INTERVAL)
            training.check_not_stopped()
            now = time.monotonic()
            if code:
                raise SettingError(_reason(log.read_text("utf-8", "replace")))
            lines = _metrics(out / "metrics.jsonl")
            done = [line for line in lines if "lr" in line]
            if len(done) > finished:
                last, finished = now, len(done)
                if startup is None or finished == 1:
                    spent = sum(float(line["seconds"]) for line in done)
                    startup = trainers.startup = max(now - start - spent, 0)
            if code == 0:
                test, checkpoint = lines[-1].get("test_accuracy"), out / "model.ckpt"
                yield TrainingProgress(plan, tuple(done), test, checkpoint, now - start, 0)
                return
            if now - start > TIMEOUT:
                raise SettingError(
                    f"Training took longer than {TIMEOUT} s and was stopped: use fewer pictures."
                )
            left = _seconds_left(done, epochs, now - last)
            if not done and startup is not None:
                left = max(startup - (now - start), 0)
            yield TrainingProgress(plan, tuple(done), None, None, now - start, left)
    finally:
        training.stop()


def _seconds_left(done: Sequence[Mapping[str, Any]], epochs: int, since: float) -> float | None:
    """Estimate of the remaining time from the durations of the latest epochs.

    Args:
        done: Metrics of the finished epochs.
        epochs: Number of epochs in all.
        since: Seconds since the last one ended.
    """
    if not done:
        return None
    latest = [float(line["seconds"]) for line in done[-5:]]
    each = sum(latest) / len(latest)
    # An epoch that already takes longer than usual is at least as long as it has taken.
    current = max(each - since, 0)
    remaining = epochs - len(done)
    return max((remaining - 1) * max(each, since) + current, 0) if remaining else 0


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
