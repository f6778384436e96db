"""How many processors this process may use: what is left of the machine's."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

__all__ = ["limited", "processors"]


def processors(root: Path = Path("/")) -> int:
    """Processors' worth of time for this process, 1 or more; a part of one counts as one.

    The smallest of what the process is bound to (affinity, which cpusets set too) and of the
    quotas of its control group and of all groups above it, of either version.

    Args:
        root: Where ``proc`` is, and what the paths of mounts are below.
    """
    bound = getattr(os, "sched_getaffinity", None)
    found = len(bound(0)) if bound is not None else os.cpu_count() or 1
    return max(1, min([found, *(math.ceil(quota) for quota in _quotas(root))]))


def limited() -> int | None:
    """The processors of this process where they are fewer than the machine's, else None.

    For runtimes that choose a number of threads by themselves: they count the machine's cores.
    """
    found = processors()
    return found if found < (os.cpu_count() or 1) else None


def _quotas(root: Path) -> Iterator[float]:
    """Of each control group that this process is in."""
    for folder, two in _groups(root):
        try:
            if two:
                quota, period = (folder / "cpu.max").read_text("ascii").split()
            else:
                quota = (folder / "cpu.cfs_quota_us").read_text("ascii")
                period = (folder / "cpu.cfs_period_us").read_text("ascii")
            share = float(quota) / float(period)  # -1 is no limit, and "max" no number
        except (OSError, ValueError, ZeroDivisionError):
            continue
        if share > 0:
            yield share


def _groups(root: Path) -> Iterator[tuple[Path, bool]]:
    """Folders of this process's groups with all above, and whether they are of version 2."""
    try:
        own = (root / "proc/self/cgroup").read_text("utf-8")
        mounts = (root / "proc/self/mountinfo").read_text("utf-8")
    except OSError:
        return
    one: PurePosixPath | None = None
    two: PurePosixPath | None = None
    for line in own.splitlines():
        _, names, group = line.split(":", 2)
        if not names:
            two = PurePosixPath(group)
        elif "cpu" in names.split(","):
            one = PurePosixPath(group)
    for line in mounts.splitlines():
        fields, _, kind = line.partition(" - ")
        if not kind.startswith(("cgroup ", "cgroup2 ")):
            continue
        top, place = (PurePosixPath(_unescaped(field)) for field in fields.split()[3:5])
        path = two if kind.startswith("cgroup2 ") else one
        if path is None or (path is one and "cpu" not in kind.split()[-1].split(",")):
            continue
        # Within a container the mount shows the container's own group as its top.
        below = path.relative_to(top) if path.is_relative_to(top) else PurePosixPath()
        folder = root / place.relative_to("/")
        for part in (below, *below.parents):
            yield folder / part, path is two


def _unescaped(field: str) -> str:
    """A field of mountinfo, where blanks are octal numbers."""
    return re.sub(r"\\(\d{3})", lambda found: chr(int(found[1], 8)), field)
