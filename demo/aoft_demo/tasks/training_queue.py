"""Trainings, each in its own subprocess, and the queue that runs one at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from aoft_deploy.errors import SettingError

__all__ = ["MAX_WAITING", "Training", "TrainingQueue"]

MAX_WAITING = 12
"""Trainings that may wait; each one blocks a thread."""

GRACE = 1.0
"""Seconds between SIGTERM and SIGKILL."""


class Training:
    """One training. Any thread may stop it."""

    def __init__(self) -> None:
        self._stopped = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    @property
    def stopped(self) -> bool:
        """Whether the training was stopped."""
        return self._stopped.is_set()

    def check_not_stopped(self) -> None:
        """Raise an error if the training was stopped.

        Raises:
            SettingError: It was stopped.
        """
        if self.stopped:
            raise SettingError("Training was stopped; nothing was added.")

    def start(self, command: Sequence[str], log: Path) -> None:
        """Start the subprocess.

        Args:
            command: The program and its arguments.
            log: File for the program's stderr.

        Raises:
            SettingError: The training was stopped.
        """
        with self._lock, log.open("wb") as file:
            self.check_not_stopped()
            self._process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=file, start_new_session=True
            )

    def wait(self, seconds: float) -> int | None:
        """Wait for the subprocess.

        Args:
            seconds: Longest wait.

        Returns:
            The exit code; None if the subprocess still runs.
        """
        assert self._process is not None
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def stop(self) -> None:
        """Stop the training; the subprocess and its children have ended when this returns."""
        self._stopped.set()
        with self._lock:
            process = self._process
            if process is None or process.poll() is not None:
                return
            process.terminate()
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


class TrainingQueue:
    """The order in which trainings run. Safe to use from any thread."""

    def __init__(self) -> None:
        self._trainings: list[Training] = []
        self._lock = threading.Lock()

    @contextmanager
    def entered(self, training: Training) -> Iterator[None]:
        """Context manager: the training is in the queue.

        Raises:
            SettingError: The queue is full.
        """
        with self._lock:
            self._trainings = [other for other in self._trainings if not other.stopped]
            if len(self._trainings) > MAX_WAITING:
                raise SettingError(f"{MAX_WAITING} trainings are waiting: try again later.")
            self._trainings.append(training)
        try:
            yield
        finally:
            with self._lock:
                self._trainings = [other for other in self._trainings if other is not training]

    def is_first(self, training: Training) -> bool:
        """Whether the training is the first in the queue that was not stopped."""
        with self._lock:
            first = next((other for other in self._trainings if not other.stopped), training)
        return first is training
