"""Run commands of this checkout, or of an earlier one, and measure their processes."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import NamedTuple

__all__ = ["Measured", "environment", "medians", "run"]


class Measured(NamedTuple):
    """What a process took.

    Attributes:
        seconds: From its start to its end, or to the line that was waited for.
        cpu: User and system time of all its threads, in seconds.
        peak: Largest resident memory in MB; 0 if it is below that of the process that started it,
            which Linux counts too.
    """

    seconds: float
    cpu: float
    peak: float


def environment(scratch: Path, checkout: Path | None = None) -> dict[str, str]:
    """The environment of measured commands: compiled modules and graphs are cached in ``scratch``.

    Args:
        scratch: A folder for this checkout alone.
        checkout: Folder with the packages to run; None means this script's.
    """
    checkout = (checkout or Path(__file__).parents[2]).resolve()
    graphs = scratch / "graphs"
    graphs.mkdir(parents=True, exist_ok=True)
    kept = {key: text for key, text in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    paths = [checkout, checkout / "exporters", checkout / "demo"]
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join([*map(str, paths), kept.get("PYTHONPATH", "")]),
        "PYTHONPYCACHEPREFIX": str(scratch / "compiled"),
        "AOFT_CACHE_DIR": str(graphs),
        "HF_HUB_OFFLINE": "1",
    }


def run(words: Iterable[object], given: Mapping[str, str], until: str = "") -> Measured:
    """Run Python with these arguments, to its end or until it prints a line with a text.

    Raises:
        RuntimeError: It fails, or ends without that line.
    """
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *map(str, words)],
        env=dict(given),
        cwd=given["AOFT_CACHE_DIR"],  # another folder's packages would come first
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    seen, seconds, lines = False, 0.0, list[str]()
    for line in process.stdout:
        lines.append(line)
        if until and until in line and not seen:
            seen, seconds = True, time.perf_counter() - start
            process.terminate()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if (process.returncode and not seen) or (until and not seen):
        raise RuntimeError("".join(lines[-20:]))
    ended = time.perf_counter() - start
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = usage.ru_maxrss if usage.ru_maxrss > own else 0
    cpu = usage.ru_utime + usage.ru_stime
    return Measured(seconds or ended, cpu, peak / 1024)


def medians(runs: Iterable[Measured]) -> dict[str, float]:
    """The median of each measure."""
    columns = zip(*runs, strict=True)
    pairs = zip(Measured._fields, columns, strict=True)
    return {name: round(median(column), 3) for name, column in pairs}
