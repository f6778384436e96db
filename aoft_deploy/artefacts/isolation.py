"""Run an engine in a subprocess, so that engines which are compared by speed share nothing.

In a single process, the memory layout of the weights changes the speed by up to 10 %: the ratio
between two loads of one ONNX file was 0.90 to 1.10, depending only on the order of loading.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from aoft_deploy.artefacts.duration import Duration, duration
from aoft_deploy.artefacts.engine import Engine
from aoft_deploy.errors import AoftError

__all__ = ["SubprocessEngine"]


class SubprocessEngine:
    """An ``Engine`` that runs in a subprocess. It is not thread-safe.

    The subprocess ends with ``close``, with the context manager, or with this process.

    Args:
        load: Loads the engine in the subprocess: a function that can be pickled, or a
            ``functools.partial`` of one.

    Raises:
        Exception: ``load`` or the engine raised it.
        AoftError: The subprocess ended, or raised an exception that cannot be pickled.
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
            description = self._ask(load)
        except BaseException:
            self.close()
            raise
        self.info, self.device, self.takes_pixels, self.takes_tasks = description

    def run(
        self, images: NDArray[Any], task: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        """Compute logits; see ``Engine.run``."""
        logits: NDArray[np.float32] = self._ask(("run", (images, task)))
        return logits

    def duration(self, inputs: tuple[NDArray[Any], ...], lanes: int = 1) -> Duration:
        """Measure the engine, without the transfer to and from the subprocess.

        Args:
            inputs: Arguments of ``run``.
            lanes: Number of threads that call the engine at once.
        """
        measured: Duration = self._ask(("duration", (inputs, lanes)))
        return measured

    def close(self) -> None:
        """End the subprocess."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                stream.close()  # type: ignore[union-attr]

    def __enter__(self) -> SubprocessEngine:
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
            killed = ", as when the memory is used up" if code == -signal.SIGKILL else ""
            raise AoftError(f"The engine's process ended with {code}{killed}.") from error
        if isinstance(answer, Exception):
            raise answer
        return answer


def _serve(requests: BinaryIO, responses: BinaryIO) -> None:
    """Main function of the subprocess: answer requests until the stream ends."""

    def respond(compute: Callable[[], Any]) -> bool:
        value, succeeded = None, True
        try:
            value = compute()
        except Exception as error:
            value, succeeded = _picklable(error), False
        pickle.dump(value, responses, protocol=5)
        responses.flush()
        return succeeded

    engine: Engine

    def load() -> tuple[dict[str, str], str, bool, bool]:
        nonlocal engine
        engine = pickle.load(requests)()
        return dict(engine.info), engine.device, engine.takes_pixels, engine.takes_tasks

    def measure(inputs: tuple[Any, ...], lanes: int) -> Duration:
        return duration(engine, inputs, lanes)

    sys.path[:] = pickle.load(requests)
    if not respond(load):
        return
    while True:
        try:
            verb, inputs = pickle.load(requests)
        except EOFError:
            return
        respond(partial(measure if verb == "duration" else engine.run, *inputs))


def _picklable(error: Exception) -> Exception:
    """The error itself, or an ``AoftError`` with its message if it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return AoftError(str(error) or type(error).__name__)
    return error


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "wb") as pipe:
        os.dup2(2, 1)  # libraries that print to stdout must not write into the pipe
        _serve(sys.stdin.buffer, pipe)
