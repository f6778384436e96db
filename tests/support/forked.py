"""Run Python in a process that is forked from one with torch, timm and ONNX Runtime imported.

A new interpreter imports these for five seconds of a core; a fork takes some milliseconds. What is
tested here must not depend on how the interpreter starts.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["ForkedPython", "run_python"]

PRELOADED = ["timm", "onnxruntime", "torchvision", "accelerate", "sklearn.datasets", "warm_process"]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOADED)


class ForkedPython:
    """A running process, in its own process session, with its output in files.

    Args:
        arguments: Arguments of ``python``: a script or ``-m module`` or ``-c code``, and its own.
        cwd: Working directory; None for this process's.
        env: Environment variables; None for this process's.
        joined: Whether ``stdout`` has the errors too, in their order.
    """

    def __init__(
        self,
        *arguments: object,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        joined: bool = False,
    ) -> None:
        self.arguments = [str(argument) for argument in arguments]
        self._folder = tempfile.TemporaryDirectory(prefix="forked-")
        self._outputs = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        for file in self._outputs:
            file.touch()
        outputs = [self._outputs[0]] * 2 if joined else self._outputs
        where = str(cwd or Path.cwd())
        self._process = _context.Process(
            target=_main,
            args=(self.arguments, where, dict(os.environ if env is None else env), outputs),
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def stdout(self) -> str:
        """What was printed until now."""
        return self._outputs[0].read_text("utf-8")

    @property
    def stderr(self) -> str:
        """What was printed as errors until now."""
        return self._outputs[1].read_text("utf-8")

    @property
    def returncode(self) -> int | None:
        """The exit code, or minus the signal that ended the process; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Wait for the end; a process that takes longer is killed.

        Raises:
            subprocess.TimeoutExpired: It took longer.
        """
        self._process.join(timeout)
        if self._process.exitcode is None:
            os.killpg(self.pid, signal.SIGKILL)
            self._process.join()
            raise subprocess.TimeoutExpired(self.arguments, timeout, self.stdout, self.stderr)
        done = subprocess.CompletedProcess(
            self.arguments, self._process.exitcode, self.stdout, self.stderr
        )
        self._folder.cleanup()
        return done


def run_python(
    *arguments: object,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 300,
    joined: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run a forked Python to its end; see ``ForkedPython``."""
    return ForkedPython(*arguments, cwd=cwd, env=env, joined=joined).wait(timeout)


def _main(arguments: Sequence[str], cwd: str, env: Mapping[str, str], outputs: list[Path]) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    for number, path in enumerate(outputs, start=1):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", line_buffering=True)  # type: ignore[union-attr]
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    first, *rest = arguments
    if first == "-c":
        code, *rest = rest
        sys.argv = ["-c", *rest]
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        module, *rest = rest
        sys.argv = [module, *rest]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *rest]
        sys.path.insert(0, str(Path(first).parent.resolve()))
        runpy.run_path(first, run_name="__main__")
