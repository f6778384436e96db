"""A clean end of the process: signals, and a folder for all temporary files."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

__all__ = ["interrupt_on_signals", "temporary_folder"]

SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)


def interrupt_on_signals() -> None:
    """Raise KeyboardInterrupt on the first signal and ignore further ones.

    Signals that are ignored already, such as SIGHUP under nohup, stay ignored.
    """
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """Context manager: a folder for the temporary files of this process and its subprocesses.

    It is removed at the end; signals are ignored from then on.
    """
    tempdir, variable = tempfile.tempdir, os.environ.get("TMPDIR")
    arrived: list[int] = []
    ours = [number for number in SIGNALS if signal.getsignal(number) is _interrupt]
    for number in ours:  # an interrupt waits until the folder's name is known
        signal.signal(number, lambda number, frame: arrived.append(number))
    try:
        folder = Path(tempfile.mkdtemp(prefix="aoft-demo-")).resolve()
    finally:
        for number in ours:
            signal.signal(number, _interrupt)
    try:
        tempfile.tempdir = os.environ["TMPDIR"] = str(folder)
        if arrived:
            _interrupt(arrived[0], None)
        yield folder
    finally:
        _ignore_signals()
        tempfile.tempdir = tempdir
        os.environ.pop("TMPDIR", None)
        if variable is not None:
            os.environ["TMPDIR"] = variable
        for _ in range(10):  # a running handler may write files during the removal
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                break
            time.sleep(0.05)


def _interrupt(number: int, frame: FrameType | None) -> None:
    _ignore_signals()
    raise KeyboardInterrupt


def _ignore_signals() -> None:
    """Ignore signals: a second one would end the process before its files are removed.

    A handler that does nothing is set instead of SIG_IGN: Python reports a signal that arrives
    while its handler changes to SIG_IGN.
    """
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, _do_nothing)


def _do_nothing(number: int, frame: FrameType | None) -> None:
    pass
