"""What a server tells: one JSON object a line on stderr."""

from __future__ import annotations

import logging
import sys
import time
import traceback

import orjson

__all__ = ["JsonHandler", "log"]


def log(event: str, *, error: BaseException | None = None, **details: object) -> None:
    """Write one line.

    Args:
        event: What happened.
        error: Why, with where in the code; for the host's eyes only.
        details: Whatever else tells more.
    """
    if error is not None:
        details["error"] = f"{type(error).__name__}: {error}"
        details["traceback"] = "".join(traceback.format_tb(error.__traceback__))
    now = time.time()
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03}Z"
    line = orjson.dumps({"time": moment, "event": event, **details}, default=str)
    print(line.decode(), file=sys.stderr, flush=True)


class JsonHandler(logging.Handler):
    """What libraries log, in the same form."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        error = record.exc_info[1] if record.exc_info else None
        log("library", error=error, logger=record.name, message=record.getMessage())
