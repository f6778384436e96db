"""Running slow functions in daemon threads, which do not delay the end of the process."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

__all__ = ["any_running", "in_thread"]

P = ParamSpec("P")
T = TypeVar("T")

MAX_THREADS = 4
"""A few permanent threads leave less memory behind than a new one for each function."""

_queue: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
_threads: list[threading.Thread] = []
_running: set[threading.Thread] = set()
_pending = 0


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a function in a daemon thread: an engine may take minutes to open, an exit may not.

    Raises:
        Exception: Whatever the function raises.
    """
    global _pending
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(value: Any, error: Exception | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(value)

    def work() -> None:
        value, error = None, None
        try:
            value = function(*args, **kwargs)
        except Exception as raised:
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, value, error)

    _pending += 1
    if len(_threads) < min(_pending, MAX_THREADS):
        _threads.append(threading.Thread(target=_work_forever, name="files", daemon=True))
        _threads[-1].start()
    _queue.put(work)
    try:
        return await future
    finally:
        _pending -= 1


def any_running() -> bool:
    """Whether a function is still running, including one whose caller was cancelled."""
    return bool(_running)


def _work_forever() -> None:
    own = threading.current_thread()
    while True:
        work = _queue.get()
        _running.add(own)
        work()
        _running.discard(own)
        del work  # or its memory stays until the next function
