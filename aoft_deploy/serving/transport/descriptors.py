"""File descriptors, which limit the number of connections of a process."""

from __future__ import annotations

import contextlib
from pathlib import Path

from aoft_deploy.errors import SettingError
from aoft_deploy.serving.log import log

__all__ = ["ACCEPTED_AT_ONCE", "SPARE", "connections_possible"]

ACCEPTED_AT_ONCE = 16
"""Maximum number of connections that are accepted in one turn of the event loop."""

SPARE = 16
"""Number of connections above the limit, for ``/v2/health``."""

RESERVED = 8 * ACCEPTED_AT_ONCE + SPARE + 48
"""Descriptors that are not for connections within the limit.

Several turns of the event loop pass until an accepted connection is counted, and until a dropped
one has released its descriptor. The last summand is for artefacts, tasks and the event loop.
"""


def connections_possible(wanted: int) -> int:
    """The number of connections that the descriptors allow, up to the number wanted.

    Raises the soft limit on descriptors if necessary.

    Raises:
        SettingError: There are too few descriptors for any connection.
    """
    try:
        import resource
    except ImportError:  # not a Unix system
        return wanted
    kind = resource.RLIMIT_NOFILE
    in_use = _open_descriptors() + RESERVED
    soft, hard = resource.getrlimit(kind)
    unlimited = resource.RLIM_INFINITY
    if soft != unlimited and soft < in_use + wanted:
        raised = in_use + wanted if hard == unlimited else min(hard, in_use + wanted)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(kind, (raised, hard))
        soft = resource.getrlimit(kind)[0]
    if soft == unlimited or soft >= in_use + wanted:
        return wanted
    if soft <= in_use:
        raise SettingError(
            f"This process may open {soft} files, which leaves none for connections: allow "
            f"{in_use + wanted} (ulimit -n)."
        )
    log("fewer connections", wanted=wanted, possible=soft - in_use, descriptors=soft)
    return soft - in_use


def _open_descriptors() -> int:
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.exists() else 16
