"""File descriptors: how many connections a process can have."""

from __future__ import annotations

import contextlib
from pathlib import Path

from aoft_deploy.errors import SettingError
from aoft_deploy.serving.log import log

__all__ = ["ACCEPTED_AT_ONCE", "SPARE", "connections_possible"]

ACCEPTED_AT_ONCE = 16
"""Connections that are accepted in one turn of the event loop."""

SPARE = 16
"""Connections above the limit, for ``/v2/health``."""

RESERVED = 8 * ACCEPTED_AT_ONCE + SPARE + 48
"""Descriptors beside those of connections within the limit.

A few turns pass until one that was accepted is known, and until one that is dropped has gone. The
last ones are for artefacts, tasks and the event loop.
"""


def connections_possible(wanted: int) -> int:
    """As many connections as wanted, or as descriptors allow; the soft limit is raised for them.

    Raises:
        SettingError: There are too few descriptors for any.
    """
    try:
        import resource
    except ImportError:  # another system than Unix
        return wanted
    most = resource.RLIMIT_NOFILE
    taken = _open_now() + RESERVED
    soft, hard = resource.getrlimit(most)
    unlimited = resource.RLIM_INFINITY
    if soft != unlimited and soft < taken + wanted:
        raised = taken + wanted if hard == unlimited else min(hard, taken + wanted)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(most, (raised, hard))
        soft = resource.getrlimit(most)[0]
    if soft == unlimited or soft >= taken + wanted:
        return wanted
    if soft <= taken:
        raise SettingError(
            f"This process may open {soft} files, which leaves none for connections: allow "
            f"{taken + wanted} (ulimit -n)."
        )
    log("fewer connections", wanted=wanted, possible=soft - taken, descriptors=soft)
    return soft - taken


def _open_now() -> int:
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.exists() else 16
