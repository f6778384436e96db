"""Waiting for a function in a thread that nothing waits for when the process ends."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

__all__ = ["in_thread", "working"]

P = ParamSpec("P")
T = TypeVar("T")

MOST = 4
"""Threads; a few that stay leave less memory behind than a new one for each function."""

_work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
_threads: list[threading.Thread] = []
_working: set[threading.Thread] = set()
_busy = 0


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run in a daemon thread, so that an engine that takes minutes to open does not hold an exit.

    Raises:
        Exception: Whatever the function raises.
    """
    global _busy
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

    _busy += 1
    if len(_threads) < min(_busy, MOST):
        _threads.append(threading.Thread(target=_serve, name="files", daemon=True))
        _threads[-1].start()
    _work.put(work)
    try:
        return await future
    finally:
        _busy -= 1


def working() -> bool:
    """Whether a function still runs, also one that nobody waits for any more."""
    return bool(_working)


def _serve() -> None:
    own = threading.current_thread()
    while True:
        work = _work.get()
        _working.add(own)
        work()
        _working.discard(own)
        del work
