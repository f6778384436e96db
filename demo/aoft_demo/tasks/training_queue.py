"""Trainings, each in its own subprocess, and the queue that runs one at a time."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from aoft_demo.tasks.trainers import Trainers
from aoft_deploy.errors import SettingError

__all__ = ["MAX_WAITING", "Training", "TrainingQueue", "TrainingStoppedError"]

MAX_WAITING = 12
"""Trainings that may wait; each one blocks a thread."""

GRACE = 1.0
"""Seconds between SIGTERM and SIGKILL."""


class TrainingStoppedError(SettingError):
    """The training was stopped, by the visitor or because the session has ended."""


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
            TrainingStoppedError: It was stopped.
        """
        if self.stopped:
            raise TrainingStoppedError("Training was stopped; nothing was added.")

    def start(self, launch: Callable[[], subprocess.Popen[bytes]]) -> None:
        """Start the subprocess.

        Args:
            launch: Starts it, as the leader of a process group.

        Raises:
            TrainingStoppedError: It was stopped.
        """
        with self._lock:
            self.check_not_stopped()
            self._process = launch()

    def wait(self, seconds: float) -> int | None:
        """Wait for the subprocess.

        Args:
            seconds: Longest wait.

        Returns:
            The exit code; None if the subprocess still runs.
        """
        assert self._process is not None
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        _close_stdin(self._process)
        return code

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
            _close_stdin(process)


class TrainingQueue:
    """The order in which trainings run. Safe to use from any thread.

    Attributes:
        trainers: The processes of the trainings.
    """

    def __init__(self) -> None:
        self.trainers = Trainers()
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

    def before(self, training: Training) -> int:
        """Number of trainings before a training in the queue that were not stopped."""
        with self._lock:
            waiting = [other for other in self._trainings if not other.stopped or other is training]
            return waiting.index(training) if training in waiting else 0


def _close_stdin(process: subprocess.Popen[bytes]) -> None:
    """Close our end of the pipe to a process that has ended."""
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
