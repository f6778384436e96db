"""Keep the recording of a CUDA graph apart from the process's other work on GPUs.

While a stream is recorded, other threads may replay graphs and copy between buffers that exist.
They may not synchronise the device. ONNX Runtime records in CUDA's global mode, in which an
allocation or a copy of any other thread fails too, and makes the recording fail. PyTorch records
one graph at a time in a process.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["GPU_SETUP", "RECORDING", "Recording"]

GPU_SETUP = threading.RLock()
"""Held by an engine while it allocates, warms up and records, which it does when it loads."""


class Recording:
    """A lock that one recording holds alone, or any number of other threads together.

    A recording that waits goes before those that come later. The lock is not reentrant.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._others, self._waiting, self._records = 0, 0, False

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Context manager: record while no other thread uses a GPU."""
        with self._changed:
            self._waiting += 1
            try:
                self._changed.wait_for(lambda: not self._others and not self._records)
            finally:
                self._waiting -= 1
            self._records = True
        try:
            yield
        finally:
            with self._changed:
                self._records = False
                self._changed.notify_all()

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Context manager: use a GPU while no thread records."""
        with self._changed:
            self._changed.wait_for(lambda: not self._records and not self._waiting)
            self._others += 1
        try:
            yield
        finally:
            with self._changed:
                self._others -= 1
                self._changed.notify_all()


RECORDING = Recording()
"""Held alone while ONNX Runtime records, and together by all that allocates or copies meanwhile."""
