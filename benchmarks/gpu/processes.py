"""Run each step in a process of its own, which may crash or hang without ending the others.

The processes are forked from one that has PyTorch and timm imported, but has not started CUDA: a
new interpreter imports them for several seconds.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from importlib import import_module
from multiprocessing.process import BaseProcess

from benchmarks.gpu.run import Run
from benchmarks.gpu.steps import Step

__all__ = ["end", "start"]

_context = multiprocessing.get_context("forkserver")


def start(step: Step, run: Run) -> BaseProcess:
    """Start the process of a step."""
    _context.set_forkserver_preload(["torch", "timm"])
    process = _context.Process(target=_perform, args=(step, run))
    process.start()
    return process


def _perform(step: Step, run: Run) -> None:
    """Run a step in its own process and session; what it prints goes to the log."""
    os.setsid()
    log = os.open(run.out / "log.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    print(f"== {step.name}")
    module, function = step.function.split(":")
    begin = time.time()
    with run.row(step.name):
        getattr(import_module(module), function)(run)
        run.note(step.name, seconds=round(time.time() - begin, 1))
    print(f"== {step.name}: {sum(os.times()[:4]):.1f} s of CPU time")


def end(process: BaseProcess, run: Run) -> None:
    """Wait for a step's process, and end it and all that it started when its time is over."""
    assert process.pid is not None
    process.join(max(run.left, 0))
    ended = process.exitcode
    process.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    if ended is None:
        run.note(run.step, failed="it was ended when its time was over")
    elif ended:
        run.note(run.step, failed=f"its process ended with {ended}")
