"""What a server tells: one JSON object a line on stderr.

Telling never fails and never waits: not for a reader that has gone, a full disk or a closed
stream, nor for a reader that is slow. What nobody took is counted, and told when there is room.
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

MOST_LINES = 10_000
"""Lines that wait for a slow reader; a longer queue would only tell older news."""

LAST_SECONDS = 1.0
"""How long the end waits for what was told to be written."""

SAME = 10
SAME_SECONDS = 60.0
"""A library's records of one kind, in so many seconds; the others are counted."""

KINDS = 100
"""Kinds that are told apart; those above count as one for each library."""


class Writer:
    """Writes lines in a thread of its own.

    Args:
        write: Writes bytes; may wait and may fail.
        most: Lines that may wait.
    """

    def __init__(self, write: Callable[[bytes], object], most: int = MOST_LINES) -> None:
        self._write = write
        self._lines: queue.Queue[bytes | None] = queue.Queue(most)
        self._lost = 0
        self._ended = threading.Event()
        threading.Thread(target=self._work, name="log", daemon=True).start()

    def put(self, line: bytes) -> None:
        """Have a line written, unless too many wait."""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._lost += 1

    def close(self, seconds: float = LAST_SECONDS) -> None:
        """Wait until all is written, but not for ever."""
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
    """Within it lines are written by a thread."""
    global _writer
    _writer = Writer(_to_stderr)
    try:
        yield
    finally:
        writer, _writer = _writer, None
        writer.close()


def flush(seconds: float = LAST_SECONDS) -> None:
    """Wait until what was told is written, but not for ever; nothing is told afterwards."""
    if _writer is not None:
        _writer.close(seconds)


def log(event: str, *, error: BaseException | None = None, **details: object) -> None:
    """Write one line.

    Args:
        event: What happened.
        error: Why, with where in the code; for the host's eyes only.
        details: Whatever else tells more.
    """
    if error is not None:
        details["error"] = f"{type(error).__name__}: {_text(error)}"
        details["traceback"] = "".join(traceback.format_tb(error.__traceback__))
    line, writer = _line(event, details), _writer
    if writer is not None:
        writer.put(line)
    else:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # gone, closed, none
            sys.stderr.write(line.decode())
            sys.stderr.flush()


class JsonHandler(logging.Handler):
    """What libraries log, in the same form; of one kind a few in a minute.

    Args:
        clock: Seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._begun: float | None = None
        self._counts: dict[tuple[str, str], int] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        now, kind = self._clock(), (record.name, _text(record.msg).partition("\n")[0][:80])
        if self._begun is None or now - self._begun >= SAME_SECONDS:
            for (name, message), count in self._counts.items():
                if count > SAME:
                    log("library", logger=name, message=message, left_out=count - SAME)
            self._begun, self._counts = now, {}
        if kind not in self._counts and len(self._counts) >= KINDS:
            kind = (record.name, "…")
        self._counts[kind] = self._counts.get(kind, 0) + 1
        if self._counts[kind] > SAME:
            return
        try:
            message = record.getMessage()
        except Exception:  # arguments that do not fit
            message = _text(record.msg)
        error = record.exc_info[1] if record.exc_info else None
        log("library", error=error, logger=record.name, message=message)


def _line(event: str, details: dict[str, object]) -> bytes:
    now = time.time()
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03}Z"
    head = {"time": moment, "event": event}
    try:
        return orjson.dumps(head | details, default=_text) + b"\n"
    except TypeError:  # text that is not UTF-8, a key that is no text, a number above 64 bits
        plain = {_text(name): _text(value) for name, value in details.items()}
        return orjson.dumps(head | plain) + b"\n"


def _text(value: object) -> str:
    """Text of anything that can be written as UTF-8."""
    try:
        text = str(value)
    except Exception:
        text = object.__repr__(value)
    return text.encode("utf-8", "backslashreplace").decode()


def _to_stderr(line: bytes) -> None:
    """Past Python's buffer, which would keep what failed and try it again at the end."""
    rest = memoryview(line)
    while rest:
        rest = rest[os.write(2, rest) :]
