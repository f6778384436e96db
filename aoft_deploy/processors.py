"""The number of processors that this process may use."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

__all__ = ["limited", "processors"]


def processors(root: Path = Path("/")) -> int:
    """Number of processors that this process may use, at least 1.

    This is the minimum of the process's CPU affinity (which cpusets set too) and the CPU quotas,
    rounded up, of its control group and all parent groups (cgroup v1 and v2).

    Args:
        root: Folder that contains ``proc`` and the mount points.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return max(1, min([count, *(math.ceil(quota) for quota in _quotas(root))]))


def limited() -> int | None:
    """``processors()`` if it is less than the machine's number of cores, else None.

    Runtimes that choose their own number of threads count the machine's cores.
    """
    count = processors()
    return count if count < (os.cpu_count() or 1) else None


def _quotas(root: Path) -> Iterator[float]:
    """CPU quota of each control group of this process, in processors."""
    for folder, is_v2 in _groups(root):
        try:
            if is_v2:
                quota, period = (folder / "cpu.max").read_text("ascii").split()
            else:
                quota = (folder / "cpu.cfs_quota_us").read_text("ascii")
                period = (folder / "cpu.cfs_period_us").read_text("ascii")
            share = float(quota) / float(period)  # a quota of -1 or "max" is no limit
        except (OSError, ValueError, ZeroDivisionError):
            continue
        if share > 0:
            yield share


def _groups(root: Path) -> Iterator[tuple[Path, bool]]:
    """Folders of this process's control groups and their parents, and whether each is cgroup v2."""
    try:
        own = (root / "proc/self/cgroup").read_text("utf-8")
        mounts = (root / "proc/self/mountinfo").read_text("utf-8")
    except OSError:
        return
    v1: PurePosixPath | None = None
    v2: PurePosixPath | None = None
    for line in own.splitlines():
        _, names, group = line.split(":", 2)
        if not names:
            v2 = PurePosixPath(group)
        elif "cpu" in names.split(","):
            v1 = PurePosixPath(group)
    for line in mounts.splitlines():
        fields, _, kind = line.partition(" - ")
        if not kind.startswith(("cgroup ", "cgroup2 ")):
            continue
        mount_root, mount_point = (PurePosixPath(_unescaped(x)) for x in fields.split()[3:5])
        path = v2 if kind.startswith("cgroup2 ") else v1
        if path is None or (path is v1 and "cpu" not in kind.split()[-1].split(",")):
            continue
        # In a container, the root of the mount is the container's own group.
        inside = path.is_relative_to(mount_root)
        relative = path.relative_to(mount_root) if inside else PurePosixPath()
        folder = root / mount_point.relative_to("/")
        for part in (relative, *relative.parents):
            yield folder / part, path is v2


def _unescaped(field: str) -> str:
    """Decode the octal escapes in a field of mountinfo, such as that of a space."""
    return re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), field)
