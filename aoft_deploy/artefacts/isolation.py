"""An engine in a process of its own, so that engines timed beside each other share nothing.

Where one process holds several, the place that a model's weights got in memory decides over a tenth
of its speed: the same ONNX file was 0.90 to 1.10 times itself, by the order of loading alone.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.artefacts.engine import Engine
from aoft_deploy.errors import AoftError

__all__ = ["Apart"]


class Apart:
    """An ``Engine`` that another process runs, for one thread at a time.

    It ends with ``close``, as a context, or with this process.

    Args:
        load: Makes the engine, in the other process: a function that pickle finds by its module
            and name, or a ``functools.partial`` of one.

    Raises:
        Exception: What ``load`` or the engine raised.
        AoftError: The same where it cannot be pickled, or the process ended.
    """

    info: Mapping[str, str]
    device: str
    takes_pixels: bool
    takes_tasks: bool

    def __init__(self, load: Callable[[], Engine]) -> None:
        command = [sys.executable, "-m", "aoft_deploy.artefacts.isolation"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            self._send(sys.path)
            told = self._ask(load)
        except BaseException:
            self.close()
            raise
        self.info, self.device, self.takes_pixels, self.takes_tasks = told

    def run(
        self, images: NDArray[Any], task: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        """Logits; see ``Engine.run``."""
        logits: NDArray[np.float32] = self._ask(("run", (images, task)))
        return logits

    def seconds(self, images: NDArray[Any], task: NDArray[np.int64] | None = None) -> float:
        """How long a run takes there; the way of the images there and back is not counted."""
        seconds: float = self._ask(("seconds", (images, task)))
        return seconds

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                stream.close()  # type: ignore[union-attr]

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _send(self, value: Any) -> None:
        assert self._process.stdin is not None
        pickle.dump(value, self._process.stdin, protocol=5)
        self._process.stdin.flush()

    def _ask(self, value: Any) -> Any:
        assert self._process.stdout is not None
        try:
            self._send(value)
            answer = pickle.load(self._process.stdout)
        except (OSError, EOFError) as error:
            code = self._process.wait()
            raise AoftError(f"The engine's process ended with {code}.") from error
        if isinstance(answer, Exception):
            raise answer
        return answer


def _serve(incoming: BinaryIO, outgoing: BinaryIO) -> None:
    """What the other process does, until nothing more comes in."""

    def answer(make: Callable[[], Any]) -> bool:
        value, fine = None, True
        try:
            value = make()
        except Exception as error:
            value, fine = _portable(error), False
        pickle.dump(value, outgoing, protocol=5)
        outgoing.flush()
        return fine

    engine: Engine

    def load() -> tuple[dict[str, str], str, bool, bool]:
        nonlocal engine
        engine = pickle.load(incoming)()
        return dict(engine.info), engine.device, engine.takes_pixels, engine.takes_tasks

    def seconds(*inputs: Any) -> float:
        start = time.perf_counter()
        engine.run(*inputs)
        return time.perf_counter() - start

    sys.path[:] = pickle.load(incoming)
    if not answer(load):
        return
    while True:
        try:
            what, inputs = pickle.load(incoming)
        except EOFError:
            return
        answer(partial(seconds if what == "seconds" else engine.run, *inputs))


def _portable(error: Exception) -> Exception:
    """The error, or one with its message where pickle cannot make it anew."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return AoftError(str(error) or type(error).__name__)
    return error


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "wb") as pipe:
        os.dup2(2, 1)  # what a library prints is no answer
        _serve(sys.stdin.buffer, pipe)
