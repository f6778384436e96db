"""Steps of the GPU benchmark that end badly."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from typing import Any

from benchmarks.gpu.run import NotMeasured, Run


def measures(run: Run) -> None:
    run.note("a figure", kind="parity", error=0.0, allowed=1.0, passed=True)


def raises(run: Run) -> None:
    run.note("before", passed=True)
    raise ValueError("no such tensor")


def lacks(run: Run) -> None:
    with run.row("fp8"):
        raise NotMeasured("this GPU has no fp8")
    run.note("after", passed=True)


def crashes(run: Run) -> None:
    run.note("before", passed=True)
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(run: Run) -> None:
    child: Any = subprocess.Popen(["sleep", "600"])
    run.note("before", passed=True, child=child.pid)
    time.sleep(600)
