"""Trainings: a process each, one at a time, and an end to each that anyone may bring about."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from aoft_deploy.errors import SettingError

__all__ = ["MOST_WAITING", "Line", "Training"]

MOST_WAITING = 12
"""Trainings that may wait for their turn; each occupies a thread."""

GRACE = 1.0
"""Seconds in which a process may end by itself."""


class Training:
    """One training, from the button to its end."""

    def __init__(self) -> None:
        self._stopped = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    @property
    def stopped(self) -> bool:
        """Whether someone has stopped it."""
        return self._stopped.is_set()

    def go_on(self) -> None:
        """Do nothing, unless someone has stopped it.

        Raises:
            SettingError: Someone has.
        """
        if self.stopped:
            raise SettingError("Training was stopped; nothing was added.")

    def start(self, command: Sequence[str], log: Path) -> None:
        """Start its process.

        Args:
            command: The program and its arguments.
            log: Where its messages go.

        Raises:
            SettingError: Someone has stopped it.
        """
        with self._lock, log.open("wb") as file:
            self.go_on()
            self._process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=file, start_new_session=True
            )

    def wait(self, seconds: float) -> int | None:
        """Wait for the process's end, no longer than some seconds; its exit code, None before."""
        assert self._process is not None
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def stop(self) -> None:
        """End it: a process that runs has ended when this returns, and its children with it."""
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


class Line:
    """Whose turn it is, of those who want to train."""

    def __init__(self) -> None:
        self._waiting: list[Training] = []
        self._lock = threading.Lock()

    @contextmanager
    def place(self, training: Training) -> Iterator[None]:
        """Stand in line while the block runs.

        Raises:
            SettingError: The line is too long.
        """
        with self._lock:
            self._waiting = [other for other in self._waiting if not other.stopped]
            if len(self._waiting) > MOST_WAITING:
                raise SettingError(f"{MOST_WAITING} trainings are waiting: try again later.")
            self._waiting.append(training)
        try:
            yield
        finally:
            with self._lock:
                self._waiting = [other for other in self._waiting if other is not training]

    def is_first(self, training: Training) -> bool:
        """Whether nobody stands before a training; those who were stopped do not count."""
        with self._lock:
            first = next((other for other in self._waiting if not other.stopped), training)
        return first is training
