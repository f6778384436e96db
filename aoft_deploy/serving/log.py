"""The server's log: one JSON object per line on stderr.

Logging never fails and never blocks, whether the reader of stderr is slow or has ended, the disk is
full or the stream is closed. Lines that cannot be written are counted, and the count is logged when
writing works again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator

import orjson

__all__ = ["JsonHandler", "Writer", "background", "flush", "log"]

MAX_LINES = 10_000
"""Maximum number of lines that are queued for a slow reader."""

CLOSE_SECONDS = 1.0
"""Maximum seconds that the end of the process waits for queued lines."""

MAX_RECORDS = 10
PERIOD_SECONDS = 60.0
"""Maximum number of a library's records of one kind per period; the others are only counted."""

MAX_KINDS = 100
"""Maximum number of kinds per period; further ones share one kind for each library."""


class Writer:
    """Writes lines in a separate thread.

    Args:
        write: Writes bytes; may block and may fail.
        max_lines: Maximum number of lines in the queue.
    """

    def __init__(self, write: Callable[[bytes], object], max_lines: int = MAX_LINES) -> None:
        self._write = write
        self._lines: queue.Queue[bytes | None] = queue.Queue(max_lines)
        self._lost = 0
        self._ended = threading.Event()
        threading.Thread(target=self._work, name="log", daemon=True).start()

    def put(self, line: bytes) -> None:
        """Queue a line; count it as lost if the queue is full."""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._lost += 1

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Wait until all lines are written, or the time is up."""
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=seconds)
            self._ended.wait(seconds)

    def _work(self) -> None:
        while (line := self._lines.get()) is not None:
            lost, self._lost = self._lost, 0
            try:
                if lost:
                    self._write(_line("log lines lost", {"count": lost}))
                    lost = 0
                self._write(line)
            except (OSError, ValueError):
                self._lost += lost + 1
        self._ended.set()


_writer: Writer | None = None


@contextlib.contextmanager
def background() -> Iterator[None]:
    """Context manager: write lines in a background thread."""
    global _writer
    _writer = Writer(_to_stderr)
    try:
        yield
    finally:
        writer, _writer = _writer, None
        writer.close()


def flush(seconds: float = CLOSE_SECONDS) -> None:
    """Wait until all lines are written, or the time is up; later lines are dropped."""
    if _writer is not None:
        _writer.close(seconds)


def log(event: str, *, error: BaseException | None = None, **details: object) -> None:
    """Log an event in one line.

    Args:
        event: Name of the event.
        error: Its cause, logged with its traceback.
        details: Further fields of the JSON object.
    """
    if error is not None:
        details["error"] = f"{type(error).__name__}: {_text(error)}"
        details["traceback"] = "".join(traceback.format_tb(error.__traceback__))
    line, writer = _line(event, details), _writer
    if writer is not None:
        writer.put(line)
    else:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # broken, closed, None
            sys.stderr.write(line.decode())
            sys.stderr.flush()


class JsonHandler(logging.Handler):
    """Logs the records of libraries in the same form, only a few of each kind per minute.

    Args:
        clock: Returns the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._period_start: float | None = None
        self._counts: dict[tuple[str, str], int] = {}  # by logger and message

    def emit(self, record: logging.LogRecord) -> None:
        """Log a record, unless there were too many of its kind."""
        now, kind = self._clock(), (record.name, _text(record.msg).partition("\n")[0][:80])
        if self._period_start is None or now - self._period_start >= PERIOD_SECONDS:
            for (name, message), count in self._counts.items():
                if count > MAX_RECORDS:
                    log("library", logger=name, message=message, left_out=count - MAX_RECORDS)
            self._period_start, self._counts = now, {}
        if kind not in self._counts and len(self._counts) >= MAX_KINDS:
            kind = (record.name, "…")
        self._counts[kind] = self._counts.get(kind, 0) + 1
        if self._counts[kind] > MAX_RECORDS:
            return
        try:
            message = record.getMessage()
        except Exception:  # arguments that do not fit the format
            message = _text(record.msg)
        error = record.exc_info[1] if record.exc_info else None
        log("library", error=error, logger=record.name, message=message)


def _line(event: str, details: dict[str, object]) -> bytes:
    now = time.time()
    timestamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03}Z"
    head = {"time": timestamp, "event": event}
    try:
        return orjson.dumps(head | details, default=_text) + b"\n"
    except TypeError:  # text that is not UTF-8, a key that is not a string, an integer over 64 bits
        plain = {_text(name): _text(value) for name, value in details.items()}
        return orjson.dumps(head | plain) + b"\n"


def _text(value: object) -> str:
    """A value as text that can be encoded as UTF-8."""
    try:
        text = str(value)
    except Exception:
        text = object.__repr__(value)
    return text.encode("utf-8", "backslashreplace").decode()


def _to_stderr(line: bytes) -> None:
    """Bypass Python's buffer, which would keep a failed line and retry it when Python exits."""
    remaining = memoryview(line)
    while remaining:
        remaining = remaining[os.write(2, remaining) :]
