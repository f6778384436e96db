"""Processes that train, one of which may be started before it is needed."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from aoft_deploy.processors import processors

__all__ = ["Trainers"]


class Trainers:
    """Starts processes that train; at most one waits for its training. Safe to use from any thread.

    Importing PyTorch and timm takes most of the time before the first step of a training, so a
    process is started as soon as somebody prepares one.

    Attributes:
        startup: Seconds from the start of the last training to its first step; None before.
    """

    def __init__(self) -> None:
        self.startup: float | None = None
        self._waiting: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._lock = threading.Lock()

    def prepare(self) -> None:
        """Start the process of the next training, unless it waits already."""
        with self._lock:
            if self._waiting is not None and self._waiting.poll() is not None:
                _end(self._waiting)
                self._waiting = None
            if self._waiting is None and not self._closed:
                self._waiting = _trainer()

    def start(self, arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        """Start a training in the process that waits, or in a new one.

        Args:
            arguments: Arguments of ``aoft-train``.
            log: File for its stderr.

        Returns:
            The process, which leads a process group. It ends when its stdin is closed.
        """
        with self._lock:
            process, self._waiting = self._waiting, None
        line = json.dumps({"arguments": list(arguments), "log": str(log)}).encode() + b"\n"
        if process is not None:
            with contextlib.suppress(BrokenPipeError):  # it has waited too long and ended
                return _give(process, line)
            _end(process)
        return _give(_trainer(), line)

    def close(self) -> None:
        """End the process that waits, and start no further one."""
        with self._lock:
            self._closed = True
            process, self._waiting = self._waiting, None
        if process is not None:
            _end(process)


def _trainer() -> subprocess.Popen[bytes]:
    """A process that waits for its training; it leaves processors to those who ask meanwhile."""
    threads = str(max(processors() // 2, 1))
    return subprocess.Popen(
        [sys.executable, "-m", "aoft_demo.trainer"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": threads},
    )


def _give(process: subprocess.Popen[bytes], line: bytes) -> subprocess.Popen[bytes]:
    """Write a line to a process's stdin.

    Raises:
        BrokenPipeError: It has ended.
    """
    assert process.stdin is not None
    process.stdin.write(line)
    process.stdin.flush()
    return process


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and close our end of its stdin."""
    process.kill()
    process.wait()
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
