"""The command aoft-train in a process that imports its libraries before it gets its arguments.

The process yields to all others, so that pictures are answered while it trains. It reads one line
from stdin, which holds the arguments and the file for stderr as JSON. It ends when stdin is closed,
as it is when the demo has ended for whatever reason, and when it has waited too long.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import sys
import threading

from aoft_deploy.cli.train import main as train

__all__ = ["IDLE", "NICENESS", "main"]

NICENESS = 10
"""Added to the process's niceness: it gets about a tenth of a busy core."""

IDLE = 900.0
"""Seconds that the process waits for its arguments."""


def main() -> int:
    """Wait for the arguments, and run the command with them."""
    _yield_to_others()
    for module in ("accelerate.accelerator", "timm", "aoft_deploy.training.run"):
        importlib.import_module(module)
    if not select.select([sys.stdin], [], [], IDLE)[0]:
        return 0
    line = sys.stdin.buffer.readline()
    if not line:
        return 0
    request = json.loads(line)
    with open(request["log"], "wb") as log:
        os.dup2(log.fileno(), sys.stderr.fileno())
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    return train(request["arguments"])


def _yield_to_others() -> None:
    """Lower the priority of this process and of its threads."""
    os.nice(NICENESS)
    if hasattr(os, "sched_setscheduler"):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _end_with_stdin() -> None:
    os.read(sys.stdin.fileno(), 1)  # unbuffered: a lock would be held at the interpreter's end
    os._exit(1)


if __name__ == "__main__":
    raise SystemExit(main())
